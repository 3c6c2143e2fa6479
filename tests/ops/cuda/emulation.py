"""A launch run on the CPU: the kernels' own walk and epilogues (g++) over logits that PyTorch multiplies.

It reads what the kernel would read, through the launch's descriptors and the pointers of its arguments, and writes what the
kernel would write. What is missing is the hardware's part: the pipeline, the tensor cores, TMA.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from eapo_kernels.ops.cuda.launch import Arguments, Launch

ROWS = 64
LOG2E = 1.4426950408889634


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def read(address: int | None, kind: Any, dtype: torch.dtype, count: int) -> Tensor | None:
    """A copy of ``count`` numbers at an address."""
    return None if address is None else torch.frombuffer((kind * count).from_address(address), dtype=dtype).clone()


def floats(address: int | None, count: int) -> Tensor | None:
    return read(address, ctypes.c_float, torch.float32, count)


class Operands:
    """What a kernel reads of a launch, with rows padded to whole row tiles as TMA pads them."""

    def __init__(self, launch: Launch) -> None:
        a: Arguments = launch.arguments
        hidden, weight = launch.boxes[0].matrix, launch.boxes[1].matrix
        assert (a.n_rows, a.n_columns) == (hidden.shape[0], weight.shape[0])
        assert a.steps == math.ceil(hidden.shape[1] / 64)
        self.rows = a.walk.row_tiles * launch.build.tile.cluster_rows
        padding = self.rows - a.n_rows
        self.raw = torch.nn.functional.pad(hidden.float() @ weight.float().T, (0, 0, 0, padding)).contiguous()
        scale = torch.full((a.n_rows,), a.scale)
        temperature = floats(a.row_inv_temperature, a.n_rows)
        self.scale = torch.nn.functional.pad(scale if temperature is None else scale * temperature, (0, padding))
        targets = read(a.targets, ctypes.c_int64, torch.int64, a.n_rows)
        assert targets is not None
        targets = torch.where((targets >= 0) & (targets < a.n_columns), targets, -1)
        self.targets = torch.nn.functional.pad(targets, (0, padding), value=-1).int()
        self.bias = None
        if launch.build.bias:
            span = (a.n_columns - 1) * a.bias_stride + 1
            bits = read(a.bias, ctypes.c_int16, torch.int16, span)
            assert bits is not None
            self.bias = bits[:: a.bias_stride].contiguous().view(hidden.dtype).float()


def units(launch: Launch, host: ctypes.CDLL) -> list[tuple[int, ...]]:
    """(row tile, split, first tile, end) in the order of the walk."""
    w = launch.arguments.walk
    walk, out = (w.row_tiles, w.column_tiles, w.tiles_per_split, w.group), (ctypes.c_int * 4)()
    found = []
    for index in range(host.walk_units(*walk)):
        host.walk_unit(*walk, index, out)
        found.append(tuple(out))
    assert 1 <= launch.programs // launch.build.tile.cluster <= len(found)
    return found


def statistics(launch: Launch, host: ctypes.CDLL) -> None:
    """``stream_statistics``: writes ``sums`` [fields, splits, N]."""
    o, a, item = Operands(launch), launch.arguments, launch.build
    kind = 2 if item.second_moments else int(item.entropy)
    fields, groups = (3, 4, 7)[kind], 2 if item.tile.pingpong else 1
    splits = math.ceil(a.walk.column_tiles / a.walk.tiles_per_split) * groups
    sums = launch.tensors["sums"]
    assert sums is not None
    assert a.sums == sums.data_ptr()
    assert sums.shape == (fields, splits, a.n_rows)
    for row_tile, split, first, end in units(launch, host):
        for row in range(row_tile * item.tile.cluster_rows, (row_tile + 1) * item.tile.cluster_rows, ROWS):
            rows = slice(row, row + ROWS)
            for group in range(groups):
                out = torch.full((7, ROWS), math.nan)
                host.range_sums(
                    item.tile.block_v, kind, pointer(o.raw[rows]), a.n_columns, a.n_columns, pointer(o.scale[rows]),
                    pointer(o.targets[rows]), pointer(o.bias), first + group, end, groups, pointer(out),
                )  # fmt: skip
                kept = max(0, min(ROWS, a.n_rows - row))
                sums[:, split * groups + group, row : row + kept] = out[:fields, :kept]


def exponentials(launch: Launch, host: ctypes.CDLL) -> None:
    """``exp_gemm``: writes the matrix of the third descriptor, and ``sums`` [1 or 2, column tiles, N]."""
    o, a, tile = Operands(launch), launch.arguments, launch.build.tile
    if o.bias is not None:
        o.raw = (o.raw + o.bias).clamp_min(-1e20)
    sums, matrix = launch.tensors["sums"], launch.boxes[2].matrix
    assert sums is not None
    assert a.sums == sums.data_ptr()
    assert a.walk.tiles_per_split == 1
    assert sums.shape == (1 + launch.build.entropy, a.walk.column_tiles, a.n_rows)
    assert matrix.shape == (a.n_rows, a.n_columns)
    offsets = floats(a.offsets, a.n_rows)
    assert offsets is not None
    offsets = torch.nn.functional.pad(offsets, (0, o.rows - a.n_rows))
    address = torch.arange(8192)
    swizzle = address ^ (address >> 7 & 7) << 4
    for row_tile, _, column_tile, _ in units(launch, host):
        for row in range(row_tile * tile.cluster_rows, (row_tile + 1) * tile.cluster_rows, ROWS):
            rows, kept = slice(row, row + ROWS), max(0, min(ROWS, a.n_rows - row))
            slices = torch.zeros(tile.block_v // 64, 8192, dtype=torch.uint8)
            rest, x_exp = torch.empty(ROWS), torch.empty(ROWS)
            host.exp_tile(
                tile.block_v, pointer(o.raw[rows]), a.n_columns, a.n_columns, pointer(o.scale[rows]), pointer(offsets[rows]),
                pointer(o.targets[rows]), column_tile, pointer(slices), pointer(rest), pointer(x_exp),
            )  # fmt: skip
            for number, stored in enumerate(slices[:, swizzle]):
                first = column_tile * tile.block_v + 64 * number
                width = max(0, min(64, a.n_columns - first))
                box = stored.view(torch.bfloat16).view(ROWS, 64)
                matrix[row : row + kept, first : first + width] = box[:kept, :width]
            for field, values in zip(sums[:, column_tile], (rest, x_exp), strict=False):
                field[row : row + kept] = values[:kept]


def run(launch: Launch, host: ctypes.CDLL) -> None:
    """What ``launch()`` would leave behind."""
    {"stream_statistics": statistics, "exp_gemm": exponentials}[launch.build.kernel](launch, host)
