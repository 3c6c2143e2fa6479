"""Statistics of the comparison: intervals over seeds and prompts, and two runs read at equal
reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.diversity import Estimate

Numbers = NDArray[np.float64]

SMOOTHING = 5
"""Steps of the centred moving mean behind "at equal reward"."""

LEVELS = 21
"""Rewards, equally far apart, of the mean over equal rewards."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        arm, seed: which.
        curves: metric -> [steps].
        evaluations: dataset -> metric -> [2, prompts], before and after training.
    """

    arm: str
    seed: int
    curves: Mapping[str, Numbers]
    evaluations: Mapping[str, Mapping[str, Numbers]]

    def end(self, metric: str) -> float:
        """Mean over the last quarter of the steps."""
        curve = self.curves[metric]
        return float(curve[-max(1, len(curve) // 4) :].mean())


def over_seeds(values: Sequence[float], resamples: int) -> Estimate:
    """Mean of one value a seed, with a percentile bootstrap interval over seeds; no interval (NaN)
    for a single seed.
    """
    return crossed(np.array(values)[:, None], resamples)


def crossed(values: Numbers, resamples: int, seed: int = 0) -> Estimate:
    """Mean of [seeds, prompts] with a bootstrap interval that draws seeds and, independently,
    prompts.

    NaN entries are left out. With one seed only the prompts are drawn, with one prompt only the
    seeds, with one of each there is no interval.
    """
    values = values[~np.isnan(values).all(1)][:, ~np.isnan(values).all(0)]
    mean = float(np.nanmean(values)) if values.size else math.nan
    if values.size < 2:
        return Estimate(mean, math.nan, math.nan)
    random = np.random.default_rng(seed)
    rows = random.integers(values.shape[0], size=(resamples, values.shape[0]))
    columns = random.integers(values.shape[1], size=(resamples, values.shape[1]))
    drawn = values[rows[:, :, None], columns[:, None, :]]
    counts = (~np.isnan(drawn)).sum((1, 2))
    low, high = np.quantile(np.nansum(drawn, (1, 2))[counts > 0] / counts[counts > 0], [0.025, 0.975])
    return Estimate(mean, float(low), float(high))


def smooth(curve: Numbers) -> Numbers:
    """Centred moving mean over ``SMOOTHING`` steps; shorter at the ends."""
    half = SMOOTHING // 2
    return np.array([curve[max(0, i - half) : i + half + 1].mean() for i in range(len(curve))])


def spread(stack: Numbers) -> float:
    """Mean over steps of the standard deviation between seeds, [seeds, steps]; NaN for one seed."""
    return float(stack.std(axis=0, ddof=1).mean()) if len(stack) > 1 else math.nan


@dataclass(frozen=True)
class Matched:
    """Two runs of one seed at equal reward.

    Attributes:
        reward: R*, the smaller of the two runs' highest smoothed rewards.
        step: step (from 1) at which the arm's smoothed reward reaches R* first.
        baseline_step: the same for the baseline.
        gap: metric -> its value there, arm minus baseline.
        mean_gap: the same, averaged over ``LEVELS`` rewards from the higher of the two first ones
            up to R*.
    """

    reward: float
    step: int
    baseline_step: int
    gap: Mapping[str, float]
    mean_gap: Mapping[str, float]


def match(run: Run, baseline: Run, metrics: Sequence[str], reward_metric: str = "reward/mean") -> Matched:
    """Compare two runs at the first steps where their smoothed rewards reach the levels that both
    reach.
    """
    curves = [{name: smooth(each.curves[name]) for name in (*metrics, reward_metric)} for each in (run, baseline)]
    rewards = [curve[reward_metric] for curve in curves]
    highest = min(float(reward.max()) for reward in rewards)
    lowest = min(highest, max(float(reward[0]) for reward in rewards))
    # [2, LEVELS]: the step at which each run first reaches each level, but for rounding
    first = [[int(np.argmax(r >= level - 1e-12)) for level in np.linspace(lowest, highest, LEVELS)] for r in rewards]
    gaps = {name: curves[0][name][first[0]] - curves[1][name][first[1]] for name in metrics}
    return Matched(
        highest, first[0][-1] + 1, first[1][-1] + 1,
        {name: float(gap[-1]) for name, gap in gaps.items()}, {name: float(gap.mean()) for name, gap in gaps.items()},
    )  # fmt: skip
