"""``python -m benchmarks.cpu``: this package beside its peers and the bare products on this
machine's processor.

Two cases: a small step with the default memory budget, and one whose logits are nine times a budget
of 32 MiB, for the peak memory. Absolute times of a CPU mean little: read the ratios, which are
medians over pairs of runs of the same round.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .case import INPUTS, MODES, SPARSE_MODES
from .measure import Job, Limits, print_missing, sweep
from .providers import chosen
from .real_rows import TEMPERATURES
from .results import ResultFile, environment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EVERY = (*MODES, *SPARSE_MODES)

CASES = (
    Job(512, 576, 49152, torch.float32),
    Job(1536, 576, 49152, torch.float32, modes=("fwd_bwd",), memory_budget=32 * 2**20),
    *(Job(1024, 576, 49152, torch.float32, inputs, modes=SPARSE_MODES) for inputs in TEMPERATURES),
)
"""SmolLM2-135M's head. 512 tokens: a small step. 1536 tokens: 288 MiB of fp32 logits. 1024 of its own rows, at three
temperatures."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write the JSON. Exit code 1 when the correctness gate is red."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON (default: print only)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each provider that count (default: %(default)s)")
    parser.add_argument("--shape", type=int, nargs=3, default=None, metavar=("N", "D", "V"), help="instead of the two cases")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of --shape (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=None, metavar="MIB", help="memory budget of --shape, default: 512 MiB")
    parser.add_argument("--inputs", choices=INPUTS, nargs="+", default=None, help="default: those of the case")
    parser.add_argument("--modes", choices=EVERY, nargs="+", default=list(EVERY), help="default: all that the case has")
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="providers whose names begin so")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="leave out providers whose names begin so")
    options = parser.parse_args(arguments)
    if options.budget is not None and options.shape is None:
        parser.error("--budget: expected with --shape")

    providers = chosen(options.only, options.without)
    print_missing(providers, "cpu")
    result = ResultFile(environment("cpu"))
    cases = CASES
    if options.shape is not None:
        budget = None if options.budget is None else int(options.budget * 2**20)
        cases = (Job(*options.shape, DTYPES[options.dtype], modes=EVERY, memory_budget=budget),)
    jobs = [
        Job(one.n, one.d, one.v, one.dtype, inputs, tuple(m for m in one.modes if m in options.modes), one.memory_budget)
        for one in cases
        for inputs in options.inputs or [one.inputs]
    ]
    sweep([job for job in jobs if job.modes], providers, result, options.out, "cpu", Limits(options.rounds))
    if options.out is not None:
        print(f"wrote {options.out / result.name}")
    return 0 if result.gate["green"] else 1


if __name__ == "__main__":
    sys.exit(main())
