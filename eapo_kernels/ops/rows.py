"""Rows that count. A row is left out when its target is -100 or its mask is False; it costs nothing and returns zeros."""

from __future__ import annotations

import torch
from torch import Tensor


def may_compact(tensor: Tensor, compact: bool) -> bool:
    """Compaction reads a count on the host, which a CUDA graph under capture does not allow."""
    return compact and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def valid_index(valid: Tensor) -> Tensor | None:
    """Indices [M] of the rows that count, or None when all do. Synchronises on CUDA."""
    index = valid.nonzero().squeeze(1)
    return None if index.numel() == valid.numel() else index


def scatter_rows(values: Tensor, index: Tensor | None, n_rows: int) -> Tensor:
    """Undo the compaction: zeros [n_rows, ...] with ``values`` [M, ...] at ``index``."""
    if index is None:
        return values
    out = values.new_zeros((n_rows, *values.shape[1:]))
    return out.index_copy_(0, index, values)
