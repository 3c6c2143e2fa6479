"""Run launches of the kernels in csrc, compiled to PTX by NVRTC, on the emulator."""

from __future__ import annotations

import functools
from typing import Any

import ptx_machine

from eapo_kernels.ops.cuda import build
from eapo_kernels.ops.cuda.launch import Box, Launch
from eapo_kernels.ops.cuda.tiles import BLOCK_D, THREADS, Build


@functools.cache
def kernel(item: Build) -> ptx_machine.Kernel:
    return ptx_machine.Kernel(build.ptx(item), item.kernel)


def tensor_map(box: Box) -> bytes:
    """The descriptor of ``Box.parameters``."""
    m = box.matrix
    sizes, stride = [m.shape[1], m.shape[0]], m.stride(0) * m.element_size()
    return bytes(ptx_machine.tensor_map(m.data_ptr(), m.element_size(), sizes, [stride], [BLOCK_D, box.rows], 128))


def run(launch: Launch, code: ptx_machine.Kernel | None = None, **how: Any) -> None:
    """Do what ``launch()`` does on a GPU. code: replaces the build's, to run a kernel with a
    mistake.
    """
    code = code or kernel(launch.build)
    parameters = b"".join(tensor_map(box) for box in launch.boxes) + bytes(launch.arguments)
    last = code.syntax.parameters[-1]
    assert len(parameters) == last.offset + last.size, "the launcher's parameters are not the kernel's"
    outputs = [box.matrix for box in launch.boxes[2:]] + [one for one in launch.tensors.values() if one is not None]
    tensors = [(box.matrix, False) for box in launch.boxes[:2]] + [(one, True) for one in outputs]
    code.run(
        parameters,
        tensors,
        grid=launch.programs,
        block=THREADS,
        shared_bytes=launch.build.shared_bytes,
        **how,
    )
