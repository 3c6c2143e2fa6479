"""``python -m benchmarks.gate --out DIR``: the test suite on the device, in processes side by side, within a time limit.

The GPU benchmark runs it as its gate. By itself it writes DIR/gate.json and everything that pytest printed to DIR/gate.log.
"""

from __future__ import annotations

import argparse
import json
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

_ALONE = ("tests/gpu/", "tests/ops/cuda/")
"""A shard a file: they are slow, or a kernel that hangs would take others with it."""

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
        unfinished: shards that ran out of time; stopped: the last line that each had printed, the test that it was in.
        only, arguments: see ``run_gate``.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    only: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)

    @property
    def red(self) -> list[str]:
        """Why the gate is red; empty when it is green."""
        none = [] if self.passed else ["no test passed"]
        late = [f"not finished in time: {s}, in {at}" for s, at in zip(self.unfinished, self.stopped, strict=True)]
        return none + self.failures + late

    def summary(self) -> str:
        return f"tests: {self.passed} passed, {self.failed} failed, {self.skipped} skipped in {self.seconds:.0f} s"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def side_by_side() -> int:
    """Shards of ``run_gate``: half of the cores."""
    return max(1, (os.cpu_count() or 2) // 2)


def shards(root: Path, count: int, only: Sequence[str] = ()) -> list[list[str]]:
    """The test files dealt into ``count`` lists by size, before them those that want a process of their own.

    only: files and folders to choose from, instead of everything.
    """
    chosen = tuple(only or ("tests",))
    files = sorted((root / "tests").rglob("test_*.py"), key=lambda p: -p.stat().st_size)
    names = [n for n in (p.relative_to(root).as_posix() for p in files) if _within(n, chosen)]
    alone = [[_COMPILED, "-k", part] for part in _COMPILED_PARTS if (root / _COMPILED).is_dir() and _within(_COMPILED, chosen)]
    alone += [[name] for name in names if name.startswith(_ALONE)]
    dealt: list[list[str]] = [[] for _ in range(count)]
    for place, name in enumerate(n for n in names if not n.startswith((_COMPILED, *_ALONE, *_NOT_HERE))):
        dealt[place % count].append(name)
    return alone + [shard for shard in dealt if shard]


def _within(name: str, chosen: tuple[str, ...]) -> bool:
    return any(name == one or name.startswith(f"{one.rstrip('/')}/") for one in chosen)


def run_gate(
    seconds: float,
    count: int,
    *,
    root: Path = ROOT,
    only: Sequence[str] = (),
    arguments: Sequence[str] = (),
    log: Path | None = None,
) -> Gate:
    """Run every shard with pytest, all at once, and stop those that are not done after ``seconds``.

    only: see ``shards``. arguments: further ones of pytest. log: where everything that pytest printed goes, shard after shard.
    """
    start, gate = time.monotonic(), Gate(only=list(only), arguments=list(arguments))
    environment = os.environ | {"OMP_NUM_THREADS": _THREADS}
    running: list[tuple[list[str], Path, subprocess.Popen[bytes]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for number, shard in enumerate(shards(root, count, only)):
                report = Path(scratch) / f"{number}.xml"
                command = [
                    sys.executable,
                    "-m",
                    "pytest",
                    "-v",  # names a test before it runs
                    "-p",
                    "no:cacheprovider",
                    "--continue-on-collection-errors",
                    f"--junitxml={report}",
                    *arguments,
                    *shard,
                ]
                with report.with_suffix(".log").open("wb") as output:
                    process = subprocess.Popen(
                        command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                    )
                running.append((shard, report, process))
            for shard, report, process in running:
                try:
                    process.wait(max(0.0, start + seconds - time.monotonic()))
                except subprocess.TimeoutExpired:
                    gate.unfinished.append(" ".join(shard))
                    gate.stopped.append(_last_line(report.with_suffix(".log")))
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
            if log is not None:
                _collect(log, [(shard, report.with_suffix(".log")) for shard, report, _ in running])
    gate.seconds = round(time.monotonic() - start, 1)
    return gate


def _last_line(path: Path) -> str:
    """What a shard printed last: the name of the test that it is in."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "nothing printed"


def _collect(log: Path, parts: Sequence[tuple[list[str], Path]]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        for shard, path in parts:
            file.write(f"\n######## {' '.join(shard)}\n{path.read_text(errors='replace')}")


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


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when the gate is red."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__)
    parser.add_argument("only", nargs="*", metavar="PATH", help="files and folders of tests, default: all")
    parser.add_argument("--out", type=Path, required=True, help="folder for gate.json and gate.log")
    parser.add_argument("--minutes", type=float, default=4.0, help="default: %(default)s")
    parser.add_argument("--slow", action="store_true", help="the tests that are marked slow too")
    parser.add_argument("-k", default=None, metavar="EXPRESSION", help="as pytest's")
    options = parser.parse_args(arguments)
    more = ([] if options.slow else ["-m", "not slow"]) + (["-k", options.k] if options.k else [])
    gate = run_gate(60 * options.minutes, side_by_side(), only=options.only, arguments=more, log=options.out / "gate.log")
    (options.out / "gate.json").write_text(json.dumps(gate.as_json(), indent=1) + "\n")
    print(gate.summary())
    for sentence in gate.red:
        print(f"gate red: {sentence}")
    return 1 if gate.red else 0


if __name__ == "__main__":
    sys.exit(main())
