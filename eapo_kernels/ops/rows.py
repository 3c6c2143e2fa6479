"""Rows that count. A row is left out when its target is -100 or its mask is False; it costs nothing and returns zeros."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..types import Options

_MOVED_AT_ONCE = 16


def resolve_compaction(options: Options, like: Tensor, announced: bool) -> Options:
    """The options with ``compact`` decided. announced: the caller says that some rows do not count."""
    return options if options.compact != "auto" else replace(options, compact=announced or not like.is_cuda)


def may_compact(tensor: Tensor, compact: bool | str) -> bool:
    """Compaction reads a count on the host, which a CUDA graph under capture does not allow."""
    assert isinstance(compact, bool), "resolve_compaction first"
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


def fill_holes_(matrix: Tensor, live: Tensor) -> Tensor:
    """Move the rows of ``matrix`` [C, K] that are ``live`` [C] to its front, each at most once; returns their old places [L].

    Only rows behind the first L move, into the places of dead ones, a few at a time, so that it costs no second matrix.
    Synchronises on CUDA.
    """
    count = int(live.sum())
    order = torch.arange(len(live), device=live.device)
    holes = (~live[:count]).nonzero().squeeze(1)
    movers = live[count:].nonzero().squeeze(1) + count
    for some_holes, some_movers in zip(holes.split(_MOVED_AT_ONCE), movers.split(_MOVED_AT_ONCE), strict=True):
        matrix[some_holes] = matrix[some_movers]
    order[holes] = movers
    return order[:count]
