"""compute-sanitizer over every kernel: accesses out of bounds (memcheck), shared-memory races
(racecheck), misused barriers.

Known limits, for the CUDA kernels' TMA copies and mbarriers (NVIDIA's release notes): memcheck sees
the addresses of TMA loads since 2026.2; racecheck reported races that are none with mbarriers
before 2025.4, with barriers across clusters and warp groups before 2026.1, with transaction counts
before 2026.3. What an older program reports of a copy, of a wgmma or at an address of the cluster's
other program is to be tried again with a newer one (the wheel ``nvidia-cuda-sanitizer-api``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jobs import BACKENDS, JOBS

from benchmarks import kernels

SCRIPT = Path(__file__).with_name("sanitized.py")
ROOT = SCRIPT.parents[2]

RUNS = [
    (tool, which)
    for tool, which in (
        ("memcheck", "small"), ("racecheck", "tiny"), ("synccheck", "tiny"),
        ("memcheck", "kernels"), ("racecheck", "kernels"), ("synccheck", "kernels"),
    )
    if which != "kernels" or "cuda" in BACKENDS
]  # fmt: skip


FOUND = 97
"""Exit code of compute-sanitizer when it has found something."""

_PLACES = ("bin", "compute-sanitizer")
"""Of the program in the wheel ``nvidia-cuda-sanitizer-api``, below nvidia/cu13: of CUDA 13.0, of
CUDA 13.5."""

BARRIERS = 16
"""At least as many as a program has (two a stage): the tool counts those that a compiler announces,
ours are plain PTX."""


KERNELS = tuple(name for backend, name in kernels.KERNELS if backend == "cuda")


def find_sanitizer() -> str | None:
    """The program: of the wheel where one is installed, else on PATH, else of a toolkit; None
    without any."""
    for folder in sys.path:
        for place in _PLACES:
            program = Path(folder) / "nvidia" / "cu13" / place / "compute-sanitizer"
            if os.access(program, os.X_OK):
                return str(program)
    return shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")


def arguments(tool: str, which: str, number: int) -> list[str]:
    """Options for ``sanitized.py which``; ``number`` tells runs apart that go on at once.

    For "kernels" only our kernels are watched, not those that make their inputs.
    """
    names = [word for kernel in KERNELS for word in ("--kernel-name", f"kns={kernel}")]
    watched = names if which == "kernels" else []
    counted = ["--num-cuda-barriers", str(BARRIERS)] if which == "kernels" and tool != "memcheck" else []
    return ["--tool", tool, "--error-exitcode", str(FOUND), "--port", str(49152 + 16 * number), *watched, *counted]


def command(*prefix: str, which: str) -> dict:
    """Every allocation is its own, so that memcheck sees an access behind a tensor that hits
    another one."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    return {"args": [*prefix, sys.executable, str(SCRIPT), which], "cwd": ROOT, "env": environment}


def test_the_script_runs_every_job() -> None:
    done = subprocess.run(**command(which="tiny"), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*JOBS, *(name for name in JOBS if not name.startswith("cuda-"))]


def test_the_program_of_the_wheel_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path, installed = tmp_path / "bin", tmp_path / "site" / "nvidia" / "cu13"
    monkeypatch.setenv("PATH", str(on_path))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for folder in (on_path, installed / "compute-sanitizer", installed / "bin"):
        program = folder / "compute-sanitizer"
        folder.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        assert find_sanitizer() != str(program), "not a program yet"
        program.chmod(0o755)
        assert find_sanitizer() == str(program)


def test_options_depend_on_the_tool() -> None:
    options = arguments("memcheck", "small", 0)
    assert options == ["--tool", "memcheck", "--error-exitcode", "97", "--port", "49152"]
    options = arguments("racecheck", "kernels", 1)
    assert options[2:6] == ["--error-exitcode", "97", "--port", "49168"]
    assert options[6:8] == ["--kernel-name", "kns=stream_statistics"]
    assert options[-2:] == ["--num-cuda-barriers", "16"]


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], tuple[subprocess.Popen[bytes], Path]]]:
    """All runs that were asked for, at once."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer not found")
    asked = [run for run in RUNS if any(item.name.endswith(f"[{'-'.join(run)}]") for item in request.session.items)]
    started = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (tool, which) in enumerate(asked):
            output = Path(scratch) / f"{tool}-{which}"
            with output.open("wb") as file:
                options = command(sanitizer, *arguments(tool, which, number), which=which)
                started[tool, which] = subprocess.Popen(**options, stdout=file, stderr=subprocess.STDOUT), output
        yield started
        for process, _ in started.values():
            process.kill()
            process.wait()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_compute_sanitizer_finds_nothing(
    run: tuple[str, str], running: dict[tuple[str, str], tuple[subprocess.Popen[bytes], Path]]
) -> None:
    process, output = running[run]
    try:
        process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        pytest.fail(f"not finished in time:\n{output.read_text(errors='replace')[-4000:]}")
    text = output.read_text(errors="replace")
    assert process.returncode == 0, text[-6000:]
    ran = [str(check).replace(" ", "-") for check in kernels.checks("cuda", "")] if run[1] == "kernels" else list(JOBS)
    assert set(ran) <= set(text.split())
    assert "Detected overflow of tracked cuda::barrier" not in text
