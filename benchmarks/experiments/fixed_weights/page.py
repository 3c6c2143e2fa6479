"""The measurements of the comparison in one file, and the page and the figure that are drawn from
it.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from trainer.config import Config
from trainer.config.settings import to_toml
from trainer.evaluation.diversity import Estimate
from trainer.evaluation.evaluate import markdown_table
from trainer.runs.rundir import RunDirectory, read

from .runs import ARMS
from .statistics import LEVELS, SMOOTHING, Numbers, Run, crossed, match, over_seeds, smooth, spread

METRICS, PAGE, FIGURE = "metrics.jsonl", "README.md", "curves.png"
BEGIN, END = "<!-- generated: comparison -->", "<!-- /generated -->"
BASELINE = "grpo"
RESAMPLES = 2000
"""Bootstrap resamples of an interval."""
REWARD, ENTROPY, DISTINCT, WEIGHT = "reward/mean", "eapo/entropy", "diversity/distinct_2", "eapo/positive_weight"
COMPARED = (REWARD, ENTROPY, DISTINCT)
TITLES = {
    "eapo": "EAPO (entropy ratio)",
    "grpo": "GRPO (1)",
    "w_reinforce": "W-REINFORCE (0.1)",
    "nsr": "NSR (0)",
    "psr": "PSR (1; negatives 0)",
}
"""Arm -> name, with its weight of the positive completions."""
PANELS = {
    REWARD: "mean reward of the step's completions",
    ENTROPY: "token entropy (nats)",
    DISTINCT: "distinct-2 of the completions of one prompt",
    WEIGHT: "weight of positive completions",
}
EVALUATED = {
    "reward": "reward", "reward_best": "best reward", "entropy": "entropy", "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU", "dispersion": "dispersion", "length": "length",
}  # fmt: skip
"""Metrics of the evaluations that the page shows, where they were measured."""


@dataclass(frozen=True)
class Comparison:
    """config: the recipe as a table. runs: arm -> seed -> run, arms in the order of ``ARMS``."""

    config: dict[str, Any]
    runs: dict[str, dict[int, Run]]

    def stack(self, arm: str, metric: str) -> Numbers:
        """[seeds, steps]."""
        return np.stack([run.curves[metric] for run in self.runs[arm].values()])

    def pairs(self, arm: str) -> list[tuple[Run, Run]]:
        """The arm's and the baseline's run for every seed that both have; none for the baseline
        itself.
        """
        base = self.runs.get(BASELINE, {}) if arm != BASELINE else {}
        return [(run, base[seed]) for seed, run in self.runs[arm].items() if seed in base]


def collect(config: Config, finished: Sequence[Config], file: Path) -> None:
    """Write what the page needs of finished runs: a line with the recipe, then a line for each run."""
    lines: list[dict[str, Any]] = [{"config": tomllib.loads(to_toml(config))}]
    for run in finished:
        path = RunDirectory(run).path
        rows = read(path, "metrics")
        evaluations: dict[str, list[dict[str, Any]]] = {}
        for row in read(path, "evaluations"):
            evaluations.setdefault(row["dataset"], []).append(row["values"])
        lines.append(
            {
                "arm": run.name.rpartition("-seed")[0],
                "seed": run.seed,
                "curves": {metric: [row[metric] for row in rows] for metric in PANELS},
                "evaluations": {
                    dataset: {name: [found[0][name], found[-1][name]] for name in EVALUATED if name in found[0]}
                    for dataset, found in evaluations.items()
                },
            }
        )
    file.write_text("".join(json.dumps(_rounded(line)) + "\n" for line in lines))


def _rounded(value: Any) -> Any:
    """Floats with six significant digits, in any nesting of lists and tables."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def load(file: Path) -> Comparison:
    """Read what ``collect`` wrote."""
    head, *lines = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
    runs: dict[str, dict[int, Run]] = {arm: {} for arm in ARMS}
    for line in lines:
        curves = {name: np.array(values, dtype=float) for name, values in line["curves"].items()}
        evaluations = {
            dataset: {name: np.array(values, dtype=float) for name, values in columns.items()}  # null becomes NaN
            for dataset, columns in line["evaluations"].items()
        }
        runs[line["arm"]][line["seed"]] = Run(line["arm"], line["seed"], curves, evaluations)
    return Comparison(head["config"], {arm: dict(sorted(found.items())) for arm, found in runs.items() if found})


