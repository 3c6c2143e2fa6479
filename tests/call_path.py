"""The files of ``eapo_kernels`` that one warm forward and backward executes: ``python tests/call_path.py [--files]``.

A file counts if at least one of its functions runs during the call. It counts with all of its lines,
because a reader who follows the call has to open it. Triton kernels run in the interpreter, so their
files count too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import eapo_kernels
from eapo_kernels import TokenBatch, eapo_loss, token_stats
from eapo_kernels.testing import make_inputs

ROOT = Path(eapo_kernels.__file__).parent
N, D, V = 64, 64, 512


@dataclass(frozen=True)
class CallPath:
    """What one call executes.

    Attributes:
        files: calls of functions by file, relative to the package.
        changes: how often a function of one file called a function of another one.
    """

    files: dict[str, int]
    changes: int

    @property
    def lines(self) -> int:
        return sum(lines_of(name) for name in self.files)


def lines_of(name: str) -> int:
    return len((ROOT / name).read_text().splitlines())


def trace(function: Callable[[], object]) -> CallPath:
    """Profile the third call of ``function``: caches are filled and lazy imports are done."""
    function()
    function()
    files: Counter[str] = Counter()
    changes, last = 0, ""

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal changes, last
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(f"{ROOT}{os.sep}"):
            files[name] += 1
            changes += name != last
            last = name

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return CallPath({Path(name).relative_to(ROOT).as_posix(): n for name, n in sorted(files.items())}, changes)


def _loss(schedule: str) -> Callable[[], object]:
    inputs = make_inputs(N, D, V, dtype=torch.bfloat16)
    hidden, weight = inputs.leaves()
    batch = TokenBatch(
        inputs.targets, torch.arange(N) // 8, torch.linspace(0, 1, 8), torch.arange(8) // 4, old_logp=torch.full((N,), -6.0)
    )

    def call() -> None:
        eapo_loss(hidden, weight, batch, positive_weight=0.7, schedule=schedule, backend="triton").loss.backward()

    return call


def _statistics() -> Callable[[], object]:
    inputs = make_inputs(N, D, V, dtype=torch.bfloat16)
    hidden, weight = inputs.leaves()

    def call() -> None:
        stats = token_stats(hidden, weight, inputs.targets, backend="triton")
        (stats.logp.sum() + stats.entropy.sum()).backward()

    return call


CALLS: dict[str, Callable[[], Callable[[], object]]] = {
    "eapo_loss, one pass": lambda: _loss("one_pass"),
    "eapo_loss, autograd": lambda: _loss("autograd"),
    "token_stats": _statistics,
}
"""Calls on the triton backend, each a forward and a backward of bf16 inputs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="also list the files")
    listed = parser.parse_args().files
    print(f"{'forward and backward':24}{'files':>7}{'lines':>7}{'changes of file':>17}")
    for name, make in CALLS.items():
        path = trace(make())
        print(f"{name:24}{len(path.files):7}{path.lines:7}{path.changes:17}")
        for file in path.files if listed else ():
            print(f"    {lines_of(file):5}  {file}")


if __name__ == "__main__":
    main()
