"""Figures and a Markdown page from run directories."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..runs.rundir import read
from .evaluate import Evaluation, difference
from .pictures import CURVES, draw_curves, draw_diagnostics

METRICS = {
    "reward": "reward",
    "reward_best": "best reward of {k} completions",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU (lower = more varied)",
    "dispersion": "dispersion of sentence embeddings",
    "entropy": "token entropy (nats)",
    "length": "length (tokens)",
    "truncated": "truncated",
}
"""Metric of an evaluation -> name in the table; pass@k is its own name."""


DIAGNOSTICS = """\
How the updates changed the entropy (docs/math.md, E7). Raising the probability of a token with polarity D > 0 contracts the
entropy, with D < 0 it expands it. The gradient share is the part of the squared gradient that comes from positive completions.
The prediction is first order in each token's logits, so only its sign and relative size are meaningful."""


def metric_name(metric: str, responses: int) -> str:
    """Name of a metric in a table; ``responses`` is the number of completions of each prompt."""
    return METRICS.get(metric, metric).format(k=responses)


def first_and_last(run: Path) -> list[tuple[Evaluation, Evaluation]]:
    """The first and the last evaluation of every dataset that was evaluated at least twice."""
    by_set: dict[str, list[Evaluation]] = {}
    for row in read(run, "evaluations"):
        by_set.setdefault(row["dataset"], []).append(Evaluation(**row))
    return [(found[0], found[-1]) for found in by_set.values() if len(found) > 1]


def comparison(before: Evaluation, after: Evaluation, resamples: int) -> list[list[str]]:
    """Rows of metric, before, after and change, each mean with its 95 % interval."""
    first, last = before.estimates(resamples), after.estimates(resamples)
    return [
        [metric_name(key, before.responses), *map(str, (first[key], last[key], difference(before, after, key, resamples)))]
        for key in first
        if key in last  # pass@k is measured only where all rewards are 0 or 1
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join("-" * width for width in widths), *lines[1:]])


def estimates_table(evaluation: Evaluation, resamples: int) -> str:
    """One evaluation as a Markdown table."""
    found = evaluation.estimates(resamples)
    rows = [[metric_name(name, evaluation.responses), str(estimate)] for name, estimate in found.items()]
    prompts = len(evaluation.values["reward"])
    return markdown_table(
        [f"{prompts} {evaluation.dataset} prompts, {evaluation.responses} completions each", "mean [95 % interval]"],
        rows,
    )


def summary_table(run: Path, resamples: int) -> str:
    """Before/after tables of one run as Markdown; empty when it was not evaluated twice."""
    parts = []
    for before, after in first_and_last(run):
        prompts = len(before.values["reward"])
        title = f"{run.name}: {prompts} {before.dataset} prompts, {before.responses} completions each, mean [95 % interval]"
        header = ["", f"before (step {before.step})", f"after (step {after.step})", "change"]
        parts.append(f"{title}\n\n{markdown_table(header, comparison(before, after, resamples))}")
    return "\n\n".join(parts)


def write_report(runs: Sequence[Path], directory: Path, *, resamples: int = 2000) -> tuple[Path, Path]:
    """Write curves.png, report.md and, where they were measured, diagnostics.png to ``directory``.

    Returns:
        The paths of the curves and of the page.

    Raises:
        DataError: a run without a single finished step.
    """
    rows = {run: read(run, "metrics") for run in runs}
    for run, found in rows.items():
        if not found:
            raise DataError(f"report: expected a run with metrics.jsonl, got {run}")
    directory.mkdir(parents=True, exist_ok=True)
    picture, page, diagnostics = (directory / name for name in ("curves.png", "report.md", "diagnostics.png"))
    diagnostics.unlink(missing_ok=True)
    unique = len({run.name for run in runs}) == len(runs)
    named = {run.name if unique else str(run): found for run, found in rows.items()}
    draw_curves(named, picture)
    sections = ["# " + ", ".join(named), "![curves](curves.png)"]
    if draw_diagnostics(named, diagnostics):
        sections += [DIAGNOSTICS, "![diagnostics](diagnostics.png)"]
    for run in runs:
        sections += _run_section(run, resamples)
    page.write_text("\n\n".join(sections) + "\n")
    return picture, page


def _run_section(run: Path, resamples: int) -> list[str]:
    config = tomllib.loads((run / "config.toml").read_text())
    rows = read(run, "metrics")
    picked = [*CURVES, "clip_fraction"]
    header = ["step", *picked]
    shown = rows[:: max(1, len(rows) // 10)]
    shown = shown if shown[-1] is rows[-1] else [*shown, rows[-1]]
    curve = [[str(row["step"]), *(_number(row.get(name)) for name in picked)] for row in shown]
    about = (
        f"{config['model']['path']}, method {config['loss']['method']}, seed {config['seed']}, {rows[-1]['step']} of "
        f"{config['steps']} steps, {config['rollout']['prompts']} prompts x {config['rollout']['responses']} completions "
        f"a step, learning rate {config['optim']['lr']}, LoRA rank {config['lora']['rank']} (0 = all weights)."
    )
    sections = [f"## {run.name}", about, summary_table(run, resamples), markdown_table(header, curve), _best_and_worst(run)]
    return [section for section in [*sections, _samples(run)] if section]


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def _samples(run: Path) -> str:
    """Completions of the same evaluation prompts, first and last."""
    rows = [row for row in read(run, "samples") if row.get("dataset") == "held-out"]
    if not rows:
        return ""
    first, last = rows[0]["step"], rows[-1]["step"]
    lines = ["One completion each to the first held-out prompts:"]
    for before in [row for row in rows if row["step"] == first][:3]:
        after = next(row for row in rows if row["step"] == last and row["prompt"] == before["prompt"])
        lines.append(
            f"- {_text(before['prompt'])}\n  - step {first}: {before['completion']!r}\n  - step {last}: {after['completion']!r}"
        )
    return "\n".join(lines)


def _best_and_worst(run: Path, most: int = 5) -> str:
    """The best and the worst completion of up to ``most`` steps, evenly spaced, the first and the
    last step included.
    """
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in read(run, "samples"):
        if "dataset" not in row:
            by_step.setdefault(row["step"], []).append(row)
    if not by_step:
        return ""
    steps = sorted(by_step)
    chosen = sorted({steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)})
    lines = ["Best and worst completion of a step:"]
    for step in chosen:
        ranked = sorted(by_step[step], key=lambda row: -row["reward"])
        lines.append(f"- step {step}")
        for name, row in {"best": ranked[0], "worst": ranked[-1]}.items():
            lines.append(f"  - {name}, reward {row['reward']:.3f}: {_text(row['prompt'])} -> {row['completion']!r}")
    return "\n".join(lines)


def _text(prompt: Any) -> str:
    """A prompt's text; for chat messages, the last one's."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
