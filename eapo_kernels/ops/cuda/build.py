"""Compiles CUDA C++ at first use: NVRTC through NVIDIA's ``cuda.core``, without nvcc and without
CUDA or torch headers.

``cuda.core``'s program cache stores the results in ``$XDG_CACHE_HOME/eapo_kernels`` or
``~/.cache/eapo_kernels``. The key is a hash of everything that a result depends on: the source, the
headers beside it, the options and the compiler's version. Files are written atomically, so any
number of processes may build at once.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Literal

from cuda.bindings import nvrtc
from cuda.core import Program, ProgramOptions
from cuda.core.utils import FileStreamProgramCache, make_program_cache_key
from cuda.pathfinder import DynamicLibNotFoundError, LoadedDL, load_nvidia_dynamic_lib

from ...errors import EapoError
from ..verdicts import cache_folder, source_folder, temporary_folder
from .tiles import Build

try:
    from cuda.core import NVRTCError
except ImportError:  # before 1.3 it is not exported
    from cuda.core._utils.cuda_utils import NVRTCError

ARCHITECTURE = "sm_90a"
"""Hopper with its own instructions (wgmma, setmaxnreg): this code runs on compute capability 9.0
only.
"""

Form = Literal["cubin", "ptx"]

_LAST_LINES = 30

_COMPLAINTS = ("serialized", "injected")
"""Words of the compiler's remark that it waits after each wgmma. That would halve the speed, so it
is an error here.
"""


class BuildError(EapoError):
    """A kernel did not compile, or wgmma was serialised; the message ends with the compiler's last
    lines.
    """


def compiler() -> LoadedDL:
    """NVRTC's library, with its path and how it was found. Raises BuildError when it is missing."""
    try:
        return load_nvidia_dynamic_lib("nvrtc")
    except DynamicLibNotFoundError as error:
        raise BuildError(f"NVRTC: expected the library of the package nvidia-cuda-nvrtc, got none\n{error}") from error


def compiler_version() -> str:
    """NVRTC's version, such as "13.0"."""
    status, major, minor = nvrtc.nvrtcVersion()
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, status
    return f"{major}.{minor}"


def options(build: Build) -> ProgramOptions:
    """Compiler options, without the folder of the headers, which does not change the result."""
    defines = [(name, str(value)) for name, value in sorted(build.macros().items())]
    # Otherwise NVRTC would look for the headers in the current working directory first.
    return ProgramOptions(
        name=f"{build.kernel}.cu", arch=ARCHITECTURE, std="c++17", define_macro=defines, no_source_include=True
    )


def key(build: Build, form: Form, folder: Path) -> bytes:
    """Hash of everything that a result depends on. ``cuda.core`` does not hash headers, so they are
    hashed here.
    """
    headers = hashlib.sha256()
    for header in sorted(folder.glob("*.h")):
        data = header.read_bytes()
        headers.update(f"{header.name} {len(data)} ".encode() + data)
    return make_program_cache_key(
        code=_source(build, folder), code_type="c++", options=options(build), target_type=form, extra_digest=headers.digest()
    )


def cubin(build: Build, *, sources: Path | None = None, cache: Path | None = None) -> bytes:
    """The machine code of a build, read from the cache or compiled.

    cache: None: the user's cache folder, or the node's temporary one, or none, as can be written.
    Raises BuildError when it does not compile, OSError when ``cache`` cannot be written.
    """
    return _stored(build, "cubin", sources, cache)


def ptx(build: Build, *, sources: Path | None = None, cache: Path | None = None) -> str:
    """The PTX that the machine code is made from; cache and errors as for ``cubin``."""
    return _stored(build, "ptx", sources, cache).decode()


def _stored(build: Build, form: Form, sources: Path | None, cache: Path | None) -> bytes:
    folder = sources or source_folder()
    compiler()  # raises BuildError before ``cuda.core`` raises an error of its own
    name = key(build, form, folder)
    if cache is not None:
        return _through(cache, name, build, folder, form)
    for find in (cache_folder, temporary_folder):
        try:
            return _through(find(), name, build, folder, form)
        except OSError:  # a folder that cannot be written
            continue
    return compile_source(build, folder, form)


def _through(cache: Path, name: bytes, build: Build, folder: Path, form: Form) -> bytes:
    """The code from the cache, or compiled into it."""
    with FileStreamProgramCache(cache) as stored:
        code = stored.get(name)
        if code is None:
            code = stored[name] = compile_source(build, folder, form)
        return code


def compile_source(build: Build, folder: Path, form: Form = "cubin") -> bytes:
    """Run the compiler. Raises BuildError when the source does not compile or the compiler
    serialises wgmma.
    """
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
    """The PTX of a compiled program. ``Program.compile("ptx")`` would query the driver, which may
    be missing.
    """
    _, size = nvrtc.nvrtcGetPTXSize(program.handle)
    text = bytes(size)
    (status,) = nvrtc.nvrtcGetPTX(program.handle, text)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, status
    return text.rstrip(b"\0")


def _error(build: Build, log: str) -> BuildError:
    last = "\n".join(log.strip("\0\n ").splitlines()[-_LAST_LINES:])
    return BuildError(f"{build}: expected to compile with NVRTC {compiler_version()}, got\n{last}")
