"""The bars: ratios of times that this project wants to reach on an H100 or H200, and whether a GPU result reaches them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .groups import FLOOR, Group, Row, is_floor, is_ours, markdown_table, over

_Measured = TypeVar("_Measured", bound=tuple[Any, ...])

_CACHED = 2**30
"""Bytes of 16-bit logits up to which the op is to keep them for its backward."""


@dataclass(frozen=True)
class Who:
    """Providers: in words, and whether a name is among them. The fastest of them counts."""

    words: str
    includes: Callable[[str], bool]


@dataclass(frozen=True)
class Where:
    """Cases: in words (empty for all), and whether a case is among them."""

    words: str
    includes: Callable[[Group], bool]


@dataclass(frozen=True)
class Bar:
    """A wanted ratio of times.

    Attributes:
        mode: the mode of ``top`` and ``bottom``.
        top, bottom: whose times are divided. Without ``bottom``: everyone in ``top`` by their own ``fwd_bwd`` time of the case.
        sign, bound: "<=" or ">=", and the number.
        where: the cases it is about.
    """

    mode: str
    top: Who
    bottom: Who | None
    sign: str
    bound: float
    where: Where

    def __str__(self) -> str:
        ratio = f"{self.top.words} / {self.bottom.words if self.bottom else 'own dense time'}"
        return f"{ratio}, {self.where.words}" if self.where.words else ratio

    def met(self, ratio: float) -> bool:
        return ratio <= self.bound if self.sign == "<=" else ratio >= self.bound

    def worst(self, measured: list[_Measured]) -> _Measured:
        """The entry whose ratio, its first item, is furthest to the wrong side."""
        return (max if self.sign == "<=" else min)(measured, key=lambda entry: entry[0])


def _named(*names: str) -> Who:
    return Who(" or ".join(f"`{name}`" for name in names), lambda name: name in names)


_OURS = Who("ours", is_ours)
_ONE_PASS = Who("ours in one pass", lambda name: is_ours(name) and name.endswith("_one_pass"))
_OP = Who("our op", lambda name: is_ours(name) and name.endswith(("_op", "_autograd")))
_PRODUCTS = Who("matrix products", lambda name: name == FLOOR)
_PEERS = Who("every other", lambda name: not is_ours(name) and not is_floor(name))
_QUACK = _named("quack", "quack_base")
_TORCH_LCE = Who("`F.linear_cross_entropy`", lambda name: name.startswith("torch_lce"))
_UNSLOTH = _named("unsloth_logprobs")
_REST = Who("every other", lambda name: _PEERS.includes(name) and not _UNSLOTH.includes(name))
_LIGER_SCALED, _VERL, _VERL_TORCH, _TRL = map(_named, ("liger_scaled_ce", "verl_triton", "verl_torch", "trl_fused_head"))

_ALL = Where("", lambda g: True)
_WIDE = Where("D >= 3584", lambda g: g.d >= 3584)
_MIDDLE = Where("2048 <= D < 3584", lambda g: 2048 <= g.d < 3584)
_NARROW = Where("D < 2048", lambda g: g.d < 2048)
_ABOVE_2048 = Where("D > 2048", lambda g: g.d > 2048)
_TO_2048 = Where("D <= 2048", lambda g: g.d <= 2048)
_KEPT = Where("logits up to 1 GiB", lambda g: 2 * g.n * g.v <= _CACHED)
_NOT_KEPT = Where("logits beyond 1 GiB", lambda g: 2 * g.n * g.v > _CACHED)
_LIKE_TEXT = Where("peaked or real", lambda g: g.inputs in ("peaked", "real"))
_LONG = Where("N >= 16384", lambda g: g.n >= 16384)
_SHORT = Where("N = 4096, V >= 128000", lambda g: g.n == 4096 and g.v >= 128000)


def _from_4096_tokens(where: Where) -> Where:
    return Where(f"{where.words}, N >= 4096", lambda g: g.n >= 4096 and where.includes(g))


BARS = (
    Bar("fwd", _OURS, _PRODUCTS, "<=", 1.05, _WIDE),
    Bar("fwd", _OURS, _PRODUCTS, "<=", 1.10, _MIDDLE),
    Bar("fwd", _OURS, _PRODUCTS, "<=", 1.25, _NARROW),
    Bar("fwd", _LIGER_SCALED, _OURS, ">=", 1.00, _ABOVE_2048),
    Bar("fwd", _LIGER_SCALED, _OURS, ">=", 1.10, _TO_2048),
    Bar("fwd", _VERL, _OURS, ">=", 1.5, _ALL),
    Bar("fwd", _VERL_TORCH, _OURS, ">=", 2.5, _ALL),
    Bar("fwd", _TRL, _OURS, ">=", 2.5, _ALL),
    Bar("fwd_bwd", _ONE_PASS, _PRODUCTS, "<=", 1.06, _from_4096_tokens(_WIDE)),
    Bar("fwd_bwd", _ONE_PASS, _PRODUCTS, "<=", 1.12, _from_4096_tokens(_MIDDLE)),
    Bar("fwd_bwd", _ONE_PASS, _PRODUCTS, "<=", 1.25, _from_4096_tokens(_NARROW)),
    Bar("fwd_bwd", _LIGER_SCALED, _ONE_PASS, ">=", 1.25, _ALL),
    Bar("fwd_bwd", _QUACK, _ONE_PASS, ">=", 0.97, _ABOVE_2048),
    Bar("fwd_bwd", _QUACK, _ONE_PASS, ">=", 1.00, _TO_2048),
    Bar("fwd_bwd", _named("liger_cute_flce"), _ONE_PASS, ">=", 1.0, _ALL),
    Bar("fwd_bwd", _VERL, _ONE_PASS, ">=", 1.9, _ALL),
    Bar("fwd_bwd", _VERL_TORCH, _ONE_PASS, ">=", 2.8, _ALL),
    Bar("fwd_bwd", _TRL, _ONE_PASS, ">=", 2.0, _ALL),
    Bar("fwd_bwd", _named("liger_grpo", "liger_grpo_whole"), _ONE_PASS, ">=", 4.0, _ALL),
    Bar("fwd_bwd", _named("liger_flce"), _ONE_PASS, ">=", 2.2, _LONG),
    Bar("fwd_bwd", _named("liger_flce"), _ONE_PASS, ">=", 7.0, _SHORT),
    Bar("fwd_bwd", _named("cce_exact"), _ONE_PASS, ">=", 3.0, _ALL),
    Bar("fwd_bwd", _named("cce"), _ONE_PASS, ">=", 1.3, _LIKE_TEXT),
    Bar("fwd_bwd", _TORCH_LCE, _ONE_PASS, ">=", 1.2, _ALL),
    Bar("fwd_bwd", _OP, _PRODUCTS, "<=", 1.08, _KEPT),
    Bar("fwd_bwd", _OP, _PRODUCTS, "<=", 1.40, _NOT_KEPT),
    Bar("fwd_bwd", _LIGER_SCALED, _OP, ">=", 1.2, _KEPT),
    Bar("fwd_bwd", _LIGER_SCALED, _OP, ">=", 1.0, _NOT_KEPT),
    Bar("frozen_head", _OURS, _PRODUCTS, "<=", 1.08, _ALL),
    Bar("frozen_head", _UNSLOTH, _OURS, ">=", 1.3, _ALL),
    Bar("frozen_head", _REST, _OURS, ">=", 1.4, _ALL),
    Bar("half_zero_rows", _OURS, None, "<=", 0.60, _ALL),
    Bar("half_zero_rows", _PEERS, None, ">=", 0.95, _ALL),
)


def bars_table(found: list[Group]) -> list[str]:
    """Lines of Markdown: each bar with the worst ratio measured, whose times they are, and in how many cases the bar is met."""
    head = ("ratio of times", "mode", "wanted", "worst", "providers", "case", "met")
    return markdown_table(head, [_line(bar, found) for bar in BARS], words=2)


def _line(bar: Bar, found: list[Group]) -> list[str]:
    cells = [str(bar), f"`{bar.mode}`", f"{bar.sign} {bar.bound:.2f}"]
    cases = [group for group in found if group.mode == bar.mode and bar.where.includes(group)]
    measured = [(*ratio, group.case) for group in cases if (ratio := _ratio(bar, group, found))]
    if not measured:
        return [*cells, "-", "-", "-", f"not measured: {_missing(bar, cases)}"]
    worst, providers, case = bar.worst(measured)
    met = sum(bar.met(measurement[0]) for measurement in measured)
    return [*cells, f"{worst:.2f}", providers, case, f"{'yes' if met == len(measured) else '**no**'}, {met} of {len(measured)}"]


def _ratio(bar: Bar, group: Group, found: list[Group]) -> tuple[float, str] | None:
    """The ratio in one case and the providers it is of; None where somebody is missing."""
    if bar.bottom is None:
        dense = {row["provider"]: row for g in found if g.mode == "fwd_bwd" and g.case == group.case for row in g.timed}
        mine = [row for row in group.timed if bar.top.includes(row["provider"]) and row["provider"] in dense]
        own = [(_ms(row) / _ms(dense[row["provider"]]), f"`{row['provider']}`") for row in mine]
        return bar.worst(own) if own else None
    top, bottom = group.fastest(bar.top.includes), group.fastest(bar.bottom.includes)
    if top is None or bottom is None:
        return None
    ratio = over(top, FLOOR) if bar.bottom is _PRODUCTS else None  # of the same rounds, where the file has it
    return ratio or _ms(top) / _ms(bottom), f"`{top['provider']}` / `{bottom['provider']}`"


def _missing(bar: Bar, cases: list[Group]) -> str:
    if not cases:
        return "no such case"
    absent = [who.words for who in (bar.top, bar.bottom) if who and not any(g.fastest(who.includes) for g in cases)]
    return f"{' and '.join(absent)} did not run" if absent else "no dense time" if bar.bottom is None else "never together"


def _ms(row: Row) -> float:
    return row["ms"]["p50"]
