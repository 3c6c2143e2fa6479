"""The bars: ratios that this project wants to reach on an H100 or H200, and whether a GPU result reaches them."""

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
class Own:
    """Everyone's own number elsewhere: in words, and whether a group is where it is, for the group that is asked about."""

    words: str
    includes: Callable[[Group, Group], bool]


@dataclass(frozen=True)
class Quantity:
    """What is divided: in words, and of a row, None where the row has none. Of several providers the smallest counts."""

    words: str
    of: Callable[[Row], float | None]


def _memory(row: Row) -> float | None:
    """Bytes without the gradients that are returned."""
    size = {"float32": 4}.get(row["shape"]["dtype"], 2) * row["shape"]["D"]
    rows = {"fwd": 0, "frozen_head": row["shape"]["N"]}.get(row["mode"], row["shape"]["N"] + row["shape"]["V"])
    return None if row["peak_bytes"] is None else row["peak_bytes"] - rows * size


def _error(name: str) -> Quantity:
    return Quantity(f"{name} error", lambda row: row["errors"].get(name) if row["objective"] == "policy" else None)


TIME = Quantity("time", lambda row: row["ms"]["p50"] if row["ms"] else None)
MEMORY = Quantity("memory without results", _memory)
SLOWNESS = Quantity("time a token", lambda row: row["ms"]["p50"] / row["shape"]["N"] if row["ms"] else None)
LOGP, D_HIDDEN, D_WEIGHT = map(_error, ("logp", "d_hidden", "d_weight"))


@dataclass(frozen=True)
class Bar:
    """A wanted ratio.

    Attributes:
        mode: the mode of ``top`` and ``bottom``.
        top, bottom: whose numbers are divided; by an ``Own``, everyone's in ``top`` by their own.
        sign, bound: "<=" or ">=", and the number.
        where: the cases it is about.
        what: the numbers.
    """

    mode: str
    top: Who
    bottom: Who | Own
    sign: str
    bound: float
    where: Where
    what: Quantity = TIME

    def __str__(self) -> str:
        ratio = f"{self.top.words} / {self.bottom.words}" + (f", {self.where.words}" if self.where.words else "")
        return ratio if self.what is TIME else f"{self.what.words}: {ratio}"

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
_CUDA = Who("ours in CUDA C++", lambda name: name.startswith("eapo_cuda_"))
_TRITON = Who("ours in Triton", lambda name: name.startswith("eapo_triton_"))
_PRODUCTS = Who("matrix products", lambda name: name == FLOOR)
_PEERS = Who("every other", lambda name: not is_ours(name) and not is_floor(name))
_QUACK = _named("quack", "quack_base")
_TORCH_LCE = Who("`F.linear_cross_entropy`", lambda name: name.startswith("torch_lce"))
_UNSLOTH = _named("unsloth_logprobs")
_REST = Who("every other", lambda name: _PEERS.includes(name) and not _UNSLOTH.includes(name))
_LIGER_SCALED, _VERL, _VERL_TORCH, _TRL = map(_named, ("liger_scaled_ce", "verl_triton", "verl_torch", "trl_fused_head"))

_ROUNDED = Who("16-bit logits", lambda name: name in ("unfused_eager", "unfused_compile", "trl_fused_head", "verl_torch"))

_DENSE = Own("own dense time", lambda group, other: other.mode == "fwd_bwd" and other.case == group.case)
_AT_8192 = Own(
    "own time at N = 8192",
    lambda group, other: (
        (other.n, other.mode, other.inputs, other.d, other.v, other.dtype)
        == (8192, group.mode, group.inputs, group.d, group.v, group.dtype)
    ),
)

