"""``python -m benchmarks.cpu``: this package beside its peers and the bare products on this machine's processor.

Absolute times of a CPU mean little: read the ratios, which are medians over pairs of runs of the same round.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .case import INPUTS, MODES
from .providers import chosen
from .results import ResultFile, environment
from .sweep import Job, Limits, print_missing, sweep

SHAPE = (1024, 576, 49152)
"""SmolLM2-135M's head and the tokens of a small step."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write the JSON. Exit code 1 when the correctness gate is red."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON (default: print only)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each provider that count (default: %(default)s)")
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, metavar=("N", "D", "V"), help="default: %(default)s")
    parser.add_argument("--inputs", choices=INPUTS, nargs="+", default=["peaked"], help="default: peaked")
    parser.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES), help="default: all")
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="providers whose names begin so")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="leave out providers whose names begin so")
    options = parser.parse_args(arguments)

    providers = chosen(options.only, options.without)
    print_missing(providers, "cpu")
    result = ResultFile(environment("cpu"))
    jobs = [Job(*options.shape, torch.float32, inputs, tuple(options.modes)) for inputs in options.inputs]
    sweep(jobs, providers, result, options.out, "cpu", Limits(options.rounds))
    if options.out is not None:
        print(f"wrote {options.out / result.name}")
    return 0 if result.gate["green"] else 1


if __name__ == "__main__":
    sys.exit(main())
