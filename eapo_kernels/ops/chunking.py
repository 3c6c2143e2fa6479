"""Byte budgets, chunk sizes and plans as functions of shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import require
from ..types import Options

RECOMPUTE_BUDGET = 96 * 2**20
"""Default budget of plan "recompute": less than 0.25 GiB at N = D = 4096 for any V, including fp32
d_hidden and a slab of d_weight."""

_ROW_ALIGNMENT, _COLUMN_ALIGNMENT = 64, 256
_MIN_SLAB = 2048


def default_budget(device_bytes: int | None) -> int:
    """Default bytes of logit-sized workspace: 512 MiB on a CPU (``device_bytes`` None).

    On an accelerator a 32nd of its memory, between 256 MiB and 2 GiB: each chunk after the first adds
    to d_weight in fp32, 8VD bytes beside 6CVD operations, so chunks of 1024 rows are too small
    (docs/plans.md). Rounded down to a power of two: devices of one model differ a little in memory,
    and the ranks of a split head must cut the same chunks.
    """
    if device_bytes is None:
        return 2**29
    share = 1 << max(device_bytes // 32, 1).bit_length() - 1
    return min(max(share, 2**28), 2**31)


def workspace_bytes(options: Options, device: torch.device) -> int:
    """``Options.memory_budget``, or the default of plan and device. Does not synchronize."""
    if options.memory_budget is not None:
        return options.memory_budget
    if options.plan == "recompute":
        return RECOMPUTE_BUDGET
    return default_budget(torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def padded(columns: int) -> int:
    """Row stride of a block of logits: a multiple of 16 elements, not counted in the memory budget.

    Kernels then load vectors, and library products use tensor cores for any V.
    """
    return cdiv(columns, 16) * 16


def row_chunk(n_rows: int, bytes_per_row: int, budget: int) -> int:
    """Rows of nearly equal, aligned chunks within the budget; EapoError if one row does not fit."""
    fit = budget // max(bytes_per_row, 1)
    require(fit >= 1, "Options.memory_budget", f"at least {bytes_per_row} bytes, the workspace of one row", budget)
    if fit >= n_rows:
        return max(n_rows, 1)
    if fit >= _ROW_ALIGNMENT:
        fit -= fit % _ROW_ALIGNMENT
    return _even_part(n_rows, fit, _ROW_ALIGNMENT)


def _even_part(total: int, fit: int, alignment: int) -> int:
    """Size, at most ``fit``, of the fewest parts of ``total`` that are nearly equal and aligned."""
    parts = cdiv(total, fit)
    return min(fit, cdiv(total, parts * alignment) * alignment)


@dataclass(frozen=True)
class Plan:
    """The chunks of a schedule.

    name: "one_chunk": all rows at once. "chunks": one pass in chunks of rows. "recompute":
    statistics in the forward, logits recomputed in the backward.
    """

    name: str
    rows: int  # of a chunk (one pass), or whose logit gradient the forward saves (autograd: all or 0)
    products: int  # matrix products of 2NDV operations in forward and backward, for both gradients


def one_pass(n_rows: int, bytes_per_row: int, budget: int, wanted: str = "auto") -> Plan:
    """The plan of the one-pass schedule. ``wanted``: see ``Options.plan``.

    Raises EapoError if one row, or the wanted plan, does not fit, or if that is another schedule's.
    """
    require(wanted != "recompute", "Options.plan", "auto, one_chunk or chunks with the one-pass schedule", repr(wanted))
    rows = row_chunk(n_rows, bytes_per_row, budget)
    _require_one_chunk(wanted, n_rows * bytes_per_row, budget)
    if wanted == "chunks" and rows >= n_rows > 1:
        rows = cdiv(n_rows, 2)
    return Plan("one_chunk" if rows >= n_rows else "chunks", rows, 3)


def autograd(n_rows: int, bytes_per_row: int, budget: int, wanted: str = "auto") -> Plan:
    """The plan of ``token_stats``: its forward saves the logit gradient of all rows or of none.

    ``wanted``: see ``Options.plan``. Raises EapoError if "one_chunk" does not fit.
    """
    _require_one_chunk(wanted, n_rows * bytes_per_row, budget)
    save = n_rows > 0 and n_rows * bytes_per_row <= budget and wanted != "recompute"
    return Plan("one_chunk", n_rows, 3) if save else Plan("recompute", 0, 4)


def _require_one_chunk(wanted: str, needed: int, budget: int) -> None:
    if wanted == "one_chunk":
        require(needed <= budget, "Options.memory_budget", f"at least {needed} bytes for plan 'one_chunk'", budget)


def weight_slab(vocab: int, dim: int) -> int:
    """Columns of a slab of d_weight that is summed in fp32 and then rounded: 64 MiB."""
    return min(vocab, max(_MIN_SLAB, 2**24 // max(dim, 1) // _COLUMN_ALIGNMENT * _COLUMN_ALIGNMENT))


def slab(n_rows: int, vocab: int, bytes_per_logit: int, budget: int) -> tuple[int, int]:
    """(rows, columns) of a block of logits in the budget: many rows, but at least 2048 columns."""
    width = min(vocab, _MIN_SLAB, max(budget // bytes_per_logit, 1))
    rows = row_chunk(n_rows, width * bytes_per_logit, budget)
    columns = budget // (rows * bytes_per_logit)
    if columns >= vocab:
        return rows, vocab
    columns = max(columns - columns % _COLUMN_ALIGNMENT, width)
    return rows, _even_part(vocab, columns, _COLUMN_ALIGNMENT)
