"""``python -m benchmarks.tune``: search the Triton and CUDA kernels' tiles on this GPU and write what ``tiles.find`` reads.

Every tile is compiled (no spills, fits the multiprocessor), compared with the torch backend, then raced side by side with the
L2 cache flushed. A file is written after each search. Opt-in: nothing here runs at import, in tests or in CI.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from eapo_kernels import EapoError, available_backends
from eapo_kernels.ops.triton import tiles
from eapo_kernels.ops.triton.tiles import PRODUCTS

from .clock import Clock, make_clock
from .results import environment
from .tuning import cuda_candidates
from .tuning.candidates import SPACES, UNTUNED, Search
from .tuning.cuda_candidates import CudaSearch
from .tuning.search import Contest, Job, Outcome, Tile, search
from .tuning.table import CUDA, TRITON, Table

SHAPES = ((4096, 4096, 131072), (8192, 2048, 151936), (8192, 1024, 151936))
FEW_ROWS = (512, 4096, 131072)
"""The CUDA kernels' tile depends on the rows too."""

BACKENDS = ("cuda", "triton")
_CUDA_SHARE = 0.4
"""Of the time, where both are searched: few tiles, but all of them are raced."""

DTYPES = ("bfloat16", "float16", "float32")
_ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


class Opened(Contest, Protocol):
    """A contest that also knows the kernel's other variants."""

    def spills_with_every_switch(self, tile: Tile) -> str | None: ...


def searches(kernels: list[str], shapes: list[tuple[int, int, int]], dtypes: list[str], family: str) -> list[Search]:
    """What to search, each line of the table once: the row kernels read fp32 whatever the operands are.

    The products of all shapes come first: a search that is cut short has measured what takes the time.
    """
    found: dict[tuple[str, str, int, int, int], Search] = {}
    for wanted in (True, False):
        for n, d, v in shapes:
            for kernel in (k for k in kernels if (k in PRODUCTS) == wanted):
                for dtype in dtypes:
                    typed = kernel in PRODUCTS or kernel == "row_offsets"
                    one = Search(kernel, family, _ITEMSIZE[dtype] if typed else 4, n, d, v, dtype)
                    found.setdefault(one.key, one)
    return list(found.values())


def cuda_searches(kernels: list[str], shapes: list[tuple[int, int, int]]) -> list[CudaSearch]:
    """The same for the CUDA kernels, in bfloat16."""
    chosen = [kernel for kernel in cuda_candidates.KERNELS if kernel in kernels]
    return [CudaSearch(kernel, *shape) for shape in shapes for kernel in chosen]


def tune(
    jobs: Sequence[Job],
    open_contest: Callable[[Any], Opened],
    clock: Clock,
    seconds: float,
    path: Path,
    made: dict[str, Any],
    *,
    table: Table = TRITON,
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
        outcome = search(job.candidates(), contest, clock, share, workers=workers)
        best = next(((t, ms) for t, ms in outcome.ranking if contest.spills_with_every_switch(t) is None), None)
        print(_sentence(job, outcome, best), flush=True)
        if best is not None:
            old = table.merge(old, made, [table.line(job, *best, made)])
            table.save(path, old)
            written += 1
    return written


def _sentence(job: Job, outcome: Outcome, best: tuple[Tile, float] | None) -> str:
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
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: both, cuda first")
    parser.add_argument("--kernel", nargs="+", choices=list(SPACES), default=list(SPACES), help=f"not: {', '.join(UNTUNED)}")
    parser.add_argument("--shape", nargs=3, type=int, action="append", metavar=("N", "D", "V"), help="may be repeated")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="Triton's; fp16 shares bf16's line")
    parser.add_argument("--seconds", type=float, default=600.0, help="for everything, default: %(default)s")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="compile so many at once")
    parser.add_argument(
        "--out", type=Path, default=tiles.PATH.parents[1],
        help="folder for <backend>/measured.json, default: the one that the package reads",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.tune: expected a CUDA device to measure on, got none", file=sys.stderr)
        return 2
    clock, made, until = make_clock("cuda"), environment("cuda"), time.monotonic() + options.seconds
    shapes = [tuple(s) for s in options.shape or SHAPES]
    written = 0
    try:
        if "cuda" in options.backend and (reason := available_backends("cuda")["cuda"]) is not None:
            print(f"not here: the cuda backend: {reason}")
        elif "cuda" in options.backend:
            from .tuning.cuda_problems import CudaProblem

            jobs = cuda_searches(options.kernel, shapes if options.shape else [*shapes, FEW_ROWS])
            at_once = -(-len(jobs[0].candidates()) // 2) if jobs else 1  # every tile in the first batch
            share = options.seconds * (_CUDA_SHARE if "triton" in options.backend else 1.0)
            written += tune(
                jobs, lambda job: CudaProblem(job, "cuda"), clock, share, options.out / "cuda" / "measured.json", made,
                table=CUDA, workers=max(options.workers, at_once),
            )  # fmt: skip
        if "triton" in options.backend:
            from .tuning.problems import Problem

            family = tiles.family(torch.cuda.get_device_capability())
            triton_jobs = searches(options.kernel, shapes, options.dtype, family)
            written += tune(
                triton_jobs, lambda job: Problem(job, "cuda"), clock, until - time.monotonic(),
                options.out / "triton" / "measured.json", made, workers=options.workers,
            )  # fmt: skip
    except EapoError as error:
        print(f"benchmarks.tune: {error}", file=sys.stderr)
        return 2
    print(f"wrote {written} lines to {options.out}")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
