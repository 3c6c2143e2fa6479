"""compute-sanitizer over every kernel: accesses out of bounds (memcheck), races in shared memory (racecheck)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import JOBS

SCRIPT = Path(__file__).with_name("sanitized.py")
ROOT = SCRIPT.parents[2]
FOUND = 97
"""Exit code of compute-sanitizer when it has found something."""


def run_script(*prefix: str, which: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Every allocation is its own, so that memcheck sees an access behind a tensor that hits another one."""
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command = [*prefix, sys.executable, str(SCRIPT), which]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT, env=environment)


def test_the_script_runs_every_job() -> None:
    done = run_script(which="tiny", seconds=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == 2 * list(JOBS)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("tool", "which"), [("memcheck", "small"), ("racecheck", "tiny")])
def test_compute_sanitizer_finds_nothing(tool: str, which: str) -> None:
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer not found")
    done = run_script(sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), which=which, seconds=300)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    assert set(JOBS) <= set(done.stdout.split())
