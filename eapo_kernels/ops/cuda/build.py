"""CUDA C++ to machine code at first use: NVRTC through NVIDIA's ``cuda.core``, no nvcc, no CUDA or torch headers.

``cuda.core``'s program cache keeps what comes out, under the hash of all that it depends on (its source and the headers beside
it, options, compiler version), in the user's cache folder, ``$XDG_CACHE_HOME/eapo_kernels`` or ``~/.cache/eapo_kernels``. A
file appears there whole or not at all, so any number of processes may build at once.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from cuda.bindings import nvrtc
from cuda.core import Program, ProgramOptions
from cuda.core.utils import FileStreamProgramCache, make_program_cache_key
from cuda.pathfinder import DynamicLibNotFoundError, LoadedDL, load_nvidia_dynamic_lib

from ...errors import EapoError
from .configs import Build

try:
    from cuda.core import NVRTCError
except ImportError:  # before 1.3 it is not exported
    from cuda.core._utils.cuda_utils import NVRTCError

ARCHITECTURE = "sm_90a"
"""Hopper with its own instructions (wgmma, setmaxnreg): this code runs on compute capability 9.0 only."""

Form = Literal["cubin", "ptx"]

_LAST_LINES = 30

_COMPLAINTS = ("serialized", "injected")
"""What the compiler says where it waits after each wgmma; to it that is a remark, here it would be half the speed."""


class BuildError(EapoError):
    """A kernel did not compile, or the compiler did as it should not; the message ends with the compiler's last lines."""


def source_folder() -> Path:
    """Where the sources are: in the wheel beside the package's modules, in a checkout in ``csrc``."""
    package = Path(__file__).parents[2]
    shipped = package / "_csrc"
    return shipped if shipped.is_dir() else package.parent / "csrc"


def cache_folder() -> Path:
    """Where results are kept. A relative ``XDG_CACHE_HOME`` does not count, as its specification says."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "eapo_kernels"


def compiler() -> LoadedDL:
    """NVRTC's library, with its path and how it was found. Raises BuildError when there is none."""
    try:
        return load_nvidia_dynamic_lib("nvrtc")
    except DynamicLibNotFoundError as error:
        raise BuildError(f"NVRTC: expected the library of the package nvidia-cuda-nvrtc, got none\n{error}") from error


def compiler_version() -> str:
    """NVRTC's, "13.0"."""
    status, major, minor = nvrtc.nvrtcVersion()
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, status
    return f"{major}.{minor}"


def options(build: Build) -> ProgramOptions:
    """What the compiler is told, without the folder of the headers, which changes nothing in the result."""
    defines = [(name, str(value)) for name, value in sorted(build.macros().items())]
    # The source is text without a folder: NVRTC would look for its headers in the user's current one first.
    return ProgramOptions(
        name=f"{build.kernel}.cu", arch=ARCHITECTURE, std="c++17", define_macro=defines, no_source_include=True
    )


def key(build: Build, form: Form, folder: Path) -> bytes:
    """Hash of everything that the result depends on. ``cuda.core`` does not look into headers, so they are hashed here."""
    headers = hashlib.sha256()
    for header in sorted(folder.glob("*.h")):
        data = header.read_bytes()
        headers.update(f"{header.name} {len(data)} ".encode() + data)
    return make_program_cache_key(
        code=_source(build, folder), code_type="c++", options=options(build), target_type=form, extra_digest=headers.digest()
    )


def cubin(build: Build, *, sources: Path | None = None, cache: Path | None = None) -> bytes:
    """The machine code of a build, from the cache or compiled now.

    Raises BuildError when it does not compile, OSError when the cache folder cannot be written.
    """
    return _stored(build, "cubin", sources, cache)


def ptx(build: Build, *, sources: Path | None = None, cache: Path | None = None) -> str:
    """What the machine code of a build is made from, as text: the same source, options, cache and errors as ``cubin``."""
    return _stored(build, "ptx", sources, cache).decode()


def _stored(build: Build, form: Form, sources: Path | None, cache: Path | None) -> bytes:
    folder = sources or source_folder()
    compiler()  # without one the key would be another, and the error ``cuda.core``'s
    name = key(build, form, folder)
    with FileStreamProgramCache(cache or cache_folder()) as stored:
        code = stored.get(name)
        if code is None:
            code = stored[name] = compile_source(build, folder, form)
        return code


def compile_source(build: Build, folder: Path, form: Form = "cubin") -> bytes:
    """Run the compiler. Raises BuildError also when it says that it had to serialise wgmma."""
    program = Program(_source(build, folder), "c++", replace(options(build), include_path=str(folder)))
    log = io.StringIO()
    try:
        code = program.compile("cubin", logs=log).code
        if any(word in log.getvalue() for word in _COMPLAINTS):
            raise _error(build, log.getvalue())
        return _ptx(program) if form == "ptx" else code
    except NVRTCError as error:
        raise _error(build, str(error)) from None
    finally:
        program.close()


def _source(build: Build, folder: Path) -> str:
    return (folder / f"{build.kernel}.cu").read_text()


def _ptx(program: Program) -> bytes:
    """Of a compiled program. ``Program.compile("ptx")`` would ask the driver for its version, and here may be none."""
    _, size = nvrtc.nvrtcGetPTXSize(program.handle)
    text = bytes(size)
    (status,) = nvrtc.nvrtcGetPTX(program.handle, text)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, status
    return text.rstrip(b"\0")


def _error(build: Build, log: str) -> BuildError:
    last = "\n".join(log.strip("\0\n ").splitlines()[-_LAST_LINES:])
    return BuildError(f"{build}: expected to compile with NVRTC {compiler_version()}, got\n{last}")