_ALL = Where("", lambda g: True)
_WIDE = Where("D >= 3584", lambda g: g.d >= 3584)
_MIDDLE = Where("2048 <= D < 3584", lambda g: 2048 <= g.d < 3584)
_NARROW = Where("D < 2048", lambda g: g.d < 2048)
_ABOVE_2048 = Where("D > 2048", lambda g: g.d > 2048)
_TO_2048 = Where("D <= 2048", lambda g: g.d <= 2048)
_KEPT = Where("logits up to 1 GiB", lambda g: 2 * g.n * g.v <= _CACHED)
_NOT_KEPT = Where("logits beyond 1 GiB", lambda g: 2 * g.n * g.v > _CACHED)
_LIKE_TEXT = Where("peaked or real", lambda g: g.inputs in ("peaked", "real"))
_AT_1024 = Where("D = 1024", lambda g: g.d == 1024)
_FEW = Where("N = 1024", lambda g: g.n == 1024)
_SHARP = Where("peaked or steep", lambda g: g.inputs in ("peaked", "steep"))
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
    Bar("half_zero_rows", _OURS, _DENSE, "<=", 0.60, _ALL),
    Bar("half_zero_rows", _PEERS, _DENSE, ">=", 0.95, _ALL),
    Bar("fwd_bwd", _ONE_PASS, _AT_8192, "<=", 1 / 0.85, _FEW, SLOWNESS),
    Bar("fwd", _CUDA, _PRODUCTS, "<=", 1.03, _WIDE),
    Bar("fwd", _CUDA, _PRODUCTS, "<=", 1.15, _AT_1024),
    Bar("fwd", _LIGER_SCALED, _CUDA, ">=", 1.00, _ALL),
    Bar("fwd", _TRITON, _CUDA, ">=", 1.00, _ALL),
    Bar("fwd_bwd", _TRITON, _CUDA, ">=", 1.00, _ALL),
    Bar("fwd_bwd", _ONE_PASS, _QUACK, "<=", 0.55, _ALL, MEMORY),
    Bar("fwd", _ROUNDED, _OURS, ">=", 50.0, _SHARP, LOGP),
    Bar("fwd", _LIGER_SCALED, _OURS, ">=", 50.0, _SHARP, LOGP),
    Bar("fwd_bwd", _ONE_PASS, _ROUNDED, "<=", 0.5, _SHARP, D_HIDDEN),
    Bar("fwd_bwd", _ONE_PASS, _ROUNDED, "<=", 0.5, _SHARP, D_WEIGHT),
)
"""Time on wanted places first, then what is wanted of the CUDA kernels, of memory and of accuracy."""


def bars_table(found: list[Group]) -> list[str]:
    """Lines of Markdown: each bar with the worst ratio measured, whose it is, and in how many cases the bar is met."""
    head = ("ratio", "mode", "wanted", "worst", "providers", "case", "met")
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
    if isinstance(bar.bottom, Own):
        includes = bar.bottom.includes
        elsewhere = {row["provider"]: row for g in found if includes(group, g) for row in g.timed}
        mine = [row for row in group.timed if bar.top.includes(row["provider"]) and row["provider"] in elsewhere]
        own = [(_value(bar, row) / _value(bar, elsewhere[row["provider"]]), f"`{row['provider']}`") for row in mine]
        return bar.worst(own) if own else None
    top, bottom = _best(bar, group, bar.top), _best(bar, group, bar.bottom)
    if top is None or bottom is None:
        return None
    floor = bar.bottom is _PRODUCTS and bar.what is TIME
    ratio = over(top, FLOOR) if floor else None  # of the same rounds, where the file has it
    return ratio or _value(bar, top) / _value(bar, bottom), f"`{top['provider']}` / `{bottom['provider']}`"


def _best(bar: Bar, group: Group, who: Who) -> Row | None:
    """The row of the smallest number of the providers asked for."""
    if bar.what is TIME:
        return group.fastest(who.includes)
    rows = [row for row in group.rows if who.includes(row["provider"]) and bar.what.of(row) is not None]
    return min(rows, key=lambda row: _value(bar, row), default=None)


def _value(bar: Bar, row: Row) -> float:
    value = bar.what.of(row)
    assert value is not None
    return max(value, 1e-12)


def _missing(bar: Bar, cases: list[Group]) -> str:
    if not cases:
        return "no such case"
    asked = [who for who in (bar.top, bar.bottom) if isinstance(who, Who)]
    absent = [who.words for who in asked if not any(_best(bar, g, who) for g in cases)]
    elsewhere = f"no {bar.bottom.words.removeprefix('own ')}" if isinstance(bar.bottom, Own) else "never together"
    return f"{' and '.join(absent)} did not run" if absent else elsewhere
