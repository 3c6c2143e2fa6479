"""``python -m benchmarks.session CALL --out DIR``: one call on a lent GPU machine as one line. docs/benchmarks.md has the plan.

1: does it run?  Build the CUDA kernels, first light, the tests that are not slow.
2: which tiles?  First light, compute-sanitizer, the tiles' races, the most telling shapes.
3: the result.   First light, the tests again, all shapes.

A step that fails or runs out of its time does not keep the next from running. Where a CUDA kernel hangs or crashes at first
light, the steps after it do without that backend. DIR gets session-<call>.log, all that was printed, and what the steps write.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eapo_kernels.ops.cuda import measured as cuda_measured
from eapo_kernels.ops.triton import tiles as triton_measured

from . import first_light
from .results import COMMIT, ROOT

MINUTES = {1: 7.0, 2: 9.0, 3: 9.0}
"""Of a call: three of them and three starts of a machine are half an hour."""

_SHOWN = 25
"""Lines of a step that are printed, its last ones."""


_BROKEN = re.compile(r"run again with --without (\w+)")
"""What the benchmark says when a provider has broken the GPU for its process."""

_WORTHWHILE = 45.0
"""Seconds in which a benchmark can still measure something."""


@dataclass(frozen=True)
class Step:
    """A command of a call.

    Attributes:
        name: in the log.
        command: behind ``python -m``; {out} is the folder, {minutes} and {seconds} the time that the step has.
        minutes: at most; None for all that is left.
        without: what is added where a CUDA kernel hangs or crashes.
        tiny: the command on a machine without a GPU, which tries the call itself.
    """

    name: str
    command: tuple[str, ...]
    minutes: float | None
    without: tuple[str, ...] = ()
    tiny: tuple[str, ...] = field(default=())

    def arguments(self, out: Path, seconds: float, *, hangs: bool, tiny: bool) -> list[str]:
        """Of ``python -m``. A step that watches the time itself gets a little less, so that it can write down what it has."""
        own = 0.95 * seconds
        words = self.tiny if tiny else (*self.command, *(self.without if hangs else ()))
        return [word.format(out=out, minutes=f"{own / 60:.2f}", seconds=f"{own:.0f}") for word in words]


_PRODUCTS = ("stream_statistics", "scaled_exp_gemm", "logit_gradient")
"""Kernels of which there is time to race tiles."""

_FOLDERS = ("tests/gpu", "tests/ops", "tests/csrc", "tests/objectives", "tests/integrations")
_TESTS = (*_FOLDERS, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("test_*.py")))
"""What a GPU can change: not the trainer, the emulator and compiling for other GPUs. Results say what was run."""

_NOT_CUDA = ("-k", "not cuda- and not on_the_device")
_LIGHT = Step("first light", ("benchmarks.first_light", "--out", "{out}"), 1.5, tiny=("benchmarks.first_light",))
_BENCHMARK = ("benchmarks.gpu", "--out", "{out}", "--minutes", "{minutes}")
_TINY_BENCHMARK = (
    "benchmarks.gpu", "--tiny", "--no-tests", "--rounds", "1", "--only", "bare_gemms", "eapo_torch", "--out", "{out}",
)  # fmt: skip

CALLS: dict[int, tuple[Step, ...]] = {
    1: (
        Step("build", ("eapo_kernels.ops.cuda", "--build"), 1.5, tiny=("eapo_kernels.ops.cuda", "--help")),
        _LIGHT,
        Step(
            "tests", ("benchmarks.gate", *_TESTS, "--out", "{out}", "--minutes", "{minutes}"), None, without=_NOT_CUDA,
            tiny=("benchmarks.gate", "tests/test_structure.py", "--out", "{out}", "--minutes", "{minutes}"),
        ),
    ),
    2: (
        _LIGHT,
        Step(
            "sanitizer",
            ("benchmarks.gate", "tests/gpu/test_sanitizer.py", "--slow", "--out", "{out}", "--minutes", "{minutes}"), 3.0,
            tiny=("benchmarks.gate", "tests/gpu/test_sanitizer.py", "-k", "told", "--out", "{out}", "--minutes", "{minutes}"),
        ),
        Step(
            "tune", ("benchmarks.tune", "--kernel", *_PRODUCTS, "--seconds", "{seconds}"), 3.0, without=("--backend", "triton"),
            tiny=("benchmarks.tune", "--seconds", "{seconds}"),
        ),
        Step(
            "quick benchmark", (*_BENCHMARK, "--quick", "--no-tests"), None, without=("--without", "eapo_cuda"),
            tiny=_TINY_BENCHMARK,
        ),
    ),
    3: (
        _LIGHT,
        Step(
            "full benchmark", (*_BENCHMARK, "--full", "--not-slow", "--despite-red", "--tests", *_TESTS), None,
            without=("--without", "eapo_cuda"), tiny=_TINY_BENCHMARK,
        ),
    ),
}  # fmt: skip


def run(call: int, out: Path, seconds: float, *, commit: str | None = None, tiny: bool = False) -> dict[str, int | None]:
    """Run a call's steps within ``seconds``. Returns each one's exit code, None for one that ran out of time.

    A benchmark in which a provider breaks the GPU starts again without that one and without tests, into ``out / "again"``.
    """
    until, hangs = time.monotonic() + seconds, False
    codes: dict[str, int | None] = {}
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({} if commit is None else {COMMIT: commit})
    with (out / f"session-{call}.log").open("w") as log:

        def execute(name: str, limit: float, arguments: list[str]) -> tuple[int | None, str]:
            start = time.monotonic()
            code, text = _run([sys.executable, "-m", *arguments], environment, limit)
            end = "out of time" if code is None else f"exit code {code}"
            head = f"######## {name}: {end} after {time.monotonic() - start:.0f} s: python -m {' '.join(arguments)}"
            log.write(f"{head}\n{text}\n")
            log.flush()
            print("\n".join([head, *text.splitlines()[-_SHOWN:]]), flush=True)
            codes[name] = code
            return code, text

        def left(step: Step) -> float:
            rest = max(until - time.monotonic(), 0.0)
            return rest if step.minutes is None else min(60 * step.minutes, rest)

        for step in CALLS[call]:
            limit = left(step)
            code, text = execute(step.name, limit, step.arguments(out, limit, hangs=hangs, tiny=tiny))
            hangs = hangs or (step is _LIGHT and code in (None, first_light.HANGS))
            broken = _BROKEN.search(text)
            if broken is not None and left(step) > _WORTHWHILE:
                limit = left(step)
                names = [broken[1], *(["eapo_cuda"] if hangs else [])]
                arguments = step.arguments(out / "again", limit, hangs=hangs, tiny=tiny)
                execute(f"{step.name} again", limit, [*arguments, "--no-tests", "--without", *names])
    if call == 2 and not tiny:
        for path in (cuda_tiles.MEASURED, triton_measured.PATH):
            if path.exists():
                (out / path.parent.name).mkdir(exist_ok=True)
                shutil.copy(path, out / path.parent.name)
    print(f"######## call {call}: " + ", ".join(f"{name} {code}" for name, code in codes.items()), flush=True)
    return codes


def _run(command: Sequence[str], environment: dict[str, str], seconds: float) -> tuple[int | None, str]:
    """Exit code and everything printed; after ``seconds`` the command ends with all that it started, and the code is None."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    return process.returncode, text


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when a step failed or ran out of time."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.session", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("call", type=int, choices=list(CALLS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=None, help=f"default: {MINUTES}")
    parser.add_argument("--commit", default=None, help="what the results are of, where the machine has no git history")
    parser.add_argument("--tiny", action="store_true", help="tries the call itself, on any machine")
    options = parser.parse_args(arguments)
    minutes = options.minutes or MINUTES[options.call]
    codes = run(options.call, options.out, 60 * minutes, commit=options.commit, tiny=options.tiny)
    return 0 if all(code == 0 for code in codes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
