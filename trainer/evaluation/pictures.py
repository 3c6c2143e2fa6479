"""Figures of runs: training curves, and diagnostics of how updates changed the entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]

CURVES = {
    "reward/mean": "mean reward of the step's completions",
    "eapo/entropy": "token entropy (nats)",
    "eapo/positive_weight": "weight of positive completions",
    "diversity/distinct_2": "distinct-2 of the completions to one prompt",
    "response/length": "tokens of a completion",
    "grad_norm": "gradient norm before clipping",
}
"""Metric -> title, in the order of the picture."""

PREDICTED, MEASURED = "dynamics/predicted_entropy_change", "dynamics/measured_entropy_change"
SHARE = "dynamics/positive_gradient_share"
CONTRACTING = {"dynamics/contracting_positive": "-", "dynamics/contracting_negative": "--"}
GAP = "rollout/logp_gap_mean"


def points(rows: Rows, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it was measured."""
    found = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw_curves(runs: Mapping[str, Rows], target: Path) -> None:
    """One panel for each of CURVES with one line for each run that has the metric."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), sharex=True, layout="constrained")
    for (metric, title), axis in zip(CURVES.items(), axes.flat, strict=True):
        for name, rows in runs.items():
            axis.plot(*points(rows, metric), marker=".", label=name)
        _label(axis, title)
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(target, dpi=130)
    plt.close(figure)


def sign_agreement(rows: Rows) -> float | None:
    """Share of the measured steps whose entropy changed in the predicted direction; None without
    any.
    """
    signs = [(row[PREDICTED] > 0) == (row[MEASURED] > 0) for row in _diagnosed(rows)]
    return sum(signs) / len(signs) if signs else None


def _diagnosed(rows: Rows) -> Rows:
    return [row for row in rows if row.get(PREDICTED) is not None and row.get(MEASURED) is not None]


def draw_diagnostics(runs: Mapping[str, Rows], target: Path) -> bool:
    """Gradient share and polarity of the positive completions, predicted against measured entropy
    change, and the engine's log-prob mismatch.

    Returns:
        Whether any run has measured them (``diagnose_every``); if none has, nothing is drawn.
    """
    if not any(row.get(SHARE) is not None for rows in runs.values() for row in rows):
        return False
    figure, ((share, polarity), (change, gap)) = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for i, (name, rows) in enumerate(runs.items()):
        color, agreed = f"C{i}", sign_agreement(rows)
        share.plot(*points(rows, SHARE), marker=".", color=color, label=name)
        for metric, style in CONTRACTING.items():
            polarity.plot(*points(rows, metric), style, color=color, label=f"{name}: {metric.rpartition('_')[2]} completions")
        if agreed is not None:
            label = f"{name}: same sign in {agreed:.0%} of the steps"
            found = _diagnosed(rows)
            change.plot(points(found, PREDICTED)[1], points(found, MEASURED)[1], ".", color=color, label=label)
        gap.plot(*points(rows, GAP), marker=".", color=color, label=name)
    for level in (change.axhline, change.axvline):
        level(0, color="grey", linewidth=0.8)
    gap.set_yscale("log")
    titles = {
        share: "share of the squared gradient from positive completions",
        polarity: "share of tokens whose reinforcement contracts the entropy (D > 0)",
        change: "entropy change of a step: measured (nats) against predicted (nats per logit step)",
        gap: "engine's against trainer's log-prob: mean absolute difference (nats)",
    }
    for axis, title in titles.items():
        _label(axis, title)
        axis.legend(fontsize=7)
        axis.set_xlabel("predicted" if axis is change else "step", fontsize=8)
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return True


def _label(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