def draw(directory: Path) -> None:
    """Draw the figure and the generated part of the page in ``directory`` from the measurements
    there.
    """
    found = load(directory / METRICS)
    draw_figure(found, directory / FIGURE)
    page = directory / PAGE
    old = page.read_text() if page.exists() else f"# Comparison\n\n{BEGIN}\n{END}\n"
    head, tail = old.partition(BEGIN)[0], old.partition(END)[2]
    page.write_text(f"{head}{BEGIN}\n{tables(found)}\n{END}{tail}")
    print(page)


def draw_figure(found: Comparison, target: Path) -> None:
    """Seeds as thin lines, their mean as a thick one; the last panels are entropy against reward
    and the spread over seeds.
    """
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for (metric, name), axis in zip(PANELS.items(), axes.flat, strict=False):
        for i, arm in enumerate(found.runs):
            stack = found.stack(arm, metric)
            steps = np.arange(1, stack.shape[1] + 1)
            axis.plot(steps, stack.T, color=f"C{i}", linewidth=0.7, alpha=0.45)
            axis.plot(steps, stack.mean(0), color=f"C{i}", linewidth=2.4, label=f"{TITLES[arm]}, seeds: {len(stack)}")
        _label(axis, name, "step")
    for i, arm in enumerate(found.runs):
        reward, entropy = found.stack(arm, REWARD), found.stack(arm, ENTROPY)
        path = [smooth(stack.mean(0)) for stack in (reward, entropy)]
        axes[1, 1].plot(*path, color=f"C{i}", linewidth=2.0)
        axes[1, 1].plot(path[0][-1], path[1][-1], "o", color=f"C{i}")
        if len(reward) > 1:
            axes[1, 2].plot(np.arange(1, reward.shape[1] + 1), smooth(reward.std(0, ddof=1)), color=f"C{i}", linewidth=2.0)
    _label(axes[1, 1], "entropy against reward (means, smoothed; dot: end)", "reward")
    _label(axes[1, 2], "deviation of the reward between seeds (smoothed)", "step")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _label(axis: Axes, name: str, below: str) -> None:
    axis.set_title(name, fontsize=9)
    axis.set_xlabel(below, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


def tables(found: Comparison) -> str:
    """The generated part of the page, as Markdown."""
    config = found.config
    steps, last = config["steps"], max(1, config["steps"] // 4)
    parts = [
        f"{config['model']['path']}, {config['rollout']['prompts']} prompts x {config['rollout']['responses']} completions x "
        f"at most {config['rollout']['max_new_tokens']} tokens a step, {steps} steps, learning rate {config['optim']['lr']}, "
        f"LoRA rank {config['lora']['rank']} (0 = all weights), rewards {', '.join(config['rewards']['functions'])}.",
        f"![curves]({FIGURE})",
        f"**Training prompts, mean of the last {last} of {steps} steps, mean over seeds [95 % interval].** "
        "Spread: standard deviation between seeds, of that mean, and step by step (mean over steps) for reward and entropy.",
        training_table(found),
    ]
    for dataset in ("held-out", "train"):
        if all(dataset in run.evaluations for runs in found.runs.values() for run in runs.values()):
            parts += [
                f"**Evaluation on {dataset} prompts, mean [95 % interval over seeds and prompts].**",
                evaluation_table(found, dataset),
            ]
            if BASELINE in found.runs:
                parts += ["**The same, minus GRPO, paired by seed and prompt.**", evaluation_table(found, dataset, paired=True)]
    if BASELINE in found.runs:
        parts += [
            f"**Minus GRPO, paired by seed: mean of the last {last} steps, and at equal reward.** Equal reward: the curves are "
            f"smoothed over {SMOOTHING} steps, R* is the highest reward that both runs of a seed reach, and each is read where "
            f"it first reaches R*; up to R*: the mean over {LEVELS} such rewards from the start up to R*.",
            difference_table(found),
        ]
    return "\n\n".join(parts)


def training_table(found: Comparison) -> str:
    """Reward, entropy, diversity and their spread at the end of training."""
    rows = []
    for arm, runs in found.runs.items():
        ends = {metric: [run.end(metric) for run in runs.values()] for metric in COMPARED}
        spreads = (spread(np.array(ends[REWARD])[:, None]), spread(found.stack(arm, REWARD)), spread(found.stack(arm, ENTROPY)))
        means = (_show(over_seeds(values, RESAMPLES)) for values in ends.values())
        rows.append(
            [TITLES[arm], str(len(runs)), *means, *map(_number, (float(found.stack(arm, WEIGHT)[:, -1].mean()), *spreads))]
        )
    spread_names = ["spread of reward", "step by step", "of entropy"]
    return markdown_table(["", "seeds", "reward", "entropy (nats)", "distinct-2", "last weight", *spread_names], rows)


def evaluation_table(found: Comparison, dataset: str, *, paired: bool = False) -> str:
    """The evaluations after training below those before it; ``paired``: arms minus the baseline,
    after training.
    """
    every = [run for runs in found.runs.values() for run in runs.values()]
    shown = [name for name in EVALUATED if all(name in run.evaluations[dataset] for run in every)]

    def matrix(runs: Iterable[Run], place: int, metric: str) -> Numbers:
        """[runs, prompts]; place 0: before training, 1: after."""
        return np.array([run.evaluations[dataset][metric][place] for run in runs])

    if paired:
        rows = []
        for arm, pairs in ((arm, found.pairs(arm)) for arm in found.runs):
            if pairs:
                own, base = zip(*pairs, strict=True)
                gaps = [matrix(own, 1, name) - matrix(base, 1, name) for name in shown]
                rows.append([TITLES[arm], *(_show(crossed(gap, RESAMPLES), sign=True) for gap in gaps)])
    else:
        # All arms of a seed start from the same model: one of them stands for the seed.
        start = {run.seed: run for runs in reversed(found.runs.values()) for run in runs.values()}.values()
        parts = [("before training", start, 0), *((TITLES[arm], runs.values(), 1) for arm, runs in found.runs.items())]
        rows = [
            [title, *(_show(crossed(matrix(runs, place, name), RESAMPLES)) for name in shown)] for title, runs, place in parts
        ]
    return markdown_table(["", *(EVALUATED[name] for name in shown)], rows)


def difference_table(found: Comparison) -> str:
    """Every other arm minus the baseline, at the end of training and at equal reward."""
    rows = []
    for arm, pairs in ((arm, found.pairs(arm)) for arm in found.runs):
        if not pairs:
            continue
        matched = [match(own, base, (ENTROPY, DISTINCT)) for own, base in pairs]
        gaps = [[own.end(metric) - base.end(metric) for own, base in pairs] for metric in COMPARED]
        at = [[m.gap[name] for m in matched] for name in (ENTROPY, DISTINCT)]
        up_to = [[m.mean_gap[name] for m in matched] for name in (ENTROPY, DISTINCT)]
        ends, equal = ([_show(over_seeds(g, RESAMPLES), sign=True) for g in group] for group in (gaps, at + up_to))
        rewards, steps = [f"{m.reward:.3f}" for m in matched], [f"{m.step}/{m.baseline_step}" for m in matched]
        rows.append([TITLES[arm], str(len(pairs)), *ends, ", ".join(rewards), ", ".join(steps), *equal])
    names = [f"{name} {place} R*" for place in ("at", "up to") for name in ("entropy", "distinct-2")]
    return markdown_table(["", "seeds", "reward", "entropy", "distinct-2", "R*", "steps to R*: arm/GRPO", *names], rows)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _show(estimate: Estimate, *, sign: bool = False) -> str:
    """A mean with its interval, where it has one."""
    form = "{:+.3f}" if sign else "{:.3f}"
    values = [form.format(value) for value in (estimate.mean, estimate.low, estimate.high)]
    return values[0] if math.isnan(estimate.low) else f"{values[0]} [{values[1]}, {values[2]}]"
