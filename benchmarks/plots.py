"""Plots of a result as PNG: time over the floor and peak memory along N and V, errors along the
largest logit.

A panel is drawn where at least two cases differ in nothing but what its axis shows. Each family of
implementations has one line, that of its fastest variant in the panel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .case import SPARSE_MODES
from .report import FLOOR, Group, Result, Row, family, groups, is_floor, is_ours, over

_COLORS = {
    "eapo": "#0072B2",
    "unfused_eager": "#000000",
    "unfused_compile": "#7A7A7A",
    "liger": "#D55E00",
    "quack": "#009E73",
    "cce": "#CC79A7",
    "verl": "#B8860B",
    "trl": "#2A9BD0",
    "torch": "#8C564B",
    "unsloth": "#882255",
}
"""Okabe and Ito's palette, with four darker colours where it has too few or too light ones."""

_COLUMNS = 2

Lines = dict[str, list[tuple[float, float]]]
"""By provider, its points (x, y) by x."""


@dataclass(frozen=True)
class Plot:
    """One file: what is drawn over what.

    Attributes:
        name: of the file.
        along: in words, the x axis; ``x``: its value in a case.
        fixed: the fields of a case that must be equal within a panel.
        up: in words, the y axis; ``y``: its value in a row, or None.
    """

    name: str
    along: str
    x: Callable[[Group], float]
    fixed: tuple[str, ...]
    up: str
    y: Callable[[Row], float | None]


def _error(name: str) -> Callable[[Row], float | None]:
    """Errors of the policy loss's job only: other objectives have other gradients, and other
    errors."""
    return lambda row: float(row["errors"][name]) if row["objective"] == "policy" and name in row["errors"] else None


def _mebibytes(row: Row) -> float | None:
    return None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20


def _largest_logit(group: Group) -> float:
    return float(group.rows[0]["largest_logit"])


_ALONG_N = ("mode", "inputs", "d", "v", "dtype", "memory_budget")
_ALONG_LOGIT = ("mode", "n", "d", "v", "dtype", "memory_budget")
PLOTS = (
    Plot("time_over_n", "tokens N", lambda g: g.n, _ALONG_N, "time / matrix products", lambda row: over(row, FLOOR)),
    Plot("memory_over_n", "tokens N", lambda g: g.n, _ALONG_N, "peak MiB", _mebibytes),
    *(
        Plot(
            f"{name}_error_over_logit",
            "largest |logit|",
            _largest_logit,
            _ALONG_LOGIT,
            f"relative error of {name}",
            _error(name),
        )
        for name in ("logp", "d_hidden", "d_weight")
    ),
)


def draw(result: Result, folder: Path) -> list[Path]:
    """Write every plot that has a panel, and return the PNGs' paths. Raises ImportError without
    matplotlib."""
    paths = []
    for plot in PLOTS:
        drawn = panels(plot, groups(result))
        if not drawn:
            continue
        rows = math.ceil(len(drawn) / _COLUMNS)
        figure = _figure(6.4 * _COLUMNS, 4.2 * rows)
        for place, (title, lines) in enumerate(drawn.items(), 1):
            axes = figure.add_subplot(rows, _COLUMNS, place)
            axes.set(title=title, xlabel=plot.along, ylabel=plot.up, xscale="log", yscale="log")
            for name, points in lines.items():
                axes.plot(
                    *zip(*points, strict=True), label=name, color=_COLORS.get(family(name), "#999999"), marker="o",
                    linewidth=3.0 if is_ours(name) else 1.3, linestyle="--" if name.startswith("unfused_") else "-",
                )  # fmt: skip
            axes.grid(True, color="#E2E2E2")
            axes.legend(fontsize=8)
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{plot.name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def _figure(width: float, height: float) -> Any:
    """An empty figure, inches. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots: expected matplotlib, got none; pip install '.[train]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def panels(plot: Plot, found: list[Group]) -> dict[str, Lines]:
    """By title, the panels that have a line of at least two points."""
    series: dict[str, list[Group]] = {}
    for group in found:
        fixed = {name: getattr(group, name) for name in plot.fixed}
        title = " ".join(f"{name}={value}" for name, value in fixed.items() if value is not None)
        series.setdefault(title, []).append(group)
    drawn = {title: _lines(plot, members) for title, members in series.items()}
    return {title: lines for title, lines in drawn.items() if lines}


def _lines(plot: Plot, members: list[Group]) -> Lines:
    points: dict[str, dict[float, float]] = {}
    times: dict[str, list[float]] = {}
    for group in members:
        for row in group.timed:
            value, name = plot.y(row), row["provider"]
            if value is not None and value > 0 and math.isfinite(value) and not is_floor(name):
                points.setdefault(name, {})[plot.x(group)] = value
                times.setdefault(name, []).append(math.log(row["ms"]["p50"]))
    # The variant that ran in most of the cases, then the fastest.
    best: dict[str, str] = {}
    for name in sorted(points, key=lambda n: (-len(points[n]), sum(times[n]))):
        if len(points[name]) >= 2:
            best.setdefault(family(name), name)
    return {name: sorted(points[name].items()) for name in best.values()}


def draw_sparse(result: Result, path: Path) -> None:
    """Time over three whole products, and what is kept, along the mean entropy, of the modes of ``SPARSE_MODES``.

    Nothing where the result has none of them. Raises ImportError without matplotlib.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    kept: list[tuple[float, float, float]] = []
    for group in groups(result):
        for row in group.timed if group.mode in SPARSE_MODES else ():
            x, time, metrics = row["mean_entropy_nats"], over(row, FLOOR), row.get("metrics")
            what = (
                row["provider"]
                .removeprefix("eapo_torch_")
                .replace("one_pass", "eapo_loss")
                .replace("exact", "eapo_loss, exact")
            )
            if (
                time is not None
                and not is_floor(row["provider"])
                and what in ("eapo_loss", "eapo_loss, exact", "unfused_eager")
            ):
                lines.setdefault(f"{what}, {group.mode.replace('_', ' ')}", []).append((x, time))
            if metrics:
                kept.append((x, metrics["sparse/kept_per_row"], metrics["sparse/dense_share"]))
    if not lines:
        return
    figure = _figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    for name, points in lines.items():
        ours = name.startswith("eapo")
        left.plot(
            *zip(*sorted(points), strict=True),
            label=name,
            marker="o",
            linestyle="-" if ours else "--",
            color=None if ours else "#7A7A7A",
        )
    left.set(xlabel="mean entropy, nats", ylabel="time / three whole products", ylim=(0, None))
    left.legend(fontsize=8)
    entropy, entries, dense = zip(*sorted(kept), strict=True)
    right.plot(entropy, entries, marker="o", label="entries of a sparse row")
    right.set(xlabel="mean entropy, nats", ylabel="entries a row", ylim=(0, None))
    share = right.twinx()
    share.plot(entropy, [100 * value for value in dense], marker="s", linestyle="--", color="#D55E00")
    share.set(ylabel="whole rows, % (dashed)", ylim=(0, 100))
    for axes in (left, right):
        axes.grid(True, color="#E2E2E2")
    figure.savefig(path, dpi=110)
