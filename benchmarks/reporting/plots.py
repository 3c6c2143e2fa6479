"""Plots of a result as PNG and SVG: time over the floor and peak memory along N and V, errors along the largest logit.

A panel is drawn where at least two cases differ in nothing but what its axis shows. Each family of providers has one line, that
of its fastest variant in the panel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .groups import FLOOR, Group, Result, Row, family, groups, is_floor, is_ours, over

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

_OTHER, _GRID = "#999999", "#E2E2E2"
_WIDTH, _HEIGHT, _COLUMNS = 6.4, 4.2, 2
_LEAST_SPAN = 2.0
"""Largest over smallest value of a y axis, at least: small differences are to look small."""


@dataclass(frozen=True)
class Plot:
    """One file: what is drawn over what.

    Attributes:
        name: of the files.
        along: in words, the x axis; ``x``: its value in a case.
        fixed: a case -> what must be equal within a panel.
        up: in words, the y axis; ``y``: its value in a row, or None.
        floor: whether 1 is the matrix products' line.
    """

    name: str
    along: str
    x: Callable[[Group], float]
    fixed: Callable[[Group], tuple[str, ...]]
    up: str
    y: Callable[[Row], float | None]
    floor: bool = False


@dataclass(frozen=True)
class Panel:
    """``lines``: by provider, its points (x, y) by x."""

    title: str
    lines: dict[str, list[tuple[float, float]]]


def _along_n(g: Group) -> tuple[str, ...]:
    return g.mode, g.inputs, f"D={g.d}", f"V={g.v}", g.dtype


def _along_v(g: Group) -> tuple[str, ...]:
    return g.mode, g.inputs, f"N={g.n}", f"D={g.d}", g.dtype


def _along_logit(g: Group) -> tuple[str, ...]:
    return g.mode, f"N={g.n}", f"D={g.d}", f"V={g.v}", g.dtype


def _largest_logit(g: Group) -> float:
    return float(g.rows[0]["largest_logit"])


def _error(name: str) -> Callable[[Row], float | None]:
    """Errors of the policy loss's job only: other objectives have other gradients, and other errors."""
    return lambda row: float(row["errors"][name]) if row["objective"] == "policy" and name in row["errors"] else None


def _time(row: Row) -> float | None:
    return over(row, FLOOR)


def _mebibytes(row: Row) -> float | None:
    return None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20


_TIME, _LOGIT = "time / matrix products", "largest |logit|"
PLOTS = (
    Plot("time_over_n", "tokens N", lambda g: g.n, _along_n, _TIME, _time, floor=True),
    Plot("time_over_v", "vocabulary V", lambda g: g.v, _along_v, _TIME, _time, floor=True),
    Plot("memory_over_n", "tokens N", lambda g: g.n, _along_n, "peak MiB", _mebibytes),
    Plot("logp_error_over_logit", _LOGIT, _largest_logit, _along_logit, "relative error of logp", _error("logp")),
    Plot("d_hidden_error_over_logit", _LOGIT, _largest_logit, _along_logit, "relative error of d_hidden", _error("d_hidden")),
    Plot("d_weight_error_over_logit", _LOGIT, _largest_logit, _along_logit, "relative error of d_weight", _error("d_weight")),
)


def draw(result: Result, folder: Path) -> list[Path]:
    """Write every plot that has a panel, and return the PNGs' paths; an SVG of the same name lies beside each.

    Raises ImportError without matplotlib.
    """
    found, paths = groups(result), []
    for plot in PLOTS:
        drawn = panels(plot, found)
        if drawn:
            folder.mkdir(parents=True, exist_ok=True)
            figure = _figure(plot, drawn)
            paths.append(folder / f"{plot.name}.png")
            figure.savefig(paths[-1], dpi=150)
            figure.savefig(paths[-1].with_suffix(".svg"), metadata={"Date": None})
    return paths


def panels(plot: Plot, found: list[Group]) -> list[Panel]:
    """The panels that have a line of at least two points."""
    series: dict[tuple[str, ...], list[Group]] = {}
    for group in found:
        series.setdefault(plot.fixed(group), []).append(group)
    drawn = [Panel(" ".join(key), _lines(plot, members)) for key, members in series.items()]
    return [panel for panel in drawn if panel.lines]


