"""Random inputs, a plain PyTorch implementation, and a comparison with its rounding error.

The tests and the benchmarks share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from . import reference
from .types import IGNORE_INDEX, TokenStats


@dataclass(frozen=True)
class Inputs:
    """hidden [N, D], weight [V, D], targets [N] int64, and optionally bias [V]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype; targets stay."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def leaves(self) -> list[Tensor]:
        """hidden, weight (and bias), made to require gradients."""
        tensors = [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])
        return [t.requires_grad_() for t in tensors]


def make_inputs(
    n: int,
    d: int,
    v: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    peaked: bool = True,
    bias: bool = False,
    device: str | torch.device = "cpu",
) -> Inputs:
    """Random inputs; the same seed on the same kind of device gives the same numbers.

    With ``peaked`` the logits resemble a language model's: a background of standard deviation 3 and
    one token per row that is U(0, 16) nats above it. The target is that token in four of five rows,
    else a random one, so log-probs and entropies vary widely. Otherwise the standard deviation is
    0.1 and the entropies are close to log V.
    """
    draw: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    weight = torch.randn(v, d, **draw) / math.sqrt(d)
    hidden = torch.randn(n, d, **draw) * (3.0 if peaked else 0.1)
    targets = torch.randint(v, (n,), **draw)
    if peaked:
        direction = weight[targets]
        height = 16 * torch.rand(n, 1, **draw)
        hidden = hidden + height * direction / direction.square().sum(1, keepdim=True)
        surprised = torch.rand(n, **draw) < 0.2
        targets = torch.where(surprised, torch.randint(v, (n,), **draw), targets)
    offset = torch.randn(v, **draw) if bias else None
    return Inputs(hidden, weight, targets, offset).to(dtype)


def eager_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    mask: Tensor | None = None,
    second_moments: bool = False,
    added: Tensor | float = 0.0,
) -> TokenStats:
    """Plain PyTorch: logits in the inputs' dtype, widened to fp32, log_softmax, autograd.

    added: to the logits at the end, such as -inf where a token may not count.
    """
    z = F.linear(hidden, weight, bias)
    z = z.float() if z.dtype != torch.float64 else z
    if logit_scale is not None:
        z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z * (
        inv_temperature.unsqueeze(-1) if isinstance(inv_temperature, Tensor) and inv_temperature.dim() else inv_temperature
    )
    z = z + added
    valid = targets != IGNORE_INDEX
    if mask is not None:
        valid = valid & mask
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    plogp = torch.where(p > 0, p * log_p, 0.0)
    logp = log_p.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    entropy = -plogp.sum(-1)
    p2 = p2_logp = varentropy = None
    if second_moments:
        p2, p2_logp = (p * p).sum(-1) * valid, (p * plogp).sum(-1) * valid
        varentropy = (torch.where(p > 0, plogp * log_p, 0.0).sum(-1) - entropy.square()) * valid
    lse = torch.logsumexp(z, -1) * valid
    return TokenStats(torch.where(valid, logp, 0.0), torch.where(valid, entropy, 0.0), lse, p2, p2_logp, varentropy)


def assert_no_worse_than(
    actual: Tensor, eager: Tensor, exact: Tensor, *, floor: float, factor: float = 2.0, name: str = "value"
) -> None:
    """Assert that max and RMS error are at most ``factor`` times those of ``eager`` plus ``floor``.

    Args:
        actual: the result under test.
        eager: plain PyTorch's result in the same dtype.
        exact: the float64 oracle's result on the same inputs.
        floor: noise floor relative to the largest and the RMS magnitude of ``exact``.

    Infinities must be at the same places with the same sign; a NaN fails.
    """
    assert actual.shape == exact.shape, f"{name}: expected shape {list(exact.shape)}, got {list(actual.shape)}"
    actual, eager, exact = (t.detach().double().cpu() for t in (actual, eager, exact))
    finite = exact.isfinite()
    assert torch.equal(actual[~finite], exact[~finite]), f"{name}: infinities differ from the oracle's"
    actual, eager, exact = actual[finite], eager[finite], exact[finite]
    assert actual.isfinite().all(), f"{name}: {int((~actual.isfinite()).sum())} non-finite values where the oracle has none"
    if exact.numel() == 0:
        return
    for norm, reduce in (("max", lambda t: t.abs().max()), ("rms", lambda t: t.square().mean().sqrt())):
        error, allowed = float(reduce(actual - exact)), float(factor * reduce(eager - exact) + floor * reduce(exact))
        assert error <= allowed, f"{name}: {norm} error {error:.3e}, allowed {allowed:.3e} ({factor} x eager + floor)"


def oracle_token_stats(inputs: Inputs, **options: Any) -> TokenStats:
    """``reference.token_stats`` in float64 on the same numbers."""
    wide = inputs.to(torch.float64)
    if isinstance(options.get("inv_temperature"), Tensor):
        options["inv_temperature"] = options["inv_temperature"].double()
    return reference.token_stats(wide.hidden, wide.weight, wide.targets, bias=wide.bias, **options)


def peak_memory(function: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Peak bytes of tensors during ``function()``, beyond those allocated before.

    Measured by the allocator on CUDA, by the profiler's memory events on the CPU.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
