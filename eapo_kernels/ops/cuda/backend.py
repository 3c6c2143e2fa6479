"""The ``cuda`` backend: the streamed statistics and the scaled-exponential form's forward by the kernels in ``csrc``.

Triton's are what ``csrc/README.md`` says nothing can be won with: rows that are redone, the targets' rows of d_weight; and all
that recomputes or keeps logits.

Compiled for sm_90a without spills, right on an emulator (tests/emulator), but not yet run on a GPU:
``plans.PROVEN`` does not list it, so "auto" does not choose it. Ask for it by name.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..backend import Chunk
from ..projection import Projection
from ..statistics import RowStatistics
from ..triton import backend as triton_backend
from ..triton.launch import capability, describable
from ..triton.one_pass import ScaledExpChunk, ScaledExpKernels, form
from . import launch
from .build import BuildError, compiler
from .products import OPERANDS, exp_sums, scaled_exp_gemm, stream_statistics
from .rows import finalize, row_offsets, scaled_exp_finalize

KERNELS = ScaledExpKernels(exp_sums, row_offsets, scaled_exp_gemm, scaled_exp_finalize)


def supports(projection: Projection) -> str | None:
    """Why the kernels cannot run these inputs, or None."""
    hidden, weight = projection.hidden, projection.weight
    if hidden.device.type != "cuda":
        return f"{hidden.device.type} tensors, where it needs an NVIDIA GPU of compute capability 9.0"
    reason = triton_backend.supports(projection)
    if reason is not None:
        return f"{reason} (some of its steps are Triton kernels)"
    if capability(hidden.device) != (9, 0):
        major, minor = capability(hidden.device)
        return f"a GPU of compute capability {major}.{minor}, where it needs 9.0"
    if hidden.dtype not in OPERANDS:
        return f"{str(hidden.dtype).removeprefix('torch.')} inputs, where it multiplies bfloat16 and float16"
    if projection.shard is not None:
        return "a head split over processes"
    if projection.softcap is not None:
        return "a soft-cap, which its epilogue does not compute"
    for name, matrix in (("hidden", hidden), ("weight", weight)):
        if not describable(matrix):
            got = f"{name} {list(matrix.shape)} with strides {matrix.stride()}"
            return f"{got}, where TMA needs contiguous, aligned rows a multiple of 8 elements apart"
    try:
        compiler()
    except BuildError as error:
        return str(error).splitlines()[0]
    return launch.refusal()


def statistics(projection: Projection, targets: Tensor, *, entropy: bool, second_moments: bool, budget: int) -> RowStatistics:
    """See ``backend.Statistics``. Two launches: the stream over the vocabulary, and ``finalize``."""
    first, sums = stream_statistics(projection, targets, entropy=entropy, second_moments=second_moments, budget=budget)
    first()
    last, final = finalize(sums)
    last()
    return final.statistics


def open_chunk(
    projection: Projection, targets: Tensor, *, entropy: bool, entropy_gradient: bool, logp_guess: Tensor | None = None
) -> Chunk:
    """See ``backend.OpenChunk``. The scaled-exponential form's chunks are ours but for rows that are redone; chunks of logits are Triton's."""
    if form(projection, entropy_gradient).name == "logits":
        return triton_backend.open_chunk(
            projection, targets, entropy=entropy, entropy_gradient=entropy_gradient, logp_guess=logp_guess
        )
    return ScaledExpChunk(projection, targets, logp_guess, entropy=entropy, kernels=KERNELS)


BACKEND = replace(triton_backend.BACKEND, name="cuda", supports=supports, statistics=statistics, open_chunk=open_chunk)
