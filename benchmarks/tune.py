"""``python -m benchmarks.tune``: search the Triton kernels' tiles on this GPU and write what was measured for ``configs.find``.

Every tile is compiled (no spills, fits the multiprocessor), compared with the torch backend, then raced side by side with the
L2 cache flushed. The file is written after each search. Opt-in: nothing here runs at import, in tests or in CI.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from eapo_kernels import EapoError
from eapo_kernels.ops.triton import configs, measured
from eapo_kernels.ops.triton.configs import PRODUCTS, Tile

from .clock import Clock, make_clock
from .results import environment
from .tuning import table
from .tuning.candidates import SPACES, UNTUNED, Search, candidates
from .tuning.search import Contest, Outcome, search

SHAPES = ((4096, 4096, 131072), (8192, 2048, 151936), (8192, 1024, 151936))
DTYPES = ("bfloat16", "float16", "float32")
_ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


class Opened(Contest, Protocol):
    """A contest that also knows the kernel's other variants."""

    def spills_with_every_switch(self, tile: Tile) -> str | None: ...


def searches(kernels: list[str], shapes: list[tuple[int, int, int]], dtypes: list[str], family: str) -> list[Search]:
    """What to search, each line of the table once: the row kernels read fp32 whatever the operands are."""
    found: dict[tuple[str, str, int, int, int], Search] = {}
    for n, d, v in shapes:
        for kernel in kernels:
            for dtype in dtypes:
                typed = kernel in PRODUCTS or kernel == "row_offsets"
                one = Search(kernel, family, _ITEMSIZE[dtype] if typed else 4, n, d, v, dtype)
                found.setdefault(one.key, one)
    return list(found.values())


def tune(
    jobs: list[Search],
    open_contest: Callable[[Search], Opened],
    clock: Clock,
    seconds: float,
    path: Path,
    made: dict[str, Any],
    *,
    workers: int = 1,
) -> int:
    """Search each job within an equal share of the time that is left, and write ``path`` after each. Returns lines written.

    made: the environment. Raises EapoError when ``path`` holds something that is not a table.
    """
    until, written = time.monotonic() + seconds, 0
    old = table.read(path)
    for number, job in enumerate(jobs):
        share = max(until - time.monotonic(), 0.0) / (len(jobs) - number)
        contest = open_contest(job)
        outcome = search(candidates(job), contest, clock, share, workers=workers)
        best = next(((t, ms) for t, ms in outcome.ranking if contest.spills_with_every_switch(t) is None), None)
        print(_sentence(job, outcome, best), flush=True)
        if best is not None:
            old = table.merge(old, made, [table.line(job, *best, made)])
            table.save(path, old)
            written += 1
    return written


def _sentence(job: Search, outcome: Outcome, best: tuple[Tile, float] | None) -> str:
    refused = ", ".join(f"{count} {reason}" for reason, count in outcome.refused.most_common(3)) or "none"
    head = f"{job.kernel} {job.dtype} N={job.n} D={job.d} V={job.v}: {outcome.tried} tried, refused: {refused}"
    wrong = "".join(f"\n  wrong: {reason}" for reason in outcome.wrong)
    if best is None:
        return f"{head}; nothing to write{wrong}"
    now = dict(outcome.ranking).get(job.current())
    than = "" if now is None else f", the tile of today {now:.4f} ms"
    return f"{head}\n  {best[1]:.4f} ms{than}: {best[0]}{wrong}"


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 without a GPU, for bad arguments or an unreadable table, 1 when no line could be written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--kernel", nargs="+", choices=list(SPACES), default=list(SPACES), help=f"not: {', '.join(UNTUNED)}")
    parser.add_argument("--shape", nargs=3, type=int, action="append", metavar=("N", "D", "V"), help="may be repeated")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="fp16 shares the line of bf16")
    parser.add_argument("--seconds", type=float, default=600.0, help="for everything, default: %(default)s")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="compile so many at once")
    parser.add_argument("--out", type=Path, default=measured.PATH, help="default: the table that the package reads")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.tune: expected a CUDA device to measure on, got none", file=sys.stderr)
        return 2
    family = configs.family(torch.cuda.get_device_capability())
    jobs = searches(options.kernel, [tuple(s) for s in options.shape or SHAPES], options.dtype, family)
    from .tuning.problems import Problem

    try:
        written = tune(
            jobs, lambda job: Problem(job, "cuda"), make_clock("cuda"), options.seconds, options.out, environment("cuda"),
            workers=options.workers,
        )  # fmt: skip
    except EapoError as error:
        print(f"benchmarks.tune: {error}", file=sys.stderr)
        return 2
    print(f"wrote {written} lines to {options.out}")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
