"""CUDA C++ to machine code at first use: NVRTC from NVIDIA's wheels, no nvcc, no CUDA or torch headers.

What comes out is stored under the hash of all that it depends on (its source and the headers beside it, options, compiler
version) in the user's cache folder, ``$XDG_CACHE_HOME/eapo_kernels`` or ``~/.cache/eapo_kernels``. A file appears there whole
or not at all, so any number of processes may build at once.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from cuda.bindings import nvrtc

from ...errors import EapoError
from .configs import Build

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
    """Where cubins are kept. A relative ``XDG_CACHE_HOME`` does not count, as its specification says."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "eapo_kernels"


def compiler_version() -> str:
    """NVRTC's, "13.0"."""
    major, minor = _checked(nvrtc.nvrtcVersion())
    return f"{major}.{minor}"


def options(build: Build) -> list[str]:
    """What the compiler is told, without the folder of the headers, which changes nothing in the result."""
    defines = [f"-D{name}={value}" for name, value in sorted(build.macros().items())]
    return [f"--gpu-architecture={ARCHITECTURE}", "--std=c++17", *defines]


def digest(build: Build, folder: Path) -> str:
    """Hash of everything that the cubin depends on."""
    files = [*sorted(folder.glob("*.h")), folder / f"{build.kernel}.cu"]
    parts = [compiler_version(), *options(build)]
    for file in files:
        parts += [file.name, file.read_text()]
    state = hashlib.sha256()
    for part in parts:
        data = part.encode()
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def cubin(build: Build, *, sources: Path | None = None, cache: Path | None = None) -> bytes:
    """The machine code of a build, from the cache or compiled now.

    Raises BuildError when it does not compile, OSError when the cache folder cannot be written.
    """
    return _stored(build, "cubin", sources, cache)


def ptx(build: Build, *, sources: Path | None = None, cache: Path | None = None) -> str:
    """What the machine code of a build is made from, as text: the same source, options, cache and errors as ``cubin``."""
    return _stored(build, "ptx", sources, cache).decode()


def _stored(build: Build, form: Form, sources: Path | None, cache: Path | None) -> bytes:
    folder, cache = sources or source_folder(), cache or cache_folder()
    path = cache / f"{build.kernel}-{digest(build, folder)[:40]}.{form}"
    if path.exists():
        return path.read_bytes()
    code = compile_source(build, folder, form)
    cache.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=cache, prefix=f".{build.kernel}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(code)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return code


def compile_source(build: Build, folder: Path, form: Form = "cubin") -> bytes:
    """Run the compiler. Raises BuildError also when it says that it had to serialise wgmma."""
    path = folder / f"{build.kernel}.cu"
    flags = [flag.encode() for flag in [*options(build), f"--include-path={folder}"]]
    program = _checked(nvrtc.nvrtcCreateProgram(path.read_bytes(), path.name.encode(), 0, [], []))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(flags), flags)[0]
        log = _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace").strip("\0\n ")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS or any(word in log for word in _COMPLAINTS):
            last = "\n".join(log.splitlines()[-_LAST_LINES:])
            raise BuildError(f"{build}: expected to compile with NVRTC {compiler_version()}, got {status.name}\n{last}")
        if form == "ptx":
            return _text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).rstrip(b"\0")
        return _text(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        _checked(nvrtc.nvrtcDestroyProgram(program))


def _text(program: Any, size: Any, read: Any) -> bytes:
    """What NVRTC writes into a buffer of a size that it tells."""
    buffer = b"\0" * _checked(size(program))
    _checked(read(program, buffer))
    return buffer


def _checked(result: tuple[Any, ...]) -> Any:
    """The values of an NVRTC call. Raises BuildError for any other status than success."""
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BuildError(f"NVRTC: expected success, got {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
