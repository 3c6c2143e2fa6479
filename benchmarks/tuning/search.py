"""The search: compile while there is time, keep what is sound and right, then race by successive halving.

Knows no GPU, and of a tile only that it can be hashed and printed.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from ..clock import Clock, time_interleaved

FINALISTS = 4
FIRST_ROUNDS, FINAL_ROUNDS = 3, 30
COMPILE_SHARE = 0.6
"""Of the time of a search: compiling and checking."""


Tile = Any
"""A backend's ``configs.Tile``."""


class Job(Protocol):
    """A line of a table to be measured.

    Attributes:
        kernel: whose tile it is.
        n, d, v, dtype: rows, depth and vocabulary of the operands, and the name of their dtype.
        key: values of the fields that a line of the table is known by.
    """

    kernel: str
    n: int
    d: int
    v: int
    dtype: str

    @property
    def key(self) -> tuple[Any, ...]: ...

    def current(self) -> Tile:
        """The tile that is used today."""
        ...

    def candidates(self) -> list[Tile]:
        """What is worth trying, the current tile first."""
        ...


class Contest(Protocol):
    """What is searched."""

    def prepare(self, tile: Tile) -> Callable[[], str | None]:
        """A function, run beside others, that compiles the tile and says why it is not taken, or None."""
        ...

    def check(self, tile: Tile) -> str | None:
        """Run the tile once; how its results are wrong, or None."""
        ...

    def runner(self, tile: Tile) -> Callable[[], object]:
        """What is timed."""
        ...


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        ranking: (tile, median milliseconds in the final), the fastest first; empty when no tile was right.
        tried: tiles that were compiled.
        refused: how many were not taken, by reason (its words without numbers).
        wrong: results that differ from the torch backend's: the reasons. Those are bugs, of the kernel or of the compiler.
    """

    ranking: list[tuple[Tile, float]] = field(default_factory=list)
    tried: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def search(
    tiles: Iterable[Tile], contest: Contest, clock: Clock, seconds: float, *, workers: int = 1, seed: int = 0
) -> Outcome:
    """Look for the fastest of ``tiles``, which come in order of promise, in about ``seconds``."""
    start, outcome = time.monotonic(), Outcome()
    sound: list[Tile] = []
    queue = iter(tiles)
    with ThreadPoolExecutor(workers) as pool:
        while time.monotonic() < start + COMPILE_SHARE * seconds or not outcome.tried:
            batch = list(islice(queue, max(2 * workers, 4)))
            if not batch:
                break
            outcome.tried += len(batch)
            for tile, reason in zip(batch, pool.map(lambda job: job(), [contest.prepare(t) for t in batch]), strict=True):
                if reason is not None:
                    outcome.refused[_words(reason)] += 1
                    continue
                wrong = contest.check(tile)
                if wrong is not None:
                    outcome.wrong.append(f"{tile}: {wrong}")
                else:
                    sound.append(tile)
    left = start + seconds - time.monotonic()
    outcome.ranking = halve({t: contest.runner(t) for t in sound}, clock, left, seed=seed)
    return outcome


def halve(runs: dict[Tile, Callable[[], object]], clock: Clock, seconds: float, *, seed: int = 0) -> list[tuple[Tile, float]]:
    """Successive halving: every stage times all who are left side by side, drops the slower half and doubles the rounds.

    Returns (tile, median milliseconds) of the finalists, the fastest first. A stage has half of the time that is left, but at
    least three rounds, so that few ``seconds`` cost precision and not the result.
    """
    until, alive, rounds = time.monotonic() + seconds, list(runs), FIRST_ROUNDS
    stage = 0
    while True:
        final = len(alive) <= FINALISTS
        left = max(until - time.monotonic(), 0.0)
        times = time_interleaved(
            {str(place): runs[tile] for place, tile in enumerate(alive)},
            FINAL_ROUNDS if final else rounds,
            clock,
            seconds=left if final else left / 2,
            seed=seed + stage,
        )
        medians = {tile: statistics.median(times[str(place)]) for place, tile in enumerate(alive)}
        alive.sort(key=medians.__getitem__)
        if final:
            return [(tile, medians[tile]) for tile in alive]
        alive = alive[: max(FINALISTS, (len(alive) + 1) // 2)]
        rounds, stage = 2 * rounds, stage + 1


def _words(reason: str) -> str:
    return " ".join(word for word in reason.split() if not word[:1].isdigit())
