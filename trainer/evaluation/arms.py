"""What a comparison compares: arms, each a change to one recipe.

All arms share surrogate, advantage, clip bounds, reduction and learning rate: they are EAPO's loss (docs/math.md E9, E10) with
another rule for the weight of the positive answers, so that nothing else can make the difference. A fixed weight is the
entropy ratio with the exponent 0. An answer is positive when its reward is above its group's mean, so graded rewards
will do; the methods of arXiv 2506.01347 themselves (``loss.method`` w_reinforce, nsr, psr) want rewards of 0 or 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from eapo_kernels import METHODS

from ..config import Config
from ..config.checks import check
from ..config.loss import EntropyWeightConfig
from ..errors import ConfigError

FIXED_WEIGHTS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"grpo": (1.0, 1.0), "w_reinforce": (0.1, 1.0), "nsr": (0.0, 1.0), "psr": (1.0, 0.0)}
)
"""Arm -> weight of the positive and of the negative answers."""

ARMS = ("eapo", *FIXED_WEIGHTS)
"""The paper's comparison."""


def arm_config(config: Config, arm: str, seed: int) -> Config:
    """The recipe of one run: ``config`` with the arm's weights, its seed, and a directory below ``<out>/<name>``.

    Another method of ``METHODS`` can be an arm too: then it is the library's method, with its own surrogate and numbers.

    Raises:
        ConfigError: an unknown arm, or a recipe whose method is not eapo.
    """
    known = (*ARMS, *(name for name in METHODS if name not in ARMS))
    check(arm in known, "--methods", f"names among {', '.join(known)}", arm)
    if config.loss.method != "eapo":
        raise ConfigError(
            f"loss.method: expected 'eapo' in the recipe of a comparison (its arms change it), got {config.loss.method!r}"
        )
    loss, weight = config.loss, config.eapo
    if arm in FIXED_WEIGHTS:
        positive, negative = FIXED_WEIGHTS[arm]
        weight = EntropyWeightConfig(kappa=0.0, scale=positive)
        loss = replace(loss, numbers={**loss.numbers, "negative_weight": negative})
    elif arm != "eapo":
        loss = replace(loss, method=arm, numbers={})
    return replace(config, out=f"{config.out}/{config.name}", name=run_name(arm, seed), seed=seed, loss=loss, eapo=weight)


def run_name(arm: str, seed: int) -> str:
    """The name of a run's directory; ``split_name`` reads it back."""
    return f"{arm}-seed{seed}"


def split_name(name: str) -> tuple[str, int] | None:
    """Arm and seed of a run's directory; None for another directory."""
    arm, found, seed = name.rpartition("-seed")
    return (arm, int(seed)) if found and arm and seed.isdecimal() else None


def planned(config: Config, arms: Sequence[str], seeds: Sequence[int]) -> list[Config]:
    """All runs, seed by seed: what is finished at any time holds every arm about equally often.

    Raises:
        ConfigError: as ``arm_config``; an empty or repeated name or seed.
    """
    check(len(arms) > 0 and len(set(arms)) == len(arms), "--methods", "at least one name, none twice", list(arms))
    check(len(seeds) > 0 and len(set(seeds)) == len(seeds), "--seeds", "at least one number, none twice", list(seeds))
    check(min(seeds) >= 0, "--seeds", "numbers of at least 0", list(seeds))
    return [arm_config(config, arm, seed) for seed in seeds for arm in arms]
