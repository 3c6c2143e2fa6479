"""The tables of a comparison, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from .comparison import BASELINE, CURVES, LEVELS, SMOOTHING, Comparison, Numbers, Run, crossed, match, over_seeds, spread
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
        table = evaluation_difference_table(found, dataset, resamples)
        if table:
            parts += ["**The same, minus GRPO, paired by seed and question.**", table]
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
    arms = _evaluated(found, dataset)
    if not arms:
        return ""
    shown = _measured(found, arms, dataset)
    before = {run.seed: run for arm in reversed(arms) for run in found.runs[arm].values()}  # every arm starts with this model
    rows = [["before training", *(show(crossed(matrix(before.values(), dataset, 0, name), resamples)) for name in shown)]]
    for arm in arms:
        values = (matrix(found.runs[arm].values(), dataset, 1, name) for name in shown)
        rows.append([title(arm), *(show(crossed(each, resamples)) for each in values)])
    return markdown_table(["", *(EVALUATED[name] for name in shown)], rows)


def evaluation_difference_table(found: Comparison, dataset: str, resamples: int) -> str:
    """Every other arm minus the baseline after training, paired by seed and question; empty without both."""
    arms = _evaluated(found, dataset)
    rows, shown = [], _measured(found, arms, dataset)
    for arm in arms:
        seeds = found.shared(arm)
        if BASELINE in arms and arm != BASELINE and seeds:
            own, base = ([found.runs[name][seed] for seed in seeds] for name in (arm, BASELINE))
            gaps = [matrix(own, dataset, 1, name) - matrix(base, dataset, 1, name) for name in shown]
            rows.append([title(arm), *(show(crossed(gap, resamples), sign=True) for gap in gaps)])
    return markdown_table(["", *(EVALUATED[name] for name in shown)], rows) if rows else ""


def _evaluated(found: Comparison, dataset: str) -> list[str]:
    """Arms whose runs were all evaluated on the dataset."""
    return [arm for arm, runs in found.runs.items() if all(dataset in run.evaluations for run in runs.values())]


def _measured(found: Comparison, arms: Sequence[str], dataset: str) -> list[str]:
    runs = [run for arm in arms for run in found.runs[arm].values()]
    return [name for name in EVALUATED if all(name in run.evaluations[dataset][1].values for run in runs)]


def matrix(runs: Iterable[Run], dataset: str, place: int, metric: str) -> Numbers:
    """[runs, questions] of an evaluation's metric; place 0: before training, 1: after."""
    return np.array([known(run.evaluations[dataset][place].values[metric]) for run in runs])


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
