"""What a comparison showed: tables over seeds, differences to GRPO, and entropy and diversity at equal reward.

Every number is of finished runs; the page names the others. Curves are those of the training steps, on the training questions;
the evaluations are on fixed questions before and after training.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..runs.rundir import read
from .arms import ARMS, split_name
from .diversity import Estimate
from .evaluate import Evaluation, known

Numbers = NDArray[np.float64]

CURVES = {"reward": "reward/mean", "entropy": "eapo/entropy", "distinct_2": "diversity/distinct_2"}
"""What is compared along training -> its metric."""

BASELINE = "grpo"

SMOOTHING = 5
"""Steps of the centred moving mean behind "at equal reward"."""

LEVELS = 21
"""Rewards, equally far apart, of the mean over equal rewards."""


@dataclass(frozen=True)
class Run:
    """A finished run of a comparison.

    Attributes:
        arm, seed: which.
        rows: its metrics, one mapping a step.
        evaluations: dataset -> its first and its last evaluation.
    """

    arm: str
    seed: int
    rows: list[dict[str, Any]]
    evaluations: dict[str, tuple[Evaluation, Evaluation]]

    def curve(self, metric: str) -> Numbers:
        """[steps] of a metric of ``metrics.jsonl``; NaN where it was not measured."""
        return np.array(known([row.get(metric) for row in self.rows]))

    def end(self, metric: str) -> float:
        """Mean over the last quarter of the steps."""
        return float(self.curve(metric)[-max(1, len(self.rows) // 4) :].mean())


@dataclass(frozen=True)
class Comparison:
    """The finished runs of a comparison.

    Attributes:
        runs: arm -> seed -> run; the paper's arms first.
        unfinished: a line for every other run.
        config: the first run's.
    """

    runs: dict[str, dict[int, Run]]
    unfinished: list[str]
    config: dict[str, Any]

    def stack(self, arm: str, metric: str) -> Numbers:
        """[seeds, steps]."""
        return np.stack([run.curve(metric) for run in self.runs[arm].values()])

    def shared(self, arm: str) -> list[int]:
        """Seeds that both the arm and the baseline have finished."""
        return [seed for seed in self.runs[arm] if seed in self.runs.get(BASELINE, {})]


def is_comparison(directory: Path) -> bool:
    """Whether a directory holds the runs of a comparison."""
    return not (directory / "metrics.jsonl").exists() and any(split_name(path.parent.name) for path in _configs(directory))


def _configs(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/config.toml"))


def load_comparison(directory: Path) -> Comparison:
    """Read all runs below ``directory``.

    Raises:
        DataError: no finished run, or finished runs of different lengths.
    """
    found: dict[str, dict[int, Run]] = {}
    unfinished, configs = [], []
    for path in _configs(directory):
        name = split_name(path.parent.name)
        if name is None:
            continue
        config, rows = tomllib.loads(path.read_text()), read(path.parent, "metrics")
        evaluations: dict[str, list[Evaluation]] = {}
        for row in read(path.parent, "evaluations"):
            evaluations.setdefault(row["dataset"], []).append(Evaluation(**row))
        done = len(rows) == config["steps"] and all(each[-1].step == config["steps"] for each in evaluations.values())
        if not done:
            unfinished.append(f"{path.parent.name} ({len(rows)} of {config['steps']} steps)")
            continue
        configs.append(config)
        ends = {dataset: (each[0], each[-1]) for dataset, each in evaluations.items()}
        found.setdefault(name[0], {})[name[1]] = Run(*name, rows, ends)
    if not found:
        raise DataError(f"report: expected a finished run in {directory}, got {', '.join(unfinished) or 'none at all'}")
    lengths = {config["steps"] for config in configs}
    if len(lengths) > 1:
        raise DataError(f"report: expected runs of one length in {directory}, got {sorted(lengths)} steps")
    order = [arm for arm in ARMS if arm in found] + sorted(found.keys() - set(ARMS))
    runs = {arm: dict(sorted(found[arm].items())) for arm in order}
    return Comparison(runs, unfinished, configs[0])


def over_seeds(values: Sequence[float], resamples: int) -> Estimate:
    """Mean of one value a seed, with a percentile bootstrap interval over seeds; no interval (NaN) for a single seed."""
    return crossed(np.array(values)[:, None], resamples)


def crossed(values: Numbers, resamples: int, seed: int = 0) -> Estimate:
    """Mean of [seeds, questions] with a bootstrap interval that draws seeds and, independently, questions; NaN entries are left
    out. With one seed only the questions are drawn, with one question only the seeds, with one of each there is no interval.
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


@dataclass(frozen=True)
class Matched:
    """Two runs of one seed at equal reward.

    Attributes:
        reward: R*, the smaller of the two runs' highest smoothed rewards.
        step: step (from 1) at which the arm's smoothed reward reaches R* first.
        baseline_step: the same for the baseline.
        gap: "entropy" and "distinct_2" there, arm minus baseline.
        mean_gap: the same, averaged over ``LEVELS`` rewards from the higher of the two first ones up to R*.
    """

    reward: float
    step: int
    baseline_step: int
    gap: Mapping[str, float]
    mean_gap: Mapping[str, float]


def match(run: Run, baseline: Run) -> Matched:
    """Compare two runs where their smoothed rewards first reach the same: the highest that both reach, and those below."""
    curves = [{name: smooth(each.curve(metric)) for name, metric in CURVES.items()} for each in (run, baseline)]
    reward = min(float(curve["reward"].max()) for curve in curves)

    def first(curve: Mapping[str, Numbers], level: float) -> int:
        return int(np.argmax(curve["reward"] >= level - 1e-12))  # but for rounding

    def gaps(name: str, levels: Sequence[float]) -> list[float]:
        return [float(curves[0][name][first(curves[0], r)] - curves[1][name][first(curves[1], r)]) for r in levels]

    levels = np.linspace(min(reward, max(float(curve["reward"][0]) for curve in curves)), reward, LEVELS).tolist()
    compared = {name: gaps(name, levels) for name in ("entropy", "distinct_2")}
    return Matched(
        reward,
        first(curves[0], reward) + 1,
        first(curves[1], reward) + 1,
        {name: found[-1] for name, found in compared.items()},
        {name: sum(found) / LEVELS for name, found in compared.items()},
    )


def spread(stack: Numbers) -> float:
    """Mean over steps of the standard deviation between seeds, [seeds, steps]; NaN for one seed."""
    return float(stack.std(axis=0, ddof=1).mean()) if len(stack) > 1 else math.nan
