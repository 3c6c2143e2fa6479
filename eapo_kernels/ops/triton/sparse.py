"""Few entries of a [N, V] matrix: chosen logits, and their products with rows of hidden or weight.

An entry reads one row of D elements of each operand, two operations an element, so memory sets the
time. ``logits_at``: a row of weight from memory, the row of hidden mostly from L1 (its entries are
neighbours), 20 bytes of indices and result. ``add_rows``: a row of the source, 20 bytes of indices
a slice of D, and 8 D bytes a key. Hot rows stay in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chunking import cdiv
from ..dispatch import WeightedRows
from ..lm_head import Projection
from . import tiles
from .common import Launch, family, options
from .tiles import Tile


@triton.jit
def dot_rows(
    hidden, weight, rows, columns, dim, hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hidden[rows] . weight[columns] in fp32, [BLOCK_N]. rows, columns: [BLOCK_N] int64, in range.

    The bits of a product depend on its two rows alone.
    """
    dims = tl.arange(0, BLOCK_D)
    h_at = hidden + rows[:, None] * hidden_stride_n + dims[None, :].to(tl.int64) * hidden_stride_d
    w_at = weight + columns[:, None] * weight_stride_v + dims[None, :].to(tl.int64) * weight_stride_d
    product = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for d in range(0, dim, BLOCK_D):
        inside = (dims < dim - d)[None, :]
        h = tl.load(h_at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        w = tl.load(w_at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        product += h * w
        h_at += BLOCK_D * tl.cast(hidden_stride_d, tl.int64)
        w_at += BLOCK_D * tl.cast(weight_stride_d, tl.int64)
    return tl.sum(product, 1)


@triton.jit(do_not_specialize=["rows", "ids", "n_entries", "n_rows"])
def logits_at_kernel(
    out, rows, ids, n_entries, hidden, weight, n_rows, n_columns, dim, hidden_stride_n, hidden_stride_d, weight_stride_v,
    weight_stride_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[e] = hidden[rows[e]] . weight[ids[e]] in fp32, or NaN where one of them does not exist.

    out: [n_entries] fp32. rows, ids: [n_entries] int64. hidden: [n_rows, dim]. weight: [n_columns, dim].
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = places < n_entries
    places = tl.minimum(places, n_entries - 1)
    row, column = tl.load(rows + places), tl.load(ids + places)  # [BLOCK_N]
    outside = (row < 0) | (row >= n_rows) | (column < 0) | (column >= n_columns)
    product = dot_rows(
        hidden, weight, tl.where(outside, 0, row), tl.where(outside, 0, column), dim, hidden_stride_n, hidden_stride_d,
        weight_stride_v, weight_stride_d, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    tl.store(out + places, tl.where(outside, float("nan"), product), mask=mask)  # [BLOCK_N]


def logits_at(projection: Projection, rows: Tensor, ids: Tensor, *, tile: Tile | None = None) -> tuple[Launch, Tensor]:
    """The launch, and its output [E] fp32: products without bias, scale, soft-cap and temperature.

    rows, ids: [E] int64. Neighbours with one row share it in L1, so rows should be in order.
    """
    hidden = projection.hidden
    tile = tile or tiles.find("logits_at", family(hidden.device), hidden.element_size(), projection.dim)
    out = hidden.new_empty(rows.shape, dtype=torch.float32)
    arguments = projection.arguments | {
        "out": out, "rows": rows.contiguous(), "ids": ids.contiguous(), "n_entries": rows.numel(),
        "BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d,
    }  # fmt: skip
    return Launch(logits_at_kernel, cdiv(rows.numel(), tile.block_n), arguments, options(tile), hidden.device), out


@triton.jit
def add_to_row(out, total, row, n_keys, dims, dim, out_stride_k, out_stride_d):
    """out[row] += total [BLOCK_D], if there is such a row."""
    if (row >= 0) & (row < n_keys):
        here = out + row * out_stride_k + dims * out_stride_d
        tl.store(here, tl.load(here, mask=dims < dim, other=0.0) + total, mask=dims < dim)  # [BLOCK_D]


@triton.jit(do_not_specialize=["keys", "rows", "values", "first", "n_keys", "n_entries", "n_source", "per_block"])
def add_rows_kernel(
    out, carries, keys, rows, values, source, first, n_keys, n_entries, n_source, dim, per_block, out_stride_k, out_stride_d,
    source_stride_n, source_stride_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add ``per_block`` entries to their rows of out, BLOCK_N at a time, in slices of BLOCK_D columns.

    The sum of the first key goes to ``carries`` instead if the entries before have that key too: one
    program alone writes to a row of out, and keys with many entries have many programs.
    out: [n_keys, dim] fp32, the rows of keys ``first`` and above. carries: [blocks, dim] fp32. source:
    [n_source, dim]; rows that do not exist count as zeros. The others: see ``WeightedRows``.
    """
    slices = tl.cdiv(dim, BLOCK_D)
    block = (tl.program_id(0) // slices).to(tl.int64)
    dims = (tl.program_id(0) % slices * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    start = block * per_block
    stop = tl.minimum(start + per_block, n_entries)
    current, largest = tl.load(keys + start), tl.load(keys + stop - 1)
    carried = (start > 0) & (tl.load(keys + tl.maximum(start - 1, 0)) == current)
    if (largest >= first) & (current < first + n_keys):
        total = tl.zeros([BLOCK_D], tl.float32)
        for begin in range(start, stop, BLOCK_N):
            places = begin + tl.arange(0, BLOCK_N)
            key = tl.load(keys + places, mask=places < stop, other=0)  # [BLOCK_N]
            inside = (places < stop) & (key >= first) & (key < first + n_keys)
            key = tl.where(places < stop, key, largest)
            row = tl.load(rows + places, mask=inside, other=0)  # [BLOCK_N]
            value = tl.load(values + places, mask=inside, other=0.0)  # [BLOCK_N]
            read = (value != 0.0) & (row >= 0) & (row < n_source)
            at = source + row[:, None] * source_stride_n + dims[None, :] * source_stride_d
            x = tl.load(at, mask=read[:, None] & (dims < dim)[None, :], other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
            x *= value[:, None]
            last = tl.max(key, 0)
            while current != last:
                total += tl.sum(tl.where((key == current)[:, None], x, 0.0), 0)
                if carried:
                    tl.store(carries + block * dim + dims, total, mask=dims < dim)  # [BLOCK_D]
                else:
                    add_to_row(out, total, current - first, n_keys, dims, dim, out_stride_k, out_stride_d)
                carried = False
                total = tl.zeros([BLOCK_D], tl.float32)
                current = tl.min(tl.where(key > current, key, last), 0)
            total += tl.sum(tl.where((key == current)[:, None], x, 0.0), 0)
        if carried:
            tl.store(carries + block * dim + dims, total, mask=dims < dim)  # [BLOCK_D]
        else:
            add_to_row(out, total, current - first, n_keys, dims, dim, out_stride_k, out_stride_d)


@triton.jit(do_not_specialize=["keys", "first", "n_keys", "n_entries", "per_block"])
def add_carries_kernel(
    out, carries, keys, first, n_keys, n_entries, dim, per_block, out_stride_k, out_stride_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the carries of ``add_rows_kernel`` to out: those of a key in order, by one program a slice.

    It is the program of the key's first carry; the others return. Arguments: see there.
    """
    slices = tl.cdiv(dim, BLOCK_D)
    block = (tl.program_id(0) // slices).to(tl.int64) + 1
    dims = (tl.program_id(0) % slices * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    start = block * per_block
    key, before = tl.load(keys + start), tl.load(keys + start - 1)
    earlier = (block > 1) & (tl.load(keys + tl.maximum(start - per_block - 1, 0)) == key)
    if (key == before) & (not earlier) & (key >= first) & (key < first + n_keys):
        total = tl.zeros([BLOCK_D], tl.float32)
        more = True
        while more:
            blocks = block + tl.arange(0, BLOCK_N)
            mine = blocks * per_block < n_entries
            mine = mine & (tl.load(keys + blocks * per_block, mask=mine, other=0) == key)
            at = carries + blocks[:, None] * dim + dims[None, :]
            total += tl.sum(tl.load(at, mask=mine[:, None] & (dims < dim)[None, :], other=0.0), 0)  # [BLOCK_N, BLOCK_D]
            block += BLOCK_N
            more = tl.sum(mine.to(tl.int32), 0) == BLOCK_N
        add_to_row(out, total, key - first, n_keys, dims, dim, out_stride_k, out_stride_d)


MOST_BLOCKS = 2048
"""Blocks of entries, each with a row of carries: at D = 4096 these are 32 MiB."""


def add_rows(
    out: Tensor, first: int, entries: WeightedRows, *, tile: Tile | None = None, carries_tile: Tile | None = None
) -> tuple[Launch, ...]:
    """The launches, in order, that add ``entries`` to ``out`` [S, D] fp32, the rows of keys ``first`` and above.

    The second one adds the carries of all blocks but the first; distinct keys have none. Tiles: instead of the table's.
    """
    n_entries, source, dim = entries.keys.numel(), entries.source, out.shape[1]
    tile = tile or tiles.find("add_rows", family(out.device), source.element_size(), dim)
    per_block = tile.block_n * max(4, cdiv(n_entries, tile.block_n * MOST_BLOCKS))
    blocks = cdiv(n_entries, per_block)
    alone = blocks == 1 or entries.distinct  # then there are no carries
    both = {
        "out": out, "carries": out if alone else out.new_empty(blocks, dim), "keys": entries.keys.contiguous(), "first": first,
        "n_keys": out.shape[0], "n_entries": n_entries, "dim": dim, "per_block": per_block,
        "out_stride_k": out.stride(0), "out_stride_d": out.stride(1),
    }  # fmt: skip
    arguments = both | {
        "rows": entries.rows.contiguous(), "values": entries.values.contiguous(), "source": source,
        "n_source": source.shape[0], "source_stride_n": source.stride(0), "source_stride_d": source.stride(1),
        "BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d,
    }  # fmt: skip
    first_launch = Launch(add_rows_kernel, blocks * cdiv(dim, tile.block_d), arguments, options(tile), out.device)
    if alone:
        return (first_launch,)
    carries_tile = carries_tile or tiles.find("add_carries", family(out.device), 4, dim)
    arguments = both | {"BLOCK_N": carries_tile.block_n, "BLOCK_D": carries_tile.block_d}
    grid = (blocks - 1) * cdiv(dim, carries_tile.block_d)
    return first_launch, Launch(add_carries_kernel, grid, arguments, options(carries_tile), out.device)
