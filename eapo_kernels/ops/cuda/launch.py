"""From tensors to a launch: what the launchers of the CUDA kernels share.

``cuda.core`` loads what it compiled. The rest goes to the driver through ``cuda.bindings``, because ``cuda.core`` 1.2 cannot
express it: its ``launch`` takes no struct by value (NVIDIA/cuda-python#2343), the swizzles of its tensor maps have no public
name, and its kernel attributes cannot be set.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from cuda.bindings import driver
from cuda.core import Device, Kernel, ObjectCode
from torch import Tensor

from ..projection import Projection
from . import build
from .configs import Build, ProductBuild
from .tile import BLOCK_D, Tile

_TYPES = {
    torch.bfloat16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    torch.float16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
}


class Walk(ctypes.Structure):
    """``Walk`` of csrc/layout.h."""

    _fields_ = [(name, ctypes.c_int) for name in ("row_tiles", "column_tiles", "tiles_per_split", "group")]


class Arguments(ctypes.Structure):
    """``Arguments`` of csrc/arguments.h, field by field."""

    _fields_ = [
        ("sums", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("row_inv_temperature", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("bias_stride", ctypes.c_longlong),
        ("scale", ctypes.c_float),
        ("n_rows", ctypes.c_int),
        ("n_columns", ctypes.c_int),
        ("steps", ctypes.c_int),
        ("walk", Walk),
    ]


@dataclass(frozen=True)
class Box:
    """What a TMA descriptor describes: a matrix [rows, columns] with contiguous rows, moved in boxes of ``rows`` x ``BLOCK_D``.

    Boxes are swizzled in shared memory; what sticks out of the matrix is read as 0 and not written.
    """

    matrix: Tensor
    rows: int

    def parameters(self) -> tuple[Any, ...]:
        """Arguments of ``cuTensorMapEncodeTiled``; sizes count from the innermost dimension."""
        matrix, big, small = self.matrix, driver.cuuint64_t, driver.cuuint32_t
        return (
            _TYPES[matrix.dtype],
            2,
            matrix.data_ptr(),
            [big(matrix.shape[1]), big(matrix.shape[0])],
            [big(matrix.stride(0) * matrix.element_size())],
            [small(BLOCK_D), small(self.rows)],
            [small(1), small(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )


def addresses(tensors: Mapping[str, Tensor | None]) -> dict[str, int | None]:
    """Where tensors begin, for fields of arguments of the same names."""
    return {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it runs on.

    Attributes:
        build: which kernel.
        boxes: its descriptors, in the order of its parameters.
        arguments: its last parameter.
        tensors: what ``arguments`` points into.
        programs: how many are started.
        device: where the tensors are.
    """

    build: Build
    boxes: tuple[Box, ...]
    arguments: ctypes.Structure
    tensors: dict[str, Tensor | None]
    programs: int
    device: torch.device

    def __call__(self) -> None:
        """On the current stream of the device."""
        with torch.cuda.device(self.device):
            device = torch.cuda.current_device()
            ensure_context(device)
            function = driver.CUfunction(int(load(self.build, device).handle))
            maps = [_checked(driver.cuTensorMapEncodeTiled(*box.parameters())) for box in self.boxes]
            parameters = [*(int(one.getPtr()) for one in maps), ctypes.addressof(self.arguments)]
            pointers = (ctypes.c_void_p * len(parameters))(*parameters)
            _checked(
                driver.cuLaunchKernel(
                    function, self.programs, 1, 1, self.build.threads, 1, 1, self.build.shared_bytes,
                    torch.cuda.current_stream().cuda_stream, ctypes.addressof(pointers), 0,
                )
            )  # fmt: skip


@functools.cache
def load(item: Build, device: int) -> Kernel:
    """The kernel, ready for a device: compiled or from the cache, loaded, allowed its shared memory."""
    kernel = ObjectCode.from_cubin(build.cubin(item), name=item.kernel).get_kernel(item.kernel)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuKernelSetAttribute(attribute, item.shared_bytes, kernel.handle, device))
    return kernel


@functools.cache
def refusal() -> str | None:
    """Why the driver cannot load what the compiler makes, or None: a driver runs code of its own major version of CUDA."""
    version, compiler = int(_checked(driver.cuDriverGetVersion())), build.compiler_version()
    major, needed = version // 1000, int(compiler.split(".")[0])
    if major >= needed:
        return None
    return f"a driver for CUDA {major}.{version % 1000 // 10}, where the code of NVRTC {compiler} needs one for CUDA {needed}"


def ensure_context(device: int) -> None:
    """Give this thread the device's primary context where it has none.

    PyTorch selects a device without entering its context, and a backward pass runs in a thread of its own: a launch of ours may
    be the first thing that reaches the driver there (pytorch/pytorch#124565).
    """
    if not int(_checked(driver.cuCtxGetCurrent())):
        Device(device).set_current()


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a driver call. Raises RuntimeError with the driver's name of an error."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: expected success, got {status.name}")
    return values[0] if values else None


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def slots(device: torch.device, tile: Tile) -> int:
    """Clusters that run at once, one program a multiprocessor. A cluster of two always has a pair of neighbours to run on."""
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index) // tile.cluster


def product_launch(
    item: ProductBuild,
    projection: Projection,
    targets: Tensor,
    sums: Tensor,
    tiles_per_split: int,
    *,
    offsets: Tensor | None = None,
    matrix: Tensor | None = None,
) -> Launch:
    """The launch of a kernel that multiplies hidden and weight; clusters of programs walk over its units of work.

    targets: [N] int64. sums: what the kernel writes, see csrc/arguments.h. tiles_per_split: vocabulary tiles of a unit of work.
    offsets: [N] fp32 and matrix: [N, V] in hidden's dtype with described rows, for ``scaled_exp_gemm``.
    """
    tile, p = item.tile, projection
    tensors = {
        "sums": sums,
        "targets": targets.contiguous(),
        "bias": p.bias,
        "row_inv_temperature": None if p.row_inv_temperature is None else p.row_inv_temperature.contiguous(),
        "offsets": offsets,
    }
    walk = Walk(-(-p.n_rows // tile.cluster_rows), -(-p.vocab // tile.block_v), tiles_per_split, tile.group_n)
    arguments = Arguments(
        **addresses(tensors),
        bias_stride=0 if p.bias is None else p.bias.stride(0),
        scale=p.logit_scale * p.inv_temperature,
        n_rows=p.n_rows,
        n_columns=p.vocab,
        steps=-(-p.dim // BLOCK_D),
        walk=walk,
    )
    boxes = [Box(p.hidden, tile.block_n), Box(p.weight, tile.block_v // tile.cluster)]
    if matrix is not None:
        boxes.append(Box(matrix, 64))
    units = walk.row_tiles * -(-walk.column_tiles // tiles_per_split)
    device = p.hidden.device
    clusters = min(units, slots(device, tile))
    return Launch(item, tuple(boxes), arguments, tensors, clusters * tile.cluster, device)
