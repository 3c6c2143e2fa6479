"""Sections loss and eapo: the objective."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

import tyro

from eapo_kernels import METHODS, EAPOConfig, EntropyRatio, Method, get_method
from eapo_kernels.objectives.controllers import controller_fields

from ..hooks import HOOKS, RolloutHook, hook_numbers
from .checks import check, section


@dataclass(frozen=True)
class LossConfig:
    """The objective: a method of eapo_kernels, and changes to it (None keeps the method's own
    value).

    Every other number of the chosen method is a key of this section too: those of its token
    weights, its controller, its rollout hook and its configuration (``lambda_min`` for steer,
    ``target`` for aepo, ``kl_coef`` for any). docs/methods.md lists the methods.
    """

    method: str = "eapo"
    """A method of eapo_kernels.METHODS: eapo, grpo, dapo, steer, clip_cov, siren, aepo, cure and
    more (docs/methods.md)."""
    surrogate: str | None = None
    """ppo_clip, unclipped, balanced_clip, cispo, gspo or reinforce."""
    advantage: str | None = None
    """group_norm, group_mean, sign, batch_norm or binary."""
    reduction: str | None = None
    """token_mean, seq_mean_token_mean, seq_mean_token_sum or fixed_length (of
    rollout.max_new_tokens)."""
    clip_low: float | None = None
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float | None = None
    """The ratio is clipped above at 1 + clip_high."""
    entropy_coef: float | None = None
    """Weight of an entropy bonus (EAPO needs none)."""
    importance_cap: float | None = None
    """Truncated importance sampling: cap of exp(trainer's old log-prob - engine's log-prob)."""
    reference_ema: float | None = None
    """For a method with a KL penalty: after every step the reference weights become ema * reference
    + (1 - ema) * policy. 1 (the default except for t1, which has 0.99) keeps the initial policy."""
    gradient_tolerance: float | None = None
    """Leave the smallest probabilities out of the gradient: each token's error is at most this share of
    its gradient (docs/sparse.md). 0.002 is about the rounding of bf16. None: exact."""
    numbers: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Values that ``settings`` found under other keys of this section."""

    def __post_init__(self) -> None:
        check(self.method in METHODS, "loss.method", f"one of {', '.join(METHODS)}", self.method)
        ema = self.reference_ema
        check(ema is None or 0 <= ema <= 1, "loss.reference_ema", "a number in [0, 1]", ema)
        tolerance = self.gradient_tolerance
        check(tolerance is None or 0 < tolerance <= 0.5, "loss.gradient_tolerance", "a number in (0, 0.5]", tolerance)
        with section("loss"):
            self.build(fixed_length=1)
            self.hook()

    def build(self, fixed_length: int) -> Method:
        """The method with these changes. ``fixed_length`` is used by the reduction of that name
        only.
        """
        own = {name: getattr(self, name) for name in _LOSS_FIELDS if getattr(self, name) is not None}
        numbers = {name: value for name, value in self.numbers.items() if name not in hook_numbers(self.method)}
        weight = controller_fields("entropy_ratio")
        for name in numbers:
            elsewhere = METHODS[self.method].controller == "entropy_ratio" and name in weight
            check(not elsewhere, f"loss.{name}", f"{name} in the section eapo", self.numbers[name])
        return get_method(self.method, **{"fixed_length": fixed_length, **own, **numbers})

    def hook(self) -> RolloutHook:
        """A new rollout hook of the method."""
        own = hook_numbers(self.method)
        return HOOKS.get(self.method, RolloutHook)(**{k: v for k, v in self.numbers.items() if k in own})

    def reference_share(self) -> float:
        """``reference_ema``, or the method's default."""
        return self.reference_ema if self.reference_ema is not None else 0.99 if self.method == "t1" else 1.0


_LOSS_FIELDS = ("surrogate", "advantage", "reduction", "clip_low", "clip_high", "entropy_coef", "importance_cap")


def loss_numbers() -> frozenset[str]:
    """Keys of the section loss that are numbers of some method and not fields of ``LossConfig``."""
    names = {"positive_weight", *(item.name for item in fields(EAPOConfig))}
    for name, method in METHODS.items():
        names.update(hook_numbers(name))
        names.update(item.name for item in (fields(method.token_weighting) if method.token_weighting else ()))
        names.update(controller_fields(method.controller) if method.controller else ())
    return frozenset(names - {item.name for item in fields(LossConfig)})


@dataclass(frozen=True)
class EntropyWeightConfig:
    """Weight of the positive completions: clamp(scale * (H / H_0)^kappa, low, high) with H the
    policy's token entropy.
    """

    kappa: float = 1.0
    """Exponent of the entropy ratio."""
    scale: float = 1.0
    """Weight at the first step, where the ratio is 1."""
    low: float = 0.0
    """Smallest weight."""
    high: float = float("inf")
    """Largest weight."""
    ema: float = 0.0
    """Smoothing of H over steps: H <- ema * H + (1 - ema) * measured; 0 is none."""

    def __post_init__(self) -> None:
        with section("eapo"):
            EntropyRatio(**asdict(self))
