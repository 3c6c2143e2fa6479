"""``python -m benchmarks.gpu --quick|--full --out DIR``: the tests on the GPU, then everyone side by side.

Writes DIR/<gpu>-<date>-<commit>.json after every mode. Nothing is measured when a test fails, unless --despite-red is given;
such a file ends in .red.json, and the report refuses it.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from . import real_rows
from .case import N_RESPONSES
from .gate import run_gate, side_by_side
from .measure import DeviceLost
from .providers import chosen
from .results import ResultFile, environment
from .sweep import Job, Limits, print_missing, sweep

_BACKWARD = ("fwd_bwd", "half_zero_rows")

QUICK = (
    Job(4096, 4096, 131072),
    Job(8192, 1024, 151936, modes=("fwd_bwd", "fwd")),
    Job(4096, 576, 49152, inputs="real", modes=("fwd_bwd", "fwd")),
    Job(8192, 2048, 151936, modes=("fwd_bwd", "fwd")),
    Job(4096, 4096, 131072, inputs="steep", modes=("fwd_bwd",)),
    Job(4096, 4096, 131072, inputs="uniform", modes=("fwd_bwd",)),
)
"""Most telling first: a run that is cut short keeps the head of this list."""

FULL = (
    *QUICK,
    Job(4096, 3584, 152064),
    Job(8192, 2048, 151936, modes=("frozen_head", "half_zero_rows")),
    Job(8192, 1024, 151936, modes=("frozen_head", "half_zero_rows")),
    Job(8192, 4096, 32000, modes=_BACKWARD),
    Job(1024, 4096, 131072, modes=("fwd", "fwd_bwd")),
    Job(3328, 4096, 131072, modes=("fwd", "fwd_bwd")),
    Job(16384, 4096, 131072, modes=("fwd", "fwd_bwd")),
    Job(8192, 4096, 128256, modes=("fwd_bwd",)),
    Job(4096, 8192, 131072, modes=("fwd_bwd",)),
    Job(8192, 2304, 262144, modes=("fwd", "fwd_bwd")),
    Job(8192, 2048, 248320, modes=("fwd_bwd",)),
    Job(4800, 2048, 151936, modes=("fwd_bwd",)),
    Job(1024, 2048, 151936, modes=("fwd_bwd",)),
    Job(512, 2048, 151936, modes=("fwd_bwd",)),
    Job(65536, 2048, 151936, modes=("fwd_bwd",)),
)

TINY = (Job(64, 64, 512, torch.float32), Job(32, 32, 300, torch.float32, "uniform", ("fwd_bwd",)))
"""For a machine without a GPU: shows that the command works, measures nothing of interest."""


def _with_real_shape(job: Job) -> Job | None:
    """A job on real rows with the sizes that their file has, or None without a file; other jobs as they are."""
    if job.inputs != "real":
        return job
    found = real_rows.shape()
    if found is None:
        print(f"left out: {job}: no {real_rows.PATH.name}; python -m benchmarks.real_rows makes it")
        return None
    n, d, v = found
    return replace(job, n=min(job.n, n // N_RESPONSES * N_RESPONSES), d=d, v=v)


def main(arguments: list[str] | None = None) -> int:
    """Gate, sweep, table. Exit code 1 when the gate is red, 3 when a provider broke the GPU; 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="at most 4 minutes, tests included, slow ones left out (the default)"
    )
    size.add_argument("--full", action="store_true", help="at most 8 minutes, all tests included")
    size.add_argument("--tiny", action="store_true", help="a minute, any device: tries the command itself")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON")
    parser.add_argument("--minutes", type=float, default=None, help="instead of the size's own limit")
    parser.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="providers whose names begin so")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="leave out providers whose names begin so")
    parser.add_argument("--tests", nargs="+", default=None, metavar="PATH", help="the gate is these tests (default: all)")
    parser.add_argument("--no-tests", action="store_true", help="skip the tests; the file says so, and the report refuses it")
    parser.add_argument("--not-slow", action="store_true", help="leave the slow tests out of --full too; the file says so")
    parser.add_argument("--despite-red", action="store_true", help="measure even when a test fails")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("expected a CUDA device, got none; --tiny tries the command on the CPU, benchmarks.cpu measures there")

    start = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    minutes = options.minutes or (1.0 if options.tiny else 8.0 if options.full else 4.0)
    until = start + 60 * minutes
    providers = chosen(options.only, options.without)
    print_missing(providers, device)
    result = ResultFile(environment(device))
    if options.no_tests:
        result.redden(["the tests were not run (--no-tests)"])
    else:
        # Half of the time at most: what does not finish is red, and says which files.
        only = options.tests or (["tests/test_structure.py"] if options.tiny else [])
        arguments = [] if options.full and not options.not_slow else ["-m", "not slow"]
        gate = run_gate(30 * minutes, side_by_side(), only=only, arguments=arguments, log=options.out / "gate.log")
        result.gate["tests"] = gate.as_json()
        result.redden(gate.red)
        print(gate.summary())
        for sentence in gate.red:
            print(f"gate red: {sentence}", file=sys.stderr)
        if gate.red and not options.despite_red:
            result.save(options.out)
            return 1
    jobs = TINY if options.tiny else FULL if options.full else QUICK
    jobs = tuple(job for job in map(_with_real_shape, jobs) if job is not None)
    # A twentieth of the time for the rounds of one mode; what is begun last may take as long again for its checks.
    limits = Limits(options.rounds, 3 * minutes, until - 6 * minutes)
    try:
        sweep(jobs, providers, result, options.out, device, limits)
    except DeviceLost as error:
        result.redden([str(error)])
        print(f"gate red: {error}", file=sys.stderr)
        result.save(options.out)
        return 3
    print(f"\nwrote {result.save(options.out)} after {time.monotonic() - start:.0f} s")
    return 0 if result.gate["green"] else 1


if __name__ == "__main__":
    sys.exit(main())
