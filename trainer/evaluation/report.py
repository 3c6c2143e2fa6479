"""A figure and a Markdown page from run directories."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..dataset import content_of
from ..errors import DataError
from ..runs.rundir import read
from .evaluate import Evaluation, difference
from .pictures import draw_curves

METRICS = {
    "reward_best": "best reward of {k} completions",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU (lower = more varied)",
    "dispersion": "dispersion of sentence embeddings",
    "entropy": "token entropy (nats)",
    "length": "length (tokens)",
}
"""Metric of an evaluation -> name in the table; the others are their own."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join("-" * width for width in widths), *lines[1:]])


def estimates_table(evaluation: Evaluation, resamples: int) -> str:
    """One evaluation as a Markdown table."""
    rows = [[_name(name, evaluation), str(found)] for name, found in evaluation.estimates(resamples).items()]
    return markdown_table([str(evaluation), "mean [95 % interval]"], rows)


def summary_table(run: Path, resamples: int) -> str:
    """The first and the last evaluation of every dataset and the change, as Markdown; empty where
    there is only one.
    """
    evaluations, parts = [Evaluation(**row) for row in read(run, "evaluations")], []
    for kind in dict.fromkeys((e.dataset, e.greedy) for e in evaluations):
        before, *_, after = [e for e in evaluations if (e.dataset, e.greedy) == kind] * 2
        first, last = before.estimates(resamples), after.estimates(resamples)
        rows = [
            [_name(key, after), *map(str, (first[key], last[key], difference(before, after, key, resamples)))]
            for key in first
            if key in last  # pass@k is measured only where all rewards are 0 or 1
        ]
        if before.step < after.step:
            header = ["", f"before (step {before.step})", f"after (step {after.step})", "change"]
            parts.append(f"{run.name}: {after}, mean [95 % interval]\n\n{markdown_table(header, rows)}")
    return "\n\n".join(parts)


def write_report(runs: Sequence[Path], directory: Path, *, resamples: int = 2000) -> tuple[Path, Path]:
    """Write curves.png and report.md to ``directory``, and return their paths.

    Raises:
        DataError: a run without a single finished step.
    """
    unique = len({run.name for run in runs}) == len(runs)
    named = {run.name if unique else str(run): run for run in runs}
    drawn = {n: (read(run, "metrics"), [Evaluation(**row) for row in read(run, "evaluations")]) for n, run in named.items()}
    for name, (rows, _) in drawn.items():
        if not rows:
            raise DataError(f"report: expected a run with metrics.jsonl, got {named[name]}")
    directory.mkdir(parents=True, exist_ok=True)
    picture, page = directory / "curves.png", directory / "report.md"
    draw_curves(drawn, picture)
    sections = [f"# {', '.join(named)}\n\n![curves](curves.png)"]
    for name, run in named.items():
        c = _settings(run / "config.toml")
        about = (
            f"{c['model']['path']}, method {c['loss']['method']}, seed {c['seed']}, {drawn[name][0][-1]['step']} of "
            f"{c['steps']} steps, {c['rollout']['prompts']} prompts x {c['rollout']['responses']} completions a step, learning "
            f"rate {c['optim']['lr']}, LoRA rank {c['lora']['rank']} (0 = all weights)."
        )
        sections += [f"## {name}", about, summary_table(run, resamples), *_samples(read(run, "samples"))]
    page.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    return picture, page


def _settings(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"report: expected the settings of a run in {file}, got: {error}") from error


def _samples(samples: Sequence[Mapping[str, Any]]) -> Iterator[str]:
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


def _name(metric: str, evaluation: Evaluation) -> str:
    return METRICS.get(metric, metric).format(k=evaluation.responses)
