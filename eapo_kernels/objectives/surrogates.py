"""Policy surrogates: per-token terms to be *maximised*, as functions of the log-prob.

All tensors are [C] fp32. Each surrogate returns the term, differentiable in logp, and a bool tensor
that marks the tokens whose gradient the clip removed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 60.0
"""Log-ratios are clamped to +-60, so that exp stays finite in fp32. The gradient beyond is zero."""


class Clip(NamedTuple):
    """Bounds of the ratio, 1 - low and 1 + high (float or [C]); dual: lower bound dual * A for A < 0; score: of ``hapo``."""

    low: Any
    high: Any
    dual: float | None = None
    score: Tensor | None = None


Surrogate = Callable[[Tensor, Tensor, Tensor, Clip], tuple[Tensor, Tensor]]
"""(logp, log_ratio, advantages, clip) -> (term, clipped). ``log_ratio``: clamped, with gradient."""


def log_ratio(logp: Tensor, old_logp: Tensor | None) -> Tensor:
    """log(pi / pi_old), clamped; without an old policy zero with the gradient of logp."""
    old = logp.detach() if old_logp is None else old_logp
    return (logp - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def reinforce(logp: Tensor, log_ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """A * logp (Williams 1992). Ignores the old policy."""
    return advantages * logp, torch.zeros_like(logp, dtype=torch.bool)


def ppo_clip(logp: Tensor, log_ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) (arXiv 1707.06347; two bounds: DAPO, 2503.14476).

    With ``clip.dual`` c, the term of a negative advantage is bounded below by c * A (arXiv 1912.09729).
    """
    ratio = log_ratio.exp()
    term = ratio * advantages
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    clipped = bounded < term
    term = torch.where(clipped, bounded, term)
    if clip.dual is not None:
        floor = clip.dual * advantages
        under = (advantages < 0) & (term < floor)
        term, clipped = torch.where(under, floor, term), clipped | under
    return term, clipped


def unclipped(logp: Tensor, log_ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """rho A: no bounds (KL-Cov, arXiv 2505.22617, bounds the step by a penalty instead)."""
    return log_ratio.exp() * advantages, torch.zeros_like(logp, dtype=torch.bool)


def balanced_clip(logp: Tensor, log_ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """``ppo_clip`` but for A > 0 above the upper bound: there (1 + clip_high) rho / sg(rho) A, with a gradient
    (agentic entropy-balanced optimisation, arXiv 2510.14545).
    """
    term, clipped = ppo_clip(logp, log_ratio, advantages, clip)
    over = clipped & (advantages > 0)
    kept = (1 + clip.high) * (log_ratio - log_ratio.detach()).exp() * advantages
    return torch.where(over, kept, term), clipped & ~over


def cispo(logp: Tensor, log_ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """sg(clip(rho, 1 - clip_low, 1 + clip_high)) * A * logp: no token loses its gradient (arXiv 2506.13585)."""
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - clip.low, 1 + clip.high)
    return weight * advantages * logp, torch.zeros_like(logp, dtype=torch.bool)


def hapo(logp: Tensor, log_ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """``ppo_clip`` with bounds and advantages by the token's entropy score h in [-1, 1] (arXiv 2509.16591, eqs. 10 to 13).

    clip_high (1 + h) for h > 0, clip_low (1 - h) for h <= 0. The advantage is A (1 + h) where h > 0 and rho is beyond half
    of these bounds, or h <= 0 and rho is within; else A.
    """
    assert clip.score is not None
    low, high = clip.low * (1 - clip.score.clamp_max(0)), clip.high * (1 + clip.score.clamp_min(0))
    ratio = log_ratio.detach().exp()
    scaled = ((ratio > 1 - low / 2) & (ratio < 1 + high / 2)) == (clip.score <= 0)
    advantages = torch.where(scaled, (1 + clip.score) * advantages, advantages)
    return ppo_clip(logp, log_ratio, advantages, Clip(low, high, clip.dual))


_OWN = (reinforce, ppo_clip, unclipped, balanced_clip, cispo, hapo)
SURROGATES: MappingProxyType[str, Surrogate] = MappingProxyType({f.__name__: f for f in _OWN} | {"gspo": ppo_clip})
"""``gspo`` is ``ppo_clip`` of the sequence's mean ratio (arXiv 2507.18071, ``SEQUENCE_RATIO``)."""

SEQUENCE_RATIO = frozenset({"gspo"})
"""Surrogates whose log-ratio is averaged over the response before it is exponentiated."""


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log(pi / ref): unbiased; as a loss its gradient has expectation zero on-policy."""
    return logp - ref_logp


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(log(pi / ref))^2 / 2: as a loss its gradient is that of the true KL on-policy."""
    return 0.5 * (logp - ref_logp).square()


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """ref / pi - 1 - log(ref / pi) >= 0: unbiased, low variance (GRPO's)."""
    delta = (ref_logp - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(delta) - delta


KL_ESTIMATORS = MappingProxyType({"k1": kl_k1, "k2": kl_k2, "k3": kl_k3})
