"""The kernels' headers compiled for the host by g++, every warning an error."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from eapo_kernels.ops.cuda import build


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """``host.cpp`` as a library."""
    compiler = shutil.which("g++")
    assert compiler is not None, "the tests of the CUDA sources need g++"
    library = tmp_path_factory.mktemp("host") / "host.so"
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{build.source_folder()}"]
    command = [compiler, *options, str(Path(__file__).with_name("host.cpp")), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return ctypes.CDLL(str(library))
