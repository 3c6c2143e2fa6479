"""results.jsonl, the pre-registered test, the page's tables and the figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.diversity import bootstrap
from trainer.evaluation.evaluate import markdown_table

from .arms import ARMS, CONTROL, SEARCH_SEED, TESTED, TITLES

RESULTS, PAGE, FIGURE = "results.jsonl", "README.md", "curves.png"
BEGIN, END = "<!-- generated -->", "<!-- /generated -->"
MEASURED = {
    "pass@1": "pass@1",
    "pass@16": "pass@16",
    "distinct_right": "distinct right answers of 16",
    "entropy": "entropy (nats a token)",
}
COLLAPSE = 0.5
"""A run has collapsed when its last pass@1 is below this share of its highest."""
RESAMPLES = 10_000
"""Of the bootstrap over seeds."""

Row = dict[str, Any]
Numbers = NDArray[np.float64]


def load(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().split("\n") if line] if file.exists() else []


def rounded(value: Any) -> Any:
    """Floats with four significant digits, but for learning rates and weights, in any nesting."""
    if isinstance(value, dict):
        return {key: item if key in ("lr", "positive_weight") else rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def best_rate(rows: Sequence[Row], arm: str) -> float:
    """The learning rate whose search run ended with the highest pass@1; the smallest of equals."""
    own = [row for row in rows if row["arm"] == arm and row["seed"] == SEARCH_SEED]
    return float(min(own, key=lambda row: (-row["evaluations"][-1]["pass@1"], row["lr"]))["lr"])


def main_runs(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Arm -> seed -> run, without the search."""
    found: dict[str, dict[int, Row]] = {arm: {} for arm in ARMS}
    for row in rows:
        if row["seed"] != SEARCH_SEED:
            found[row["arm"]][row["seed"]] = row
    return {arm: dict(sorted(runs.items())) for arm, runs in found.items() if runs}


def curve(row: Row, metric: str) -> Numbers:
    """Its values at the evaluations."""
    return np.array([found[metric] for found in row["evaluations"]])


def at_quality(row: Row, metric: str, quality: float) -> float:
    """The metric where the run's pass@1 first reaches ``quality``, linear between evaluations."""
    reached, values = curve(row, "pass@1"), curve(row, metric)
    place = int(np.argmax(reached >= quality))
    if place == 0:
        return float(values[0])
    share = (quality - reached[place - 1]) / (reached[place] - reached[place - 1])
    return float(values[place - 1] + share * (values[place] - values[place - 1]))


def gaps(own: Mapping[int, Row], base: Mapping[int, Row], metric: str) -> Numbers:
    """[seeds of both]: own minus base where both first reach the highest pass@1 that both reach."""
    found = []
    for seed in sorted(own.keys() & base.keys()):
        quality = min(float(curve(run[seed], "pass@1").max()) for run in (own, base))
        found.append(at_quality(own[seed], metric, quality) - at_quality(base[seed], metric, quality))
    return np.array(found)


