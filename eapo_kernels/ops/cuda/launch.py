"""The launchers of the two CUDA kernels. Outputs have the layout of the Triton kernels of the same
names.

``cuda.core`` loads the compiled code. Launches go to the driver through ``cuda.bindings``, because
``cuda.core`` 1.2 cannot express them: its ``launch`` takes no struct by value
(NVIDIA/cuda-python#2343), the swizzles of its tensor maps have no public name, and its kernel
attributes cannot be set.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from cuda.bindings import driver
from cuda.core import Device, Kernel, ObjectCode
from torch import Tensor

from ..chunking import cdiv
from ..lm_head import Projection
from ..triton.online_softmax import PartialSums
from ..triton.scaled_exp import ScaledExpSums
from ..triton.tiles import Tile as TritonTile
from ..triton.tiles import live_row_tiles, range_tiles
from . import build, tiles
from .tiles import BLOCK_D, THREADS, Build, Operand, Tile

OPERANDS: dict[torch.dtype, Operand] = {torch.bfloat16: "bf16", torch.float16: "fp16"}

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
    """A TMA descriptor: a matrix [N, columns] with contiguous rows, copied in boxes of ``rows`` x
    ``BLOCK_D``.

    Boxes are swizzled in shared memory. Outside of the matrix reads give 0 and nothing is written.
    """

    matrix: Tensor
    rows: int

    def encode(self) -> TensorMap:
        """The descriptor, for the addresses of this matrix."""
        m = self.matrix
        return _encoded(m.dtype, m.data_ptr(), m.shape[0], m.shape[1], m.stride(0) * m.element_size(), self.rows)


class TensorMap:
    """128 bytes of a descriptor at an address that is a multiple of 128, as CUDA 13 declares it. An
    object of ``cuda.bindings`` keeps them at multiples of 16, which a driver may refuse."""

    ALIGNMENT = 128

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(2 * self.ALIGNMENT)
        self.address = cdiv(ctypes.addressof(self._memory), self.ALIGNMENT) * self.ALIGNMENT


_ENCODE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, *[ctypes.c_void_p] * 4, *[ctypes.c_int] * 4
)
"""``cuTensorMapEncodeTiled``: map, type, rank, address, sizes, strides, box, steps, interleave,
swizzle, L2 promotion, fill."""


@functools.cache
def _encoder() -> Any:
    """The driver's function: the one of ``cuda.bindings`` chooses the map's address itself."""
    flags = driver.CUdriverProcAddress_flags.CU_GET_PROC_ADDRESS_DEFAULT
    found = driver.cuGetProcAddress(b"cuTensorMapEncodeTiled", 12000, flags)
    if found[0] != driver.CUresult.CUDA_SUCCESS or not int(found[1]):
        raise RuntimeError(f"CUDA driver: expected cuTensorMapEncodeTiled, got {found[0].name}")
    return _ENCODE(int(found[1]))


@functools.lru_cache(256)
def _encoded(dtype: torch.dtype, address: int, n_rows: int, n_columns: int, pitch: int, box_rows: int) -> TensorMap:
    """A descriptor, encoded once: it depends on these numbers only. Sizes count from the innermost
    dimension."""
    result = TensorMap()
    sizes, strides = (ctypes.c_uint64 * 2)(n_columns, n_rows), (ctypes.c_uint64 * 1)(pitch)
    box, steps = (ctypes.c_uint32 * 2)(BLOCK_D, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    status = _encoder()(
        result.address, int(_TYPES[dtype]), 2, address, *(ctypes.addressof(one) for one in (sizes, strides, box, steps)),
        int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        int(driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B),
        int(driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B),
        int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
    )  # fmt: skip
    _checked((driver.CUresult(status), result))
    return result


@dataclass(frozen=True)
class Launch:
    """A kernel with all of its arguments.

    Attributes:
        build: which kernel.
        boxes: its descriptors, in the order of its parameters.
        arguments: its last parameter.
        tensors: the tensors whose addresses ``arguments`` holds.
        programs: size of the grid.
        device: of the tensors.
    """

    build: Build
    boxes: tuple[Box, ...]
    arguments: Arguments
    tensors: dict[str, Tensor | None]
    programs: int
    device: torch.device

    def __call__(self) -> None:
        """On the current stream of the device."""
        with torch.cuda.device(self.device):
            device = torch.cuda.current_device()
            ensure_context(device)
            function = driver.CUfunction(int(load(self.build, device).handle))
            maps = [box.encode() for box in self.boxes]
            parameters = [*(one.address for one in maps), ctypes.addressof(self.arguments)]
            pointers = (ctypes.c_void_p * len(parameters))(*parameters)
            _checked(
                driver.cuLaunchKernel(
                    function, self.programs, 1, 1, THREADS, 1, 1, self.build.shared_bytes,
                    torch.cuda.current_stream().cuda_stream, ctypes.addressof(pointers), 0,
                )
            )  # fmt: skip


@functools.cache
def load(item: Build, device: int) -> Kernel:
    """The kernel of a build on a device: compiled or read from the cache, loaded, its limit of
    shared memory raised.
    """
    kernel = ObjectCode.from_cubin(build.cubin(item), name=item.kernel).get_kernel(item.kernel)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuKernelSetAttribute(attribute, item.shared_bytes, kernel.handle, device))
    return kernel


@functools.cache
def refusal() -> str | None:
    """Why the driver cannot load the compiled code, or None: the code needs a driver of its major
    CUDA version or newer.
    """
    version, compiler = int(_checked(driver.cuDriverGetVersion())), build.compiler_version()
    major, needed = version // 1000, int(compiler.split(".")[0])
    if major >= needed:
        return None
    return f"a driver for CUDA {major}.{version % 1000 // 10}, where the code of NVRTC {compiler} needs one for CUDA {needed}"


def ensure_context(device: int) -> None:
    """Make the device's primary context current in this thread if no context is.

    PyTorch selects a device without entering its context, and a backward pass runs in a thread of
    its own, where this launch may be the first call of the driver (pytorch/pytorch#124565).
    """
    if not int(_checked(driver.cuCtxGetCurrent())):
        Device(device).set_current()


def _checked(result: tuple[Any, ...]) -> Any:
    """The result of a driver call. Raises RuntimeError with the name of the driver's error."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: expected success, got {status.name}")
    return values[0] if values else None


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def slots(device: torch.device, tile: Tile) -> int:
    """Clusters that run at once, one program per multiprocessor. A cluster of two always finds a
    pair of multiprocessors.
    """
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index) // tile.cluster


