"""Run launches of the Triton kernels, compiled by triton, on the emulator."""

from __future__ import annotations

import functools
import struct
from typing import Any

import ptx_machine
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import compiled_code
from eapo_kernels.ops.triton.common import Launch

SWIZZLES = (0, 32, 64, 128)


@functools.lru_cache(maxsize=64)
def _kernel(text: str) -> ptx_machine.Kernel:
    return ptx_machine.Kernel(text)


def descriptor(value: TensorDescriptor, meta: dict[str, Any]) -> bytes:
    """A descriptor as triton's launcher passes it: map, shape, strides in elements."""
    assert not meta["fp4_padded"]
    item = value.base.element_size()
    sizes, strides, box = value.shape[::-1], [item * one for one in value.strides[:-1]][::-1], meta["block_size"][::-1]
    made = ptx_machine.tensor_map(value.base.data_ptr(), item, sizes, strides, box, SWIZZLES[meta["swizzle"]])
    return bytes(made)


def run(launch: Launch, family: str = "sm90", **how: Any) -> None:
    """Do what ``launch()`` does on a GPU of a family. how: ``seed`` and ``lateness`` of
    ``ptx_machine.Kernel.run``.
    """
    compiled = compiled_code.compile_triton(launch, compiled_code.ARCHITECTURES[family])
    kernel = _kernel(compiled.asm["ptx"])
    metas = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    values: list[tuple[str, Any]] = []
    tensors: list[tuple[Tensor, bool]] = []
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialize):
            continue
        if isinstance(value, TensorDescriptor):
            values.append(("map", descriptor(value, next(metas))))
            values += [("i", one) for one in value.shape] + [("q", one) for one in value.strides]
            tensors.append((value.base, True))
        elif isinstance(value, Tensor):
            values.append(("Q", value.data_ptr()))
            tensors.append((value, True))
        elif isinstance(value, float):
            values.append(("f", value))
        else:
            values.append(("i" if -(2**31) <= value < 2**31 else "q", value))
    values += [("Q", 0)] * (len(kernel.syntax.parameters) - len(values))  # scratch memory that none of them needs
    assert getattr(compiled.metadata, "global_scratch_size", 0) == 0
    parameters = bytearray(sum((kernel.syntax.parameters[-1].offset, kernel.syntax.parameters[-1].size)))
    for place, (kind, value) in zip(kernel.syntax.parameters, values, strict=True):
        packed = value if kind == "map" else struct.pack("<" + kind, value)
        assert len(packed) == place.size, f"{place}: {len(packed)} bytes"
        parameters[place.offset : place.offset + place.size] = packed
    kernel.run(
        bytes(parameters),
        tensors,
        grid=launch.grid,
        block=32 * compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        **how,
    )
