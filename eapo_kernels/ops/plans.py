"""How the work is cut: pure functions from shapes and a byte budget to chunk sizes, and what is proven where."""

from __future__ import annotations

from ..errors import require

PROVEN = frozenset({("cpu", "torch", "autograd"), ("cpu", "torch", "one_pass"), ("cuda", "torch", "autograd")})
"""(device type, backend, schedule) that "auto" may choose: each needs a committed result from that hardware, except
("cuda", "torch", "autograd"), which is plain PyTorch and what a caller without this package would write."""

_ROW_ALIGNMENT = 64
_COLUMN_ALIGNMENT = 256
_MIN_SLAB = 2048


def padded(columns: int) -> int:
    """Row stride of a block of logits: a multiple of 16 elements, so that kernels load vectors and the library's products take
    the block on tensor cores whatever V is. Adds less than 16 columns to the memory budget."""
    return -(-columns // 16) * 16


def row_chunk(n_rows: int, bytes_per_row: int, budget: int) -> int:
    """Rows per chunk so that a chunk stays within the budget, in nearly equal aligned chunks.

    Raises EapoError when not even one row fits.
    """
    fit = budget // max(bytes_per_row, 1)
    require(fit >= 1, "Options.memory_budget", f"at least {bytes_per_row} bytes, the workspace of one row", budget)
    if fit >= n_rows:
        return max(n_rows, 1)
    if fit >= _ROW_ALIGNMENT:
        fit -= fit % _ROW_ALIGNMENT
    chunks = -(-n_rows // fit)
    even = -(-n_rows // chunks)
    return min(fit, -(-even // _ROW_ALIGNMENT) * _ROW_ALIGNMENT)


def kept_rows(n_rows: int, bytes_per_row: int, budget: int) -> int:
    """Rows whose gradient matrix the op's forward keeps for its backward, which then need not recompute them.

    All when they fit the budget, else as many as half of it holds: the other half remains the workspace.
    """
    if n_rows * bytes_per_row <= budget:
        return n_rows
    fit = budget // 2 // max(bytes_per_row, 1)
    return fit - fit % _ROW_ALIGNMENT


def columns_at_once(vocab: int, dim: int) -> int:
    """Columns of a slab where no logits are recomputed: 64 MiB of the fp32 rows of d_weight that are then rounded."""
    return min(vocab, max(_MIN_SLAB, 2**24 // max(dim, 1) // _COLUMN_ALIGNMENT * _COLUMN_ALIGNMENT))


def slab(n_rows: int, vocab: int, bytes_per_logit: int, budget: int) -> tuple[int, int]:
    """(rows, columns) of a block of logits within the budget: as many rows as leave slabs of a useful width."""
    width = min(vocab, _MIN_SLAB, max(budget // bytes_per_logit, 1))
    rows = row_chunk(n_rows, width * bytes_per_logit, budget)
    columns = budget // (rows * bytes_per_logit)
    if columns >= vocab:
        return rows, vocab
    columns = max(columns - columns % _COLUMN_ALIGNMENT, width)
    slabs = -(-vocab // columns)
    even = -(-vocab // slabs)
    return rows, min(columns, -(-even // _COLUMN_ALIGNMENT) * _COLUMN_ALIGNMENT)
