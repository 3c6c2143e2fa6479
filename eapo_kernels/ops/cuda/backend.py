"""The ``cuda`` backend: the Triton backend with the two products of ``csrc`` in the place of their
Triton namesakes.

``stream_statistics`` computes the statistics, ``scaled_exp_gemm`` the first product of the
scaled-exponential form. Everything else, row kernels included, is Triton's.

The products compile for sm_90a without spills and give correct results on an emulator
(tests/emulator). "auto" takes them on a GPU for which ``selftest --tune`` found them right and faster
than Triton's.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..dispatch import Chunk, RowStatistics
from ..lm_head import Projection, describable
from ..triton import backend as triton_backend
from ..triton.common import capability
from ..triton.online_softmax import streamed
from ..triton.scaled_exp import ScaledExpChunk, ScaledExpKernels
from . import launch
from .build import BuildError, compiler
from .launch import OPERANDS, scaled_exp_gemm, scaled_exp_sums, stream_statistics

KERNELS = ScaledExpKernels(sums=scaled_exp_sums, product=scaled_exp_gemm)


def supports(projection: Projection) -> str | None:
    """Why the kernels cannot run these inputs, or None."""
    hidden, weight = projection.hidden, projection.weight
    if hidden.device.type != "cuda":
        return f"{hidden.device.type} tensors, where it needs an NVIDIA GPU of compute capability 9.0"
    reason = triton_backend.supports(projection)
    if reason is not None:
        return f"{reason} (its row kernels are Triton's)"
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
    """See ``Backend.statistics``. A row's bits do not depend on the other rows."""
    return streamed(
        stream_statistics, projection, targets, entropy=entropy, second_moments=second_moments, budget=budget
    )  # fmt: skip


def open_chunk(
    projection: Projection, targets: Tensor, *, entropy: bool, entropy_gradient: bool, logp_guess: Tensor | None = None
) -> Chunk:
    """See ``Backend.open_chunk``. Chunks of logits are Triton's."""
    if triton_backend.uses_logits(projection, entropy_gradient):
        return triton_backend.open_chunk(
            projection, targets, entropy=entropy, entropy_gradient=entropy_gradient, logp_guess=logp_guess
        )
    return ScaledExpChunk(projection, targets, logp_guess, entropy=entropy, kernels=KERNELS)


BACKEND = replace(triton_backend.BACKEND, name="cuda", supports=supports, statistics=statistics, open_chunk=open_chunk)
