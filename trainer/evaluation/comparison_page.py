"""The page and the picture of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from .comparison import (
    BASELINE,
    CURVES,
    LEVELS,
    SMOOTHING,
    Comparison,
    crossed,
    load_comparison,
    match,
    over_seeds,
    smooth,
    spread,
)
from .diversity import Estimate
from .evaluate import known
from .report import markdown_table

TITLES = {
    "eapo": "EAPO (entropy ratio)",
    "grpo": "GRPO (1)",
    "w_reinforce": "W-REINFORCE (0.1)",
    "nsr": "NSR (0)",
    "psr": "PSR (1; negatives 0)",
}
"""Arm -> name, with its weight of the positive answers."""

BEGIN, END = "<!-- generated: comparison -->", "<!-- /generated -->"

EVALUATED = {
    "reward": "reward",
    "reward_best": "best reward",
    "entropy": "entropy",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU",
    "dispersion": "dispersion",
    "length": "length",
}
"""Metrics of the evaluations that the page shows, where they were measured."""


def write_comparison(directory: Path, out: Path | None = None) -> tuple[Path, Path]:
    """Write comparison.png and comparison.md to ``out`` (default: ``directory``); returns their paths.

    Of a page that exists only what stands between the two marks is replaced.

    Raises:
        DataError: no finished run.
    """
    found = load_comparison(directory)
    out = out or directory
    out.mkdir(parents=True, exist_ok=True)
    picture, page = out / "comparison.png", out / "comparison.md"
    draw(found, picture)
    old = page.read_text() if page.exists() else f"# Comparison\n\n{BEGIN}\n{END}\n"
    page.write_text(with_block(old, tables(found, found.config["eval"]["resamples"])))
    return picture, page


def with_block(page: str, block: str) -> str:
    """``page`` with ``block`` between its marks; at its end where it has none."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        head, tail = f"{page.rstrip()}\n\n", "\n"
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def tables(found: Comparison, resamples: int) -> str:
    """Everything of the page that is computed, as Markdown."""
    config = found.config
    steps, last = config["steps"], max(1, config["steps"] // 4)
    setting = (
        f"{config['model']['path']}, {config['rollout']['prompts']} questions x {config['rollout']['responses']} answers x "
        f"at most {config['rollout']['max_new_tokens']} tokens a step, {steps} steps, learning rate {config['optim']['lr']}, "
        f"LoRA rank {config['lora']['rank']} (0 = all weights), rewards {', '.join(config['rewards']['functions'])}."
    )
    parts = [setting, "![curves](comparison.png)"]
    if found.unfinished:
        parts.append(f"Not finished and left out: {', '.join(found.unfinished)}.")
    parts += [
        f"**Training questions, mean of the last {last} of {steps} steps, mean over seeds [95 % interval].** "
        "Spread: standard deviation between seeds, of that mean, and step by step (mean over steps) for reward and entropy.",
        training_table(found, resamples),
    ]
    for dataset in ("held-out", "train"):
        table = evaluation_table(found, dataset, resamples)
        if table:
            parts += [f"**Evaluation on {dataset} questions, mean [95 % interval over seeds and questions].**", table]
    differences = difference_table(found, resamples)
    if differences:
        parts += [
            f"**Minus GRPO, paired by seed: mean of the last {last} steps, and at equal reward.** Equal reward: the curves are "
            f"smoothed over {SMOOTHING} steps, R* is the highest reward that both runs of a seed reach, and each is read where "
            f"it first reaches R*; up to R*: the mean over {LEVELS} such rewards from the start up to R*.",
            differences,
        ]
    return "\n\n".join(parts)


def training_table(found: Comparison, resamples: int) -> str:
    """Reward, entropy, diversity and their spread at the end of training."""
    spreads = ["spread of reward", "step by step", "of entropy"]
    header = ["", "seeds", "reward", "entropy (nats)", "distinct-2", "last weight", *spreads]
    rows = []
    for arm, runs in found.runs.items():
        ends = {name: [run.end(metric) for run in runs.values()] for name, metric in CURVES.items()}
        weight = float(np.mean([run.curve("eapo/positive_weight")[-1] for run in runs.values()]))
        rows.append(
            [
                title(arm), str(len(runs)), *(show(over_seeds(values, resamples)) for values in ends.values()), number(weight),
                number(spread(np.array(ends["reward"])[:, None])), number(spread(found.stack(arm, CURVES["reward"]))),
                number(spread(found.stack(arm, CURVES["entropy"]))),
            ]
        )  # fmt: skip
    return markdown_table(header, rows)


def evaluation_table(found: Comparison, dataset: str, resamples: int) -> str:
    """What the evaluations measured, before and after; empty without any on this dataset."""
    with_it = {arm: [run for run in runs.values() if dataset in run.evaluations] for arm, runs in found.runs.items()}
    everyone = [run for runs in with_it.values() for run in runs]
    if not everyone:
        return ""
    shown = [name for name in EVALUATED if all(name in run.evaluations[dataset][1].values for run in everyone)]

    def cells(place: int, chosen: Sequence[int]) -> list[str]:
        values = [[known(everyone[i].evaluations[dataset][place].values[name]) for i in chosen] for name in shown]
        return [show(crossed(np.array(each), resamples)) for each in values]

    first = {run.seed: i for i, run in reversed(list(enumerate(everyone)))}  # the model before training is every arm's
    rows = [["before training", *cells(0, list(first.values()))]]
    for arm, runs in with_it.items():
        if runs:
            rows.append([title(arm), *cells(1, [everyone.index(run) for run in runs])])
    return markdown_table(["", *(EVALUATED[name] for name in shown)], rows)


def difference_table(found: Comparison, resamples: int) -> str:
    """Every other arm minus the baseline; empty without both."""
    rows = []
    for arm, runs in found.runs.items():
        seeds = found.shared(arm)
        if arm == BASELINE or not seeds:
            continue
        pairs = [(runs[seed], found.runs[BASELINE][seed]) for seed in seeds]
        ends = [[own.end(metric) - other.end(metric) for own, other in pairs] for metric in CURVES.values()]
        matched = [match(own, other) for own, other in pairs]
        rows.append(
            [
                title(arm), str(len(seeds)), *(show(over_seeds(values, resamples), sign=True) for values in ends),
                ", ".join(f"{m.reward:.3f}" for m in matched), ", ".join(f"{m.step}/{m.baseline_step}" for m in matched),
                *(
                    show(over_seeds([gap[name] for gap in gaps], resamples), sign=True)
                    for gaps in ([m.gap for m in matched], [m.mean_gap for m in matched])
                    for name in ("entropy", "distinct_2")
                ),
            ]
        )  # fmt: skip
    at = [f"{name} {place} R*" for place in ("at", "up to") for name in ("entropy", "distinct-2")]
    header = ["", "seeds", "reward", "entropy", "distinct-2", "R*", "steps to R*: arm/GRPO", *at]
    return markdown_table(header, rows) if rows else ""


def title(arm: str) -> str:
    return TITLES.get(arm, arm)


def number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def show(estimate: Estimate, *, sign: bool = False) -> str:
    """A mean with its interval, where it has one."""
    form = "{:+.3f}" if sign else "{:.3f}"
    values = [form.format(value) for value in (estimate.mean, estimate.low, estimate.high)]
    return values[0] if math.isnan(estimate.low) else f"{values[0]} [{values[1]}, {values[2]}]"


def draw(found: Comparison, target: Path) -> None:
    """Seeds as thin lines, their mean as a thick one; the last panels are entropy against reward and the spread over seeds."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    panels = {
        "reward/mean": "mean reward of the step's answers",
        "eapo/entropy": "token entropy (nats)",
        "diversity/distinct_2": "distinct-2 of the answers to one question",
        "eapo/positive_weight": "weight of positive answers",
    }
    for (metric, name), axis in zip(panels.items(), axes.flat, strict=False):
        for i, arm in enumerate(found.runs):
            stack = found.stack(arm, metric)
            steps = np.arange(1, stack.shape[1] + 1)
            axis.plot(steps, stack.T, color=f"C{i}", linewidth=0.7, alpha=0.45)
            axis.plot(steps, stack.mean(0), color=f"C{i}", linewidth=2.4, label=f"{title(arm)}, seeds: {len(stack)}")
        label(axis, name, "step")
    for i, arm in enumerate(found.runs):
        reward, entropy = (found.stack(arm, CURVES[name]) for name in ("reward", "entropy"))
        path = [smooth(curve.mean(0)) for curve in (reward, entropy)]
        axes[1, 1].plot(*path, color=f"C{i}", linewidth=2.0)
        axes[1, 1].plot(path[0][-1], path[1][-1], "o", color=f"C{i}")
        if len(reward) > 1:
            axes[1, 2].plot(np.arange(1, reward.shape[1] + 1), smooth(reward.std(0, ddof=1)), color=f"C{i}", linewidth=2.0)
    label(axes[1, 1], "entropy against reward (means, smoothed; dot: end)", "reward")
    label(axes[1, 2], "deviation of the reward between seeds (smoothed)", "step")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def label(axis: Axes, name: str, below: str) -> None:
    axis.set_title(name, fontsize=9)
    axis.set_xlabel(below, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
