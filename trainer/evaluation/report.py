"""A figure and a Markdown page from run directories."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..dataset import content_of
from ..errors import DataError
from ..runs.rundir import read
from .diversity import bootstrap
from .evaluate import Evaluation, evaluation_table, known

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
    "dynamics/predicted_entropy_change": ("predicted entropy change of the update (nats per logit step)", ""),
    "dynamics/measured_entropy_change": ("measured entropy change of the update (nats)", ""),
}
"""Metric of a step -> title, and the metric of an evaluation that belongs to it."""


def summary_table(run: Path) -> str:
    """A table of the evaluations of a run for each dataset, as Markdown."""
    found = defaultdict(list)
    for evaluation in _evaluations(run):
        found[evaluation.dataset, evaluation.greedy].append(evaluation)
    return "\n\n".join(map(evaluation_table, found.values()))


def write_report(runs: Sequence[Path], directory: Path) -> tuple[Path, Path]:
    """Write curves.png and report.md to ``directory``, and return their paths.

    Raises:
        DataError: a run without a single finished step.
    """
    unique = len({run.name for run in runs}) == len(runs)
    named = {run.name if unique else str(run): run for run in runs}
    steps = {name: read(run, "metrics") for name, run in named.items()}
    for name, rows in steps.items():
        if not rows:
            raise DataError(f"report: expected a run with metrics.jsonl, got {named[name]}")
    directory.mkdir(parents=True, exist_ok=True)
    picture, page = directory / "curves.png", directory / "report.md"
    draw_curves({name: (steps[name], _evaluations(run)) for name, run in named.items()}, picture)
    sections = [f"# {', '.join(named)}\n\n![curves](curves.png)"]
    for name, run in named.items():
        c = _settings(run / "config.toml")
        about = (
            f"{c['model']['path']}, method {c['loss']['method']}, seed {c['seed']}, {steps[name][-1]['step']} of "
            f"{c['steps']} steps, {c['rollout']['prompts']} prompts x {c['rollout']['responses']} completions a step, learning "
            f"rate {c['optim']['lr']}, LoRA rank {c['lora']['rank']} (0 = all weights)."
        )
        sections += [f"## {name}", about, summary_table(run), *_samples(read(run, "samples"))]
    page.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    return picture, page


def _settings(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"report: expected the settings of a run in {file}, got: {error}") from error


def _evaluations(run: Path) -> list[Evaluation]:
    return [Evaluation(**row) for row in read(run, "evaluations")]


def _samples(samples: Rows) -> Iterator[str]:
    """The best and the worst completion of some steps, and completions of the same held-out prompts
    at the first and the last evaluation.
    """
    steps, prompts = defaultdict(list), defaultdict(list)
    for row in samples:
        if "dataset" not in row:
            steps[row["step"]].append(row)
        elif row["dataset"] == "held-out":
            prompts[str(row["prompt"])].append(row)
    ranked = [sorted(steps[step], key=lambda row: row["reward"]) for step in _spread(sorted(steps), 5)]
    for title, rows in {
        "Best and worst completion of a step": [row for own in ranked for row in (own[-1], own[0])],
        "Held-out prompts, before and after": [row for own in list(prompts.values())[:3] for row in _spread(own, 2)],
    }.items():
        lines = []
        for row in rows:
            asked = row["prompt"] if isinstance(row["prompt"], str) else content_of(row["prompt"][-1])
            reward = "none" if row["reward"] is None else f"{row['reward']:.3f}"
            lines.append(f"- step {row['step']}, reward {reward}: {asked} -> {row['completion']!r}")
        if lines:
            yield "\n".join([f"{title}:\n", *lines])


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """Up to ``most`` of the items, evenly spaced, the first and the last among them."""
    places = {round(i * (len(items) - 1) / (most - 1)) for i in range(most)} if items else set()
    return [items[place] for place in sorted(places)]


def draw_curves(runs: Mapping[str, tuple[Rows, Sequence[Evaluation]]], target: Path) -> None:
    """One panel for each metric that a run has. A run is its steps and its evaluations, and has one
    color.
    """
    panels = [metric for metric in PANELS if any(row.get(metric) is not None for rows, _ in runs.values() for row in rows)]
    height = -(-len(panels) // 3)
    figure, grid = plt.subplots(height, 3, figsize=(13, 3.2 * height), squeeze=False, layout="constrained")
    for axis, metric in zip(grid.flat, panels, strict=False):
        title, evaluated = PANELS[metric]
        for number, (name, (rows, evaluations)) in enumerate(runs.items()):
            curve = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
            _curve(axis, curve, name, f"C{number}")
            for dataset, face in (("held-out", f"C{number}"), ("train", "white")):
                found = [e for e in evaluations if e.dataset == dataset and evaluated in e.values]
                label = f"evaluation, {dataset} prompts" if number == 0 else None
                _points(axis, found, evaluated, label, color=f"C{number}", markerfacecolor=face)
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
