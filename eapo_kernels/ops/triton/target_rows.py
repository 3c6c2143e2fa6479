"""The targets' part of d_weight: rows of hidden times a factor, added to their targets' rows in fp32 and in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..backend import TargetRows
from . import configs
from .configs import Tile
from .launch import Launch, family, options


@triton.jit(do_not_specialize=["n_rows", "first"])
def target_rows_kernel(
    out, hidden, targets, order, factor, first, n_rows, n_columns, dim, out_stride_v, out_stride_d, hidden_stride_n,
    hidden_stride_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[v - first] += sum over the rows i with target v of factor[i] hidden[i], first <= v < first + n_columns.

    A program a place of the sorted ``targets`` [n_rows]: the first place of each target adds all its rows up, BLOCK_N at a
    time, the others leave. out: [n_columns, dim] fp32; hidden: [n_rows, dim]; order: [n_rows], the row at a place; factor:
    [n_rows] fp32, by row.
    """
    place = tl.program_id(0)
    target = tl.load(targets + place)
    before = tl.load(targets + tl.maximum(place - 1, 0))
    inside = (target >= first) & (target < n_columns + first)
    if inside & ((place == 0) | (target != before)):
        at = out + (target - first) * out_stride_v
        for d in range(0, dim, BLOCK_D):
            dims = (d + tl.arange(0, BLOCK_D)).to(tl.int64)
            total = tl.zeros([BLOCK_D], tl.float32)
            start = place
            more = True
            while more:
                places = start + tl.arange(0, BLOCK_N)
                mine = places < n_rows
                mine = mine & (tl.load(targets + places, mask=mine, other=0) == target)
                rows = tl.load(order + places, mask=mine, other=0)  # [BLOCK_N]
                weight = tl.load(factor + rows, mask=mine, other=0.0)  # [BLOCK_N]
                mask = mine[:, None] & (dims < dim)[None, :]
                h = hidden + rows[:, None] * hidden_stride_n + dims[None, :] * hidden_stride_d
                total += tl.sum(weight[:, None] * tl.load(h, mask=mask, other=0.0).to(tl.float32), 0)  # [BLOCK_N, BLOCK_D]
                start += BLOCK_N
                more = tl.sum(mine.to(tl.int32), 0) == BLOCK_N
            here = at + dims * out_stride_d
            tl.store(here, tl.load(here, mask=dims < dim, other=0.0) + total, mask=dims < dim)  # [BLOCK_D]


def add_target_rows(out: Tensor, first: int, rows: TargetRows, *, tile: Tile | None = None) -> Launch:
    """The launch that adds to ``out`` [V', D] fp32, whose first row is that of target ``first``."""
    tile = tile or configs.find("target_rows", family(out.device), rows.hidden.element_size())
    arguments = {
        "out": out,
        "hidden": rows.hidden,
        "targets": rows.targets,
        "order": rows.order,
        "factor": rows.factor.contiguous(),
        "first": first,
        "n_rows": rows.targets.shape[0],
        "n_columns": out.shape[0],
        "dim": out.shape[1],
        "out_stride_v": out.stride(0),
        "out_stride_d": out.stride(1),
        "hidden_stride_n": rows.hidden.stride(0),
        "hidden_stride_d": rows.hidden.stride(1),
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_d,
    }
    return Launch(target_rows_kernel, rows.targets.shape[0], arguments, options(tile), out.device)
