"""One figure of a run or several: curves over the steps, with the evaluations among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .diversity import bootstrap
from .evaluate import Evaluation, known

Rows = Sequence[Mapping[str, Any]]

PANELS = {
    "reward/mean": ("reward", "reward"),
    "eapo/entropy": ("entropy of a token (nats)", "entropy"),
    "eapo/positive_weight": ("weight of positive completions", ""),
    "diversity/distinct_2": ("distinct-2 of the completions to one prompt", "distinct_2"),
    "response/length": ("tokens of a completion", "length"),
    "response/truncated": ("share of truncated completions", "truncated"),
    "reward/flat_groups": ("share of groups with equal rewards", ""),
    "grad_norm": ("gradient norm before clipping", ""),
    "rollout/logp_gap_mean": ("log-prob, engine against trainer: mean distance (nats)", ""),
    "dynamics/positive_gradient_share": ("share of the squared gradient from positive completions", ""),
    "dynamics/contracting_positive": ("share of positive tokens that contract the entropy", ""),
    "dynamics/predicted_entropy_change": ("predicted entropy change of the update (nats per logit step)", ""),
    "dynamics/measured_entropy_change": ("measured entropy change of the update (nats)", ""),
}
"""Metric of a step -> title, and the metric of an evaluation that belongs to it."""


def draw_curves(runs: Mapping[str, tuple[Rows, Sequence[Evaluation]]], target: Path) -> None:
    """One panel for each metric that a run has. A run is its steps and its evaluations, and has one
    color.
    """
    panels = [metric for metric in PANELS if any(row.get(metric) is not None for rows, _ in runs.values() for row in rows)]
    figure, grid = plt.subplots(
        -(-len(panels) // 3), 3, figsize=(13, 3.2 * -(-len(panels) // 3)), squeeze=False, layout="constrained"
    )
    for axis, metric in zip(grid.flat, panels, strict=False):
        title, evaluated = PANELS[metric]
        for number, (name, (rows, evaluations)) in enumerate(runs.items()):
            curve = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
            _curve(axis, curve, name, f"C{number}")
            for dataset, filled in (("held-out", True), ("train", False)):
                found = [e for e in evaluations if e.dataset == dataset and evaluated in e.values]
                label = f"evaluation, {dataset} prompts" if number == 0 else None
                _points(axis, found, evaluated, label, color=f"C{number}", markerfacecolor=f"C{number}" if filled else "white")
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in grid.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in grid[-1]:
        axis.set_xlabel("step", fontsize=8)
    grid[0, 0].legend(fontsize=8)
    figure.savefig(target, dpi=130)
    plt.close(figure)


def _curve(axis: Axes, curve: Sequence[tuple[int, float]], name: str, color: str) -> None:
    """A smoothed line over the raw one: the mean over about an eighth of the values, at most 21."""
    steps, values = [step for step, _ in curve], [value for _, value in curve]
    axis.plot(steps, values, color=color, alpha=0.3, linewidth=1, marker="." if len(steps) <= 30 else "")
    half = min(len(values) // 16, 10)
    means = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    axis.plot(steps, means, color=color, linewidth=1.8, label=name)


def _points(axis: Axes, evaluations: Sequence[Evaluation], metric: str, label: str | None, **style: Any) -> None:
    """Means over prompts with their 95 % intervals. They hold for the weights after a step, and a
    step's own value for those before its update.
    """
    found = [bootstrap(known(e.values[metric]), 500) for e in evaluations]
    if found:
        means, bars = [e.mean for e in found], np.transpose([(e.mean - e.low, e.high - e.mean) for e in found])
        steps = [e.step for e in evaluations]
        axis.errorbar(steps, means, bars, fmt="o", markersize=5, capsize=2, linewidth=1, zorder=3, label=label, **style)