def sign_flips(differences: Numbers) -> float:
    """Two-sided p of the exact sign-flip test of a mean of zero: the share of all 2^n sign patterns whose mean is at
    least as far from zero.
    """
    signs = np.array(list(product((-1, 1), repeat=len(differences))))
    return float((np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean())


def tables(rows: Sequence[Row]) -> str:
    """The generated part of the page."""
    arms, parts = main_runs(rows), []
    if TESTED in arms and CONTROL in arms:
        found = gaps(arms[TESTED], arms[CONTROL], "pass@16")
        each = ", ".join(f"{value:+.3f}" for value in found)
        parts.append(
            f'**The test.** pass@16 at equal pass@1, "{TITLES[TESTED]}" minus "{TITLES[CONTROL]}", {len(found)} pairs: '
            f"{bootstrap(found.tolist(), RESAMPLES)}, p = {sign_flips(found):.3f}. Each seed: {each}."
        )
    ends = []
    for arm, runs in arms.items():
        last = {metric: np.array([curve(row, metric)[-1] for row in runs.values()]) for metric in MEASURED}
        weights = np.mean([np.mean(row["curves"]["weight"]) for row in runs.values()])
        collapsed = sum(
            row["diverged"] is not None or curve(row, "pass@1")[-1] < COLLAPSE * curve(row, "pass@1").max()
            for row in runs.values()
        )
        rates = "/".join(f"{rate:g}" for rate in sorted({row["lr"] for row in runs.values()}))
        shown = [f"{values.mean():.3f} ± {values.std(ddof=1) if len(values) > 1 else 0:.3f}" for values in last.values()]
        ends.append([TITLES[arm], rates, str(len(runs)), f"{weights:.2f}", *shown, str(collapsed)])
    names = ["learning rate", "seeds", "mean weight", *MEASURED.values(), "collapsed"]
    parts += ["**After training: mean ± standard deviation between seeds.**", markdown_table(["", *names], ends)]
    if CONTROL in arms:
        equal = [
            [TITLES[arm], str(len(gaps(runs, arms[CONTROL], "pass@16"))),
             *(str(bootstrap(gaps(runs, arms[CONTROL], metric).tolist(), RESAMPLES)) for metric in list(MEASURED)[1:])]
            for arm, runs in arms.items()
            if arm != CONTROL and runs.keys() & arms[CONTROL].keys()
        ]  # fmt: skip
        parts += [
            f"**At equal pass@1, minus {TITLES[CONTROL]}: mean [95 % interval over seeds].**",
            markdown_table(["", "pairs", *list(MEASURED.values())[1:]], equal),
        ]
    parts.append(f"![curves]({FIGURE})")
    parts.append(time_taken(rows))
    return "\n\n".join(parts)


def time_taken(rows: Sequence[Row]) -> str:
    """In medians, because a run may wait for other work on the machine."""
    seconds: dict[int, list[float]] = {}
    for row in sorted(rows, key=lambda row: -row["steps"]):
        seconds.setdefault(row["steps"], []).append(row["seconds"])
    medians = {steps: float(np.median(own)) for steps, own in seconds.items()}
    each = ", ".join(f"{len(own)} of {steps} steps, {medians[steps]:.0f} s each" for steps, own in seconds.items())
    total = sum(len(own) * medians[steps] for steps, own in seconds.items()) / 60
    return f"{len(rows)} runs ({each}, in the median): {total:.0f} minutes of one core."


def draw_figure(rows: Sequence[Row], target: Path) -> None:
    """Measurements over steps, and pass@16 and distinct right answers over pass@1; thin lines are seeds."""
    arms = main_runs(rows)
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    panels = [("step", metric) for metric in MEASURED] + [("pass@1", "pass@16"), ("pass@1", "distinct_right")]
    for axis, (below, metric) in zip(axes.flat, panels, strict=True):
        for number, (arm, runs) in enumerate(arms.items()):
            lines = [(curve(row, below), curve(row, metric)) for row in runs.values()]
            if below == "step":
                for across, values in lines:
                    axis.plot(across, values, color=f"C{number}", linewidth=0.6, alpha=0.35)
            shortest = min(len(values) for _, values in lines)  # of a run that diverged
            mean = [np.mean([line[i][:shortest] for line in lines], axis=0) for i in range(2)]
            axis.plot(*mean, color=f"C{number}", linewidth=2.2, marker="o", markersize=3, label=f"{TITLES[arm]} ({len(runs)})")
        axis.set_title(MEASURED[metric] + (" over pass@1 (means)" if below == "pass@1" else ""), fontsize=10)
        axis.set_xlabel(below, fontsize=9)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def draw(folder: Path) -> None:
    """Renew the figure and the generated part of the page in ``folder``."""
    rows = load(folder / RESULTS)
    draw_figure(rows, folder / FIGURE)
    page = folder / PAGE
    old = page.read_text() if page.exists() else f"# Many right answers\n\n{BEGIN}\n{END}\n"
    page.write_text(f"{old.partition(BEGIN)[0]}{BEGIN}\n{tables(rows)}\n{END}{old.partition(END)[2]}")
    print(page)
