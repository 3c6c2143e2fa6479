"""Sections loss and eapo: the objective."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from ..errors import ConfigError, check
from .section import Count, Decay, NonNegative, Positive, Section, Share, unknown

if TYPE_CHECKING:
    from eapo_kernels import Method


class LossConfig(Section):
    """The objective: a method of eapo_kernels, and changes to it (None keeps the method's own value).

    Every other number of the chosen method is a key of this section too: those of its token weights, its controller and
    its configuration (``lambda_min`` for steer, ``target`` for aepo, ``kl_coef`` for any). docs/methods.md
    lists the methods.
    """

    model_config = ConfigDict(extra="allow")

    method: str = "eapo"
    """A method of eapo_kernels.METHODS: eapo, grpo, dapo, steer, clip_cov, siren, aepo, cure and more (docs/methods.md)."""
    surrogate: str | None = None
    """ppo_clip, unclipped, balanced_clip, cispo, gspo or reinforce."""
    advantage: str | None = None
    """group_norm, group_mean, sign, batch_norm or binary."""
    reduction: str | None = None
    """token_mean, seq_mean_token_mean, seq_mean_token_sum or fixed_length (of rollout.max_new_tokens)."""
    clip_low: Share | None = None
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegative | None = None
    """The ratio is clipped above at 1 + clip_high."""
    entropy_coef: float | None = None
    """Weight of an entropy bonus (EAPO needs none)."""
    importance_cap: Positive | None = None
    """Truncated importance sampling: cap of exp(trainer's old log-prob - engine's log-prob)."""
    reference_ema: Share | None = None
    """For a method with a KL penalty: after every step the reference weights become ema * reference + (1 - ema) * policy. 1
    (the default except for t1, which has 0.99) keeps the initial policy."""
    gradient_tolerance: Annotated[float, Field(gt=0, le=0.5)] | None = None
    """Leave the smallest probabilities out of the gradient: each token's error is at most this share of its gradient
    (docs/sparse.md). 0.002 is about the rounding of bf16. None: exact."""

    @model_validator(mode="before")
    @classmethod
    def _numbers_of_text(cls, table: Any) -> Any:
        """Values of a method's own numbers, which have no type here: a flag's text as TOML reads it."""
        if not isinstance(table, dict):
            return table
        return {k: v if k in cls.model_fields or not isinstance(v, str) else _value(v) for k, v in table.items()}

    @property
    def numbers(self) -> dict[str, Any]:
        """The method's own numbers that were set."""
        return self.model_extra or {}

    def check(self) -> None:
        """Raise ConfigError for an unknown method, or a number that it does not have or refuses."""
        from eapo_kernels import METHODS, EAPOConfig
        from eapo_kernels.objectives.controllers import controller_fields

        check(self.method in METHODS, "loss.method", f"one of {', '.join(METHODS)}", self.method)
        method = METHODS[self.method]
        known = ["positive_weight"]
        for owner in (EAPOConfig, method.token_weighting or ()):
            known += getattr(owner, "__dataclass_fields__", ())
        weight = controller_fields(method.controller) if method.controller else ()
        for name in self.numbers:
            in_eapo = method.controller == "entropy_ratio" and name in weight
            check(not in_eapo, f"loss.{name}", f"{name} in the section eapo", self.numbers[name])
            if name not in (*known, *weight):
                raise ConfigError(unknown(["loss", name], list(dict.fromkeys([*LossConfig.model_fields, *known, *weight]))))
        with _prefixed("loss"):
            self.build(fixed_length=1)

    def build(self, fixed_length: int) -> Method:
        """The method with these changes. ``fixed_length`` is used by the reduction of that name
        only.
        """
        from eapo_kernels import get_method

        own = self.model_dump(exclude={"method", "reference_ema", "gradient_tolerance"})
        given = {name: value for name, value in own.items() if value is not None or name in self.numbers}
        return get_method(self.method, **{"fixed_length": fixed_length, **given})

    def reference_share(self) -> float:
        """``reference_ema``, or the method's default."""
        return self.reference_ema if self.reference_ema is not None else 0.99 if self.method == "t1" else 1.0


class EntropyWeightConfig(Section):
    """Weight of the positive completions: clamp(scale * (H / H_0)^kappa, low, high) with H the policy's token entropy.

    The defaults keep the noise of the step's questions out of the weight (docs/training.md). The paper's weight is ema 0,
    low 0, high inf, anchor_steps 1.
    """

    kappa: float = 1.0
    """Exponent of the entropy ratio."""
    scale: NonNegative = 1.0
    """Weight in the anchor steps, where the ratio is 1."""
    low: NonNegative = 0.2
    """Smallest weight."""
    high: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 5.0
    """Largest weight."""
    ema: Decay = 0.9
    """Smoothing of H over steps: H <- ema * H + (1 - ema) * measured; 0 is none."""
    anchor_steps: Count = 10
    """H_0 is the mean of H over this number of first steps."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check(self.low <= self.high, "low", f"at most high ({self.high:g})", self.low)
        return self


@contextmanager
def _prefixed(section: str) -> Iterator[None]:
    """Prefix the section's name to errors of the library's own checks."""
    from eapo_kernels import EapoError

    try:
        yield
    except EapoError as error:
        raise ConfigError(f"{section}.{error}") from None


def _value(text: str) -> Any:
    """A number, true or false as TOML writes it; None; else the text."""
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, (int, float)) else text