def _lines(plot: Plot, members: list[Group]) -> dict[str, list[tuple[float, float]]]:
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


def _figure(plot: Plot, drawn: list[Panel]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots: expected matplotlib, got none; pip install '.[train]'") from error
    columns = min(_COLUMNS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), facecolor="white", layout="constrained")
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, drawn, strict=False):
        _draw_panel(axes, plot, panel)
    for axes in list(figure.axes)[len(drawn) :]:
        axes.set_visible(False)
    return figure


def _draw_panel(axes: Any, plot: Plot, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for name, points in panel.lines.items():
        ours, plain = is_ours(name), name.startswith("unfused_")
        x, y = zip(*points, strict=True)
        axes.plot(
            x,
            y,
            color=_COLORS.get(family(name), _OTHER),
            linewidth=3.0 if ours else 1.3,
            linestyle="--" if plain else "-",
            marker="o",
            markersize=6 if ours else 3.5,
            zorder=2 if ours else 3,  # the wide line below, so that neither hides the other
        )
    low, high = axes.get_ylim()
    missing = max(1.0, _LEAST_SPAN / (high / low)) ** 0.5
    axes.set_ylim(low / missing, high * missing)
    if plot.floor:
        axes.axhline(1.0, color=_OTHER, linewidth=1.0, linestyle=":", zorder=1)
        axes.set_ylim(bottom=min(axes.get_ylim()[0], 0.94))
    ticks = sorted({x for points in panel.lines.values() for x, _ in points})
    axes.set_xticks(ticks, _tick_names(ticks), fontsize=8)
    axes.minorticks_off()
    _y_ticks(axes)
    axes.grid(True, color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(plot.along, fontsize=9)
    axes.set_ylabel(plot.up, fontsize=9)
    _label_ends(axes, plot, panel)


def _tick_names(ticks: list[float]) -> list[str]:
    """A tick at every case; names only where they do not run into the one before."""
    names, last, least = [], -math.inf, 0.07 * math.log(ticks[-1] / ticks[0])
    for tick in ticks:
        fits = math.log(tick) - last >= least
        names.append((f"{tick:.0f}" if tick >= 100 else f"{tick:.3g}") if fits else "")
        last = math.log(tick) if fits else last
    return names


def _y_ticks(axes: Any) -> None:
    """Round numbers, the fewer in a decade the more decades there are."""
    low, high = axes.get_ylim()
    span = math.log10(high / low)
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if span < 0.7 else (1, 2, 5) if span < 3 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [tick for decade in decades for step in steps if low <= (tick := step * 10.0**decade) <= high]
    if ticks:
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)


def _label_ends(axes: Any, plot: Plot, panel: Panel) -> None:
    """Each line's name at its right end, moved apart where names would overlap."""
    low, high = map(math.log, axes.get_ylim())
    ends = {name: (math.log(points[-1][1]) - low) / (high - low) for name, points in panel.lines.items()}
    if plot.floor:
        ends["matrix products"] = (0.0 - low) / (high - low)
    right = max(x for points in panel.lines.values() for x, _ in points)
    for name, place in _apart(ends, 0.055).items():
        points = panel.lines.get(name, [(right, 1.0)])
        color = _COLORS.get(family(name), _OTHER)
        axes.annotate(
            name,
            xy=points[-1],
            xytext=(1.04, place),
            textcoords="axes fraction",
            fontsize=8,
            fontweight="bold" if is_ours(name) else "normal",
            color=color,
            va="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def _apart(places: dict[str, float], gap: float) -> dict[str, float]:
    """The places, at least ``gap`` from each other in the same order, moved as a block where they would leave the top."""
    moved: dict[str, float] = {}
    last = -math.inf
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        last = max(place, last + gap)
        moved[name] = last
    excess = max(0.0, last - 1.0)
    below = math.inf
    for name in reversed(moved):
        moved[name] = min(moved[name], below - gap) if below < math.inf else moved[name] - excess
        below = moved[name]
    return moved
