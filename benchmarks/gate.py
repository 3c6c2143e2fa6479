"""The GPU gate: the test suite on the device, in several processes side by side, within a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_COMPILED = "tests/aot"
_COMPILED_PARTS = ("sm80", "sm90", "sm100", "not sm80 and not sm90 and not sm100")
"""Shards of their own: they need a process without the interpreter, and compile for minutes. By ``pytest -k``."""

_ALONE = ("tests/gpu/",)
"""A shard a file: they are slow."""

_NOT_HERE = ("tests/benchmarks",)
"""Tests of this command itself."""

_THREADS = "2"
"""Of a shard on the processor: as many shards as half of the cores run side by side."""

_ENDED = (0, 1, 5)
"""What pytest returns when it came to its end: all passed, some failed, none collected."""


@dataclass
class Gate:
    """What the tests said.

    Attributes:
        passed, failed, skipped: numbers of tests; a collection error counts as failed.
        seconds: wall time.
        failures: a line each: test and first line of its message, or a shard and how it ended.
        unfinished: shards that ran out of time.
        only, arguments: see ``run_gate``.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    only: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)

    @property
    def red(self) -> list[str]:
        """Why the gate is red; empty when it is green."""
        none = [] if self.passed else ["no test passed"]
        return none + self.failures + [f"not finished in time: {shard}" for shard in self.unfinished]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def shards(root: Path, count: int) -> list[list[str]]:
    """The test files dealt into ``count`` lists by size, before them those that want a process of their own."""
    files = sorted((root / "tests").rglob("test_*.py"), key=lambda p: -p.stat().st_size)
    names = [p.relative_to(root).as_posix() for p in files]
    alone = [[_COMPILED, "-k", part] for part in _COMPILED_PARTS if (root / _COMPILED).is_dir()]
    alone += [[name] for name in names if name.startswith(_ALONE)]
    dealt: list[list[str]] = [[] for _ in range(count)]
    for place, name in enumerate(n for n in names if not n.startswith((_COMPILED, *_ALONE, *_NOT_HERE))):
        dealt[place % count].append(name)
    return alone + [shard for shard in dealt if shard]


def run_gate(seconds: float, count: int, *, root: Path = ROOT, only: Sequence[str] = (), arguments: Sequence[str] = ()) -> Gate:
    """Run every shard with pytest, all at once, and stop those that are not done after ``seconds``.

    only: a single shard of these files, instead of all of them. arguments: further ones of pytest.
    """
    start, gate = time.monotonic(), Gate(only=list(only), arguments=list(arguments))
    environment = os.environ | {"OMP_NUM_THREADS": _THREADS}
    running: list[tuple[list[str], Path, subprocess.Popen[bytes]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for number, shard in enumerate([list(only)] if only else shards(root, count)):
                report = Path(scratch) / f"{number}.xml"
                command = [
                    sys.executable,
                    "-m",
                    "pytest",
                    "-q",
                    "-p",
                    "no:cacheprovider",
                    "--continue-on-collection-errors",
                    f"--junitxml={report}",
                    *arguments,
                    *shard,
                ]
                process = subprocess.Popen(
                    command,
                    cwd=root,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                running.append((shard, report, process))
            for shard, report, process in running:
                try:
                    process.wait(max(0.0, start + seconds - time.monotonic()))
                except subprocess.TimeoutExpired:
                    gate.unfinished.append(" ".join(shard))
                    continue
                if report.exists():
                    read_report(report, gate)
                if not report.exists() or process.returncode not in _ENDED:
                    gate.failed += 1
                    without = "" if report.exists() else " and no report"
                    gate.failures.append(f"{' '.join(shard)}: pytest exited with {process.returncode}{without}")
        finally:
            for _, _, process in running:
                _stop(process)
    gate.seconds = round(time.monotonic() - start, 1)
    return gate


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a shard that still runs, and the processes that its tests started: they would disturb what is timed next."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_report(path: Path, gate: Gate) -> None:
    """Add a JUnit report's tests to ``gate``."""
    for test in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{test.get('classname')}::{test.get('name')}"
        bad = test.find("failure") if test.find("failure") is not None else test.find("error")
        skip = test.find("skipped")
        if bad is not None:
            gate.failed += 1
            message = (bad.get("message") or "").strip().splitlines()
            gate.failures.append(f"{name}: {message[0][:200] if message else 'no message'}")
        elif skip is not None:
            gate.skipped += 1
            gate.skips.append(f"{name}: {(skip.get('message') or '')[:120]}")
        else:
            gate.passed += 1
