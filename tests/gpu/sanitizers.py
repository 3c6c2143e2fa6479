"""Where compute-sanitizer is, and what it is told. Nothing here needs a GPU."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

FOUND = 97
"""Exit code of compute-sanitizer when it has found something."""

_PLACES = ("bin", "compute-sanitizer")
"""Of the program in the wheel ``nvidia-cuda-sanitizer-api``, below nvidia/cu13: of CUDA 13.0, of CUDA 13.5."""

BARRIERS = 16
"""At least as many as a program has (two a stage): the tool counts those that a compiler announces, ours are plain PTX."""


KERNELS = ("stream_statistics", "scaled_exp_gemm", "row_offsets", "finalize")
"""Parts of the CUDA kernels' names."""


def find_sanitizer() -> str | None:
    """The program: of the wheel where one is installed, else on PATH, else of a toolkit; None without any."""
    for folder in sys.path:
        for place in _PLACES:
            program = Path(folder) / "nvidia" / "cu13" / place / "compute-sanitizer"
            if os.access(program, os.X_OK):
                return str(program)
    return shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")


def arguments(tool: str, which: str, number: int) -> list[str]:
    """Options for ``sanitized.py which``; ``number`` tells runs apart that go on at once.

    For "kernels" only our kernels are watched, not those that make their inputs and the truth.
    """
    names = [word for kernel in KERNELS for word in ("--kernel-name", f"kns={kernel}")]
    watched = names if which == "kernels" else []
    counted = ["--num-cuda-barriers", str(BARRIERS)] if which == "kernels" and tool != "memcheck" else []
    return ["--tool", tool, "--error-exitcode", str(FOUND), "--port", str(49152 + 16 * number), *watched, *counted]
