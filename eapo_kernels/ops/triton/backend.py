"""The ``triton`` backend: streaming statistics, recomputed slabs, one-pass chunks and a fused surrogate, as Triton kernels.

Correct in the interpreter, compiled for sm_80, sm_90 and sm_100 without spills, their code right on an emulator
(tests/emulator), but not yet run on a GPU: ``plans.PROVEN`` does not list it, so "auto" does not choose it. Ask for it by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend, LogitCotangents, TargetRows
from ..projection import Projection
from ..statistics import RowStatistics
from . import backward, target_rows
from .finalize import finalize
from .forward import stream_statistics
from .launch import INTERPRETED, capability
from .one_pass import chunk_row_bytes, open_chunk, surrogate


def supports(projection: Projection) -> str | None:
    """Why the kernels cannot run these inputs, or None."""
    device, dtype = projection.hidden.device, projection.hidden.dtype
    if dtype == torch.float64:
        return "float64 inputs, which only the torch backend takes"
    if device.type not in ("cuda", "cpu"):
        return f"{device.type} tensors, where it needs an NVIDIA GPU"
    if device.type == "cpu":
        return None if INTERPRETED else "CPU tensors without the interpreter (set TRITON_INTERPRET=1 before triton is imported)"
    if INTERPRETED:
        return "CUDA tensors under the interpreter (TRITON_INTERPRET=1), which is for CPU tensors"
    if torch.version.hip is not None:
        return "an AMD GPU, where its kernels have never been compiled"
    if capability(device) < (8, 0):
        major, minor = capability(device)
        return f"a GPU of compute capability {major}.{minor}, where it needs 8.0"
    return None


def statistics(projection: Projection, targets: Tensor, *, entropy: bool, second_moments: bool, budget: int) -> RowStatistics:
    """See ``backend.Statistics``. Two launches: the stream over the vocabulary, and ``finalize``."""
    launch, sums = stream_statistics(projection, targets, entropy=entropy, second_moments=second_moments, budget=budget)
    launch()
    launch, final = finalize(sums.whole(projection.shard, targets))
    launch()
    return final.statistics


def logit_gradient(
    out: Tensor,
    projection: Projection,
    targets: Tensor,
    columns: slice,
    statistics: RowStatistics,
    cotangents: LogitCotangents,
    gain: Tensor | None,
) -> None:
    """See ``backend.LogitGradient``. One launch."""
    backward.logit_gradient(out, projection, targets, columns, statistics, cotangents, gain)()


def add_target_rows(out: Tensor, first: int, rows: TargetRows) -> None:
    """See ``backend.Backend``. One launch."""
    if rows.targets.numel():
        target_rows.add_target_rows(out, first, rows)()


BACKEND = Backend(
    name="triton",
    supports=supports,
    statistics=statistics,
    logit_gradient=logit_gradient,
    slab_bytes=lambda projection: projection.operand_dtype.itemsize,
    open_chunk=open_chunk,
    chunk_row_bytes=chunk_row_bytes,
    add_target_rows=add_target_rows,
    surrogate=surrogate,
)
