"""Every CUDA kernel once on inputs of any shape, and what comes out beside the truth in float64. Nothing is timed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from eapo_kernels import reference
from eapo_kernels.ops.cuda import launch as cuda_launch
from eapo_kernels.ops.cuda.launch import Launch
from eapo_kernels.ops.dispatch import RowStatistics
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.ops.triton import online_softmax as triton_forward
from eapo_kernels.ops.triton import scaled_exp as triton_scaled_exp_gemm
from eapo_kernels.ops.triton.common import workspace
from eapo_kernels.ops.triton.online_softmax import finalize
from eapo_kernels.ops.triton.scaled_exp import ScaledExpSums, row_offsets, scaled_exp_finalize, window
from eapo_kernels.testing import make_inputs

FLOOR = {torch.float32: 4e-5, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
"""Allowed difference from float64, of the largest value: sums in fp32, and E rounded to its dtype (after offsets in fp32)."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Results = Iterator[tuple[str, Tensor, Tensor]]
"""(name, result, truth)."""


class Inputs:
    """Operands [N, D] x [V, D] with a temperature a row, and the truth in float64."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: str, *, bias: bool) -> None:
        made = make_inputs(*shape, dtype=dtype, bias=bias, device=device)
        g = torch.Generator().manual_seed(3)
        temperature = (0.5 + torch.rand(shape[0], generator=g)).to(device)
        self.targets, self.exact = made.targets, made.to(torch.float64)
        self.projection = Projection(
            made.hidden.detach(), made.weight.detach(), None if made.bias is None else made.bias.detach(),
            row_inv_temperature=temperature,
        )  # fmt: skip
        self._scaled = {"bias": self.exact.bias, "inv_temperature": temperature.double()}

    @cached_property
    def truth(self) -> reference.TokenStats:
        return reference.token_stats(self.exact.hidden, self.exact.weight, self.targets, second_moments=True, **self._scaled)

    @property
    def logp_guess(self) -> Tensor:
        """[N] fp32, log-probs of an old policy."""
        return self.truth.logp.float() + 0.3

    def exponentials(self, sums: ScaledExpSums) -> Tensor:
        """[N, V] float64: E with these offsets, 0 at the targets."""
        z = reference.logits(self.exact.hidden, self.exact.weight, **self._scaled)
        bits = z / math.log(2) - sums.offsets[0].double().unsqueeze(1)
        return bits.exp2_().scatter_(1, self.targets.unsqueeze(1), 0.0)

    def statistics(self, got: RowStatistics) -> Results:
        for name in ("logp", "entropy", "lse", "p2", "p2_logp", "varentropy"):
            value = getattr(got, name)
            if value is not None:
                yield name, value, getattr(self.truth, name)


@torch.no_grad()
def check(item: Build, shape: tuple[int, int, int], device: str) -> str | None:
    """How the results are wrong, or None. NaN is wrong, and so is a single bit between two runs."""
    for name, got, truth in results(item, shape, device):
        error = float(torch.where(got == truth, 0.0, (got.double() - truth).abs()).max())  # a range may have the maximum -inf
        allowed = 0.0 if name.startswith("output") else FLOOR[got.dtype] * float(truth.abs().max())
        if not error <= allowed:
            return f"{name}: off by {error:.2e}, allowed {allowed:.2e}"
    return None


def results(item: Build, shape: tuple[int, int, int], device: str) -> Results:
    """Run a kernel twice and yield what comes out; the kernels before and after it are Triton's."""
    case = Inputs(shape, _DTYPES[item.operand], device, bias=item.bias)
    p, targets = case.projection, case.targets
    if item.kernel == "stream_statistics":
        launch, sums = cuda_launch.stream_statistics(
            p, targets, entropy=item.entropy, second_moments=item.second_moments, budget=2**30, tile=item.tile
        )
        assert launch.build == item
        yield from _twice(launch, sums.values)
        last, final = finalize(sums)
        last()
    else:
        exp = cuda_launch.scaled_exp_sums(p, item.entropy, item.tile)
        row_offsets(p, targets, case.logp_guess, exp)()
        matrix = workspace(p, p.hidden.dtype)
        launch = cuda_launch.scaled_exp_gemm(p, targets, exp, matrix, tile=item.tile)
        assert launch.build == item
        yield from _twice(launch, exp.values, matrix)
        yield "E", matrix, case.exponentials(exp)
        last, final, _ = scaled_exp_finalize(p, exp)
        last()
    yield from case.statistics(final.statistics)


def _twice(launch: Launch, *written: Tensor | None) -> Results:
    """The second run's outputs beside the first one's; they are NaN before each."""
    runs = []
    for _ in range(2):
        for tensor in written:
            assert tensor is not None
            tensor.fill_(torch.nan)
        launch()
        runs.append([tensor.clone() for tensor in written if tensor is not None])
    for number, (a, b) in enumerate(zip(*runs, strict=True)):
        yield f"output {number} of the second run", b, a.double()
