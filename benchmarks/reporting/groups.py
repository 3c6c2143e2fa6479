"""The rows of a result file, sorted into cases and modes, and who is who among the providers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Result = dict[str, Any]

FLOOR, UNFUSED, OURS = "bare_gemms", "unfused_eager", "eapo"


@dataclass(frozen=True)
class Group:
    """One case in one mode: everyone in ``rows`` did the same job on the same tensors in the same rounds."""

    mode: str
    inputs: str
    n: int
    d: int
    v: int
    dtype: str
    rows: tuple[Row, ...]

    @property
    def shape(self) -> str:
        return f"N={self.n} D={self.d} V={self.v} {self.dtype}"

    @property
    def case(self) -> str:
        return f"{self.inputs} {self.shape}"

    @property
    def timed(self) -> list[Row]:
        """Those that ran, fastest first: by the ratio to the floor, which is of the same rounds, else by the median."""
        ran = [row for row in self.rows if row["ms"]]
        return sorted(ran, key=lambda row: over(row, FLOOR) or row["ms"]["p50"])

    def fastest(self, is_one: Callable[[str], bool]) -> Row | None:
        """The fastest row of the providers whose names satisfy ``is_one``."""
        return next((row for row in self.timed if is_one(row["provider"])), None)

    def fastest_of_families(self) -> dict[str, Row]:
        """The fastest row of every family but the floor's, fastest first."""
        best: dict[str, Row] = {}
        for row in self.timed:
            if not is_floor(row["provider"]):
                best.setdefault(family(row["provider"]), row)
        return best


def groups(result: Result) -> list[Group]:
    """The cases and modes of a result, in the order of the file."""
    rows: dict[tuple[Any, ...], list[Row]] = {}
    for row in result["rows"]:
        key = (row["mode"], row["inputs"], *(row["shape"][name] for name in ("N", "D", "V", "dtype")))
        rows.setdefault(key, []).append(row)
    return [Group(*key, rows=tuple(found)) for key, found in rows.items()]


def is_gpu(result: Result) -> bool:
    """Absolute times are reported for GPUs alone: those of a CPU say little about another."""
    return not result["environment"]["gpu"].startswith("CPU")


def family(provider: str) -> str:
    """Variants of one package share a family; unfused PyTorch is one family as it is, another compiled."""
    return provider if provider.startswith("unfused_") else provider.split("_")[0]


def is_ours(provider: str) -> bool:
    return family(provider) == OURS


def is_floor(provider: str) -> bool:
    """The matrix products, together or one by one."""
    return family(provider) == "bare"


def over(row: Row, base: str) -> float | None:
    """Median ratio of the row's time to the base's in the same round."""
    return row["time_over"].get(base)


def unique(names: Iterable[str]) -> list[str]:
    """Each once, in order of appearance."""
    return list(dict.fromkeys(names))


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]], *, words: int = 1) -> list[str]:
    """Lines of a table. The first ``words`` columns are aligned left, the others, numbers, right."""
    rule = ["---" if place < words else "---:" for place in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]
