"""The kernels' headers compiled for the host by g++, every warning an error."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest

from eapo_kernels.ops.cuda import build
from eapo_kernels.ops.cuda.launch import Launch


def compiled(library: Path, *sources: str) -> ctypes.CDLL:
    """Sources of this folder as a library."""
    compiler = shutil.which("g++")
    assert compiler is not None, "the tests of the CUDA sources need g++"
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{build.source_folder()}"]
    paths = [str(Path(__file__).with_name(name)) for name in sources]
    done = subprocess.run([*command, *paths, "-o", str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """``host.cpp`` and ``host_rows.cpp`` as a library."""
    return compiled(tmp_path_factory.mktemp("host") / "host.so", "host.cpp", "host_rows.cpp")


def run_rows(launch: Launch, host: ctypes.CDLL) -> None:
    """What a launch of a kernel over rows would leave behind: its arguments alone say what it reads and writes."""
    item, arguments = launch.build, launch.arguments
    assert launch.boxes == ()
    assert launch.programs == math.ceil(arguments.n_rows / item.rows)
    if item.kernel == "row_offsets":
        host.offset_rows(ctypes.byref(arguments), int(item.operand == "fp16"))
    else:
        {"finalize": host.finalize_rows, "scaled_exp_finalize": host.scaled_exp_finalize_rows}[item.kernel](
            ctypes.byref(arguments)
        )
