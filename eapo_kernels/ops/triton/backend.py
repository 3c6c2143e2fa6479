"""The ``triton`` backend: supported inputs, and whether a chunk stores logits or exponentials.

The kernels are right in the interpreter and, as compiled, on an emulator (tests/emulator). "auto"
takes them on a GPU where the self-check finds them right (``ops.verdicts``).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..chunking import cdiv, padded
from ..dispatch import Backend, Chunk, LogitCotangents, RowStatistics, WeightedRows
from ..lm_head import Projection
from . import logit_grad, scaled_exp, sparse, tiles
from .common import INTERPRETED, capability, family, product_tile
from .compiling import compiled_together
from .online_softmax import stream_statistics, streamed

_opened: set[tuple[Any, ...]] = set()
"""Forms of scaled-exponential chunks of which one has been opened."""

_LEAST_BLOCK_V = 64  # columns of the narrowest tile of ``scaled_exp_gemm`` in the table


def supports(projection: Projection) -> str | None:
    """Why the kernels cannot run these inputs, or None."""
    device = projection.hidden.device
    if projection.hidden.dtype == torch.float64:
        return "float64 inputs, which only the torch backend takes"
    if device.type not in ("cuda", "cpu"):
        return f"{device.type} tensors, where it needs an NVIDIA GPU"
    if device.type == "cpu":
        return None if INTERPRETED else "CPU tensors without the interpreter (set TRITON_INTERPRET=1 before triton is imported)"
    if INTERPRETED:
        return "CUDA tensors under the interpreter (TRITON_INTERPRET=1), which is for CPU tensors"
    if torch.version.hip is not None:
        return "an AMD GPU, where its kernels have never been compiled"
    major, minor = capability(device)
    return None if major >= 8 else f"a GPU of compute capability {major}.{minor}, where it needs 8.0"


def uses_logits(projection: Projection, entropy_gradient: bool) -> bool:
    """Whether a chunk stores raw fp32 logits instead of scaled exponentials.

    The gradient of the entropy or of a soft-cap needs each logit, and fp32 logits become the
    gradient in place. Otherwise exponentials need half the memory and no pass over the chunk.
    """
    return entropy_gradient or projection.softcap is not None or projection.hidden.dtype == torch.float32


def statistics(projection: Projection, targets: Tensor, *, entropy: bool, second_moments: bool, budget: int) -> RowStatistics:
    """See ``Backend.statistics``. A row's bits do not depend on the other rows."""
    return streamed(stream_statistics, projection, targets, entropy=entropy, second_moments=second_moments, budget=budget)


def logit_gradient(
    out: Tensor, projection: Projection, targets: Tensor, columns: slice, statistics: RowStatistics, cotangents: LogitCotangents
) -> None:
    """See ``Backend.logit_gradient``. One launch."""
    logit_grad.logit_gradient(out, projection, targets, columns, statistics, cotangents)()


def open_chunk(
    projection: Projection, targets: Tensor, *, entropy: bool, entropy_gradient: bool, logp_guess: Tensor | None = None
) -> Chunk:
    """See ``Backend.open_chunk``. The first chunk of a form compiles its five launches side by side."""
    if uses_logits(projection, entropy_gradient):
        return logit_grad.LogitChunk(projection, targets, entropy=entropy or entropy_gradient)
    p = projection
    given = (p.bias is None, p.row_inv_temperature is None, logp_guess is None, entropy)
    form = (p.hidden.device, p.hidden.dtype, p.dim, p.vocab, *given)
    first = not INTERPRETED and form not in _opened and p.shard is None  # ranks exchange sums between the launches
    with compiled_together(launch=True) if first else contextlib.nullcontext():
        chunk = scaled_exp.ScaledExpChunk(projection, targets, logp_guess, entropy=entropy)
    _opened.add(form)
    return chunk


def chunk_row_bytes(projection: Projection, entropy_gradient: bool) -> int:
    """Exponentials, or fp32 logits and (if not fp32) their gradient; and the tiles' partial sums.

    On a split head it is the same on all ranks, although their tiles may differ.
    """
    dtype, vocab = projection.operand_dtype, projection.max_shard_vocab
    if not uses_logits(projection, entropy_gradient):
        block = product_tile("scaled_exp_gemm", projection).block_v if projection.shard is None else _LEAST_BLOCK_V
        return padded(vocab) * dtype.itemsize + 8 * cdiv(vocab, block)
    sums = 16 * cdiv(vocab, tiles.find("row_statistics", family(projection.hidden.device), 4).block_v)
    return padded(vocab) * (4 if dtype == torch.float32 else 4 + dtype.itemsize) + sums


def add_rows(out: Tensor, first: int, entries: WeightedRows) -> None:
    """See ``Backend.add_rows``. At most two launches."""
    if entries.keys.numel():
        for launch in sparse.add_rows(out, first, entries):
            launch()


def logits_at(projection: Projection, rows: Tensor, ids: Tensor) -> Tensor:
    """See ``Backend.logits_at``. One launch. The bits of an entry depend on its two rows alone."""
    launch, out = sparse.logits_at(projection, rows, ids)
    if rows.numel():
        launch()
    return out


BACKEND = Backend(
    name="triton", supports=supports, statistics=statistics, logit_gradient=logit_gradient,
    slab_bytes=lambda projection: projection.operand_dtype.itemsize, open_chunk=open_chunk, chunk_row_bytes=chunk_row_bytes,
    add_rows=add_rows, logits_at=logits_at,
)  # fmt: skip
