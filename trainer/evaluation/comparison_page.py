"""The page and the picture of a comparison."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from .comparison import CURVES, Comparison, load_comparison, smooth
from .comparison_tables import tables, title

BEGIN, END = "<!-- generated: comparison -->", "<!-- /generated -->"


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