def product_launch(
    item: Build,
    projection: Projection,
    targets: Tensor,
    sums: Tensor,
    tiles_per_split: int,
    *,
    offsets: Tensor | None = None,
    matrix: Tensor | None = None,
) -> Launch:
    """The launch of either kernel. Clusters of programs walk over its units of work.

    targets: [N] int64. sums: output, see csrc/arguments.h. tiles_per_split: vocabulary tiles of a
    unit of work. offsets: [N] fp32 and matrix: [N, V] in hidden's dtype, both for
    ``scaled_exp_gemm``; TMA must be able to describe matrix.
    """
    tile, p = item.tile, projection
    tensors = {
        "sums": sums,
        "targets": targets.contiguous(),
        "bias": p.bias,
        "row_inv_temperature": None if p.row_inv_temperature is None else p.row_inv_temperature.contiguous(),
        "offsets": offsets,
    }
    group = live_row_tiles(tile.group_n, tile.cluster_rows, p.dim, p.hidden.element_size())
    walk = Walk(cdiv(p.n_rows, tile.cluster_rows), cdiv(p.vocab, tile.block_v), tiles_per_split, group)
    arguments = Arguments(
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
        bias_stride=0 if p.bias is None else p.bias.stride(0),
        scale=p.logit_scale * p.inv_temperature,
        n_rows=p.n_rows,
        n_columns=p.vocab,
        steps=cdiv(p.dim, BLOCK_D),
        walk=walk,
    )
    boxes = [Box(p.hidden, tile.block_n), Box(p.weight, tile.block_v // tile.cluster)]
    if matrix is not None:
        boxes.append(Box(matrix, 64))
    units = walk.row_tiles * cdiv(walk.column_tiles, tiles_per_split)
    device = p.hidden.device
    clusters = min(units, slots(device, tile))
    return Launch(item, tuple(boxes), arguments, tensors, clusters * tile.cluster, device)


def stream_statistics(
    projection: Projection,
    targets: Tensor,
    *,
    entropy: bool,
    second_moments: bool,
    tile: Tile | None = None,
    splits: int | None = None,
) -> tuple[Launch, PartialSums]:
    """The launch that computes the partial sums of every row, and the sums; ranges as of Triton's.

    targets: [N] int64. tile, splits: override the table's tile and the number of ranges. In
    ping-pong each warp group stores sums of its own, two per range.
    """
    tile = tile or tiles.find("stream_statistics", projection.n_rows, projection.dim)
    per_range = 2 if tile.pingpong else 1
    column_tiles = cdiv(projection.vocab, tile.block_v)
    length = range_tiles(tile.block_v) if splits is None else cdiv(column_tiles, splits)
    ranges = cdiv(column_tiles, length)
    sums = PartialSums.empty(projection, ranges * per_range, entropy, second_moments)
    item = Build(
        "stream_statistics",
        tile,
        OPERANDS[projection.hidden.dtype],
        entropy=entropy or second_moments,
        second_moments=second_moments,
        bias=projection.bias is not None,
    )
    return product_launch(item, projection, targets, sums.values, length), sums


def scaled_exp_sums(projection: Projection, entropy: bool, tile: Tile | None = None) -> ScaledExpSums:
    """Uninitialised offsets and sums for ``scaled_exp_gemm``."""
    tile = tile or tiles.find("scaled_exp_gemm", projection.n_rows, projection.dim)
    return ScaledExpSums.empty(projection, entropy, tile=TritonTile(tile.block_n, tile.block_v))


def scaled_exp_gemm(
    projection: Projection, targets: Tensor, sums: ScaledExpSums, matrix: Tensor, *, tile: Tile | None = None
) -> Launch:
    """The launch that computes ``matrix`` [N, V], E, and ``sums.values`` from ``sums.offsets``.

    targets: [N] int64. matrix: in hidden's dtype, contiguous rows a multiple of 16 bytes apart.
    tile: overrides the table's.
    """
    tile = tile or tiles.find("scaled_exp_gemm", projection.n_rows, projection.dim)
    assert projection.softcap is None
    assert tile.block_v == sums.block_v
    assert matrix.dtype == projection.hidden.dtype
    item = Build("scaled_exp_gemm", tile, OPERANDS[matrix.dtype], entropy=sums.entropy, bias=projection.bias is not None)
    return product_launch(item, projection, targets, sums.values, 1, offsets=sums.offsets[0], matrix=matrix)
