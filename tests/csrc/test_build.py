"""Building: the cache by content, concurrent processes, compiler errors; and the sources in the
wheel.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda.bindings import nvrtc
from cuda.pathfinder import DynamicLibNotFoundError

from eapo_kernels.ops import verdicts
from eapo_kernels.ops.cuda import __main__ as command
from eapo_kernels.ops.cuda import build, tiles
from eapo_kernels.ops.cuda.tiles import TILES, Build

pytestmark = pytest.mark.csrc

ROOT = Path(__file__).parents[2]
ITEM = Build("stream_statistics", TILES[0], "bf16", entropy=True)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def another_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (nvrtc.nvrtcResult.NVRTC_SUCCESS, 99, 9))


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the sources that a test may change."""
    return Path(shutil.copytree(build.source_folder(), tmp_path / "sources"))


def test_a_second_call_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = build.cubin(ITEM, cache=tmp_path), build.ptx(ITEM, cache=tmp_path)
    assert code.startswith(b"\x7fELF")
    assert ".target sm_90a" in text
    assert text.count(".entry stream_statistics(") == 1
    assert "wgmma.mma_async" in text
    assert "\0" not in text
    assert {path.read_bytes() for path in files(tmp_path)} == {code, text.encode()}
    monkeypatch.setattr(build, "compile_source", lambda *_: pytest.fail("compiled again"))
    assert build.cubin(ITEM, cache=tmp_path) == code
    assert build.ptx(ITEM, cache=tmp_path) == text


def test_the_key_covers_source_headers_options_form_and_compiler(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.key(ITEM, "cubin", sources)
    assert first == build.key(ITEM, "cubin", build.source_folder()), "the path of the folder is not part of it"
    items = list(tiles.builds())
    assert len({build.key(item, "cubin", sources) for item in items}) == len(items)
    seen = [first, build.key(ITEM, "ptx", sources)]
    for name in ("epilogue.h", "stream_statistics.cu"):
        (sources / name).write_text((sources / name).read_text() + "\n")
        seen.append(build.key(ITEM, "cubin", sources))
    another_compiler(monkeypatch)
    seen.append(build.key(ITEM, "cubin", sources))
    assert len(set(seen)) == 5
    (sources / "scaled_exp_gemm.cu").write_text("")
    assert build.key(ITEM, "cubin", sources) == seen[-1], "the other kernel's source is not part of it"


def test_a_failed_build_ends_with_the_compilers_last_lines(sources: Path, tmp_path: Path) -> None:
    file = sources / "stream_statistics.cu"
    file.write_text(file.read_text() + "\nint wrong = nothing_of_this_name;\n")
    with pytest.raises(build.BuildError, match="stream_statistics shared bf16 entropy: expected to compile") as caught:
        build.cubin(ITEM, sources=sources, cache=tmp_path / "cache")
    assert "nothing_of_this_name" in str(caught.value)
    assert "detected in the compilation" in str(caught.value).splitlines()[-1]
    assert files(tmp_path / "cache") == [], "nothing partial is cached"


def test_headers_of_the_working_directory_are_ignored(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for header in sources.glob("*.h"):
        (tmp_path / header.name).write_text("#error a file of the user\n")
    monkeypatch.chdir(tmp_path)
    assert build.compile_source(ITEM, sources).startswith(b"\x7fELF")


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise DynamicLibNotFoundError(f"no lib{name}.so")

    monkeypatch.setattr(build, "load_nvidia_dynamic_lib", missing)
    with pytest.raises(build.BuildError, match=r"expected the library of the package nvidia-cuda-nvrtc, got none\nno libnvrtc"):
        build.cubin(ITEM, cache=tmp_path)


def test_processes_may_build_at_once(tmp_path: Path) -> None:
    code = (
        "import hashlib; from eapo_kernels.ops.cuda import build; from eapo_kernels.ops.cuda.tiles import TILES, Build; "
        "item = Build('stream_statistics', TILES[0], 'bf16', entropy=True); "
        "print(hashlib.sha256(build.cubin(item)).hexdigest())"
    )
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HOME": "/nowhere"}

    def start(_: int) -> str:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        return done.stdout

    with ThreadPoolExecutor(2) as pool:
        (answer,) = set(pool.map(start, range(2)))
    (stored,) = files(tmp_path / "eapo_kernels")
    assert hashlib.sha256(stored.read_bytes()).hexdigest() == answer.strip(), "and no temporary file is left"


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(build, "compile_source", lambda *_: b"code")
    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space left"):
        build.cubin(ITEM, cache=tmp_path)
    assert files(tmp_path) == []


def test_a_home_that_cannot_be_written_uses_the_temporary_folder_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    compiled: list[int] = []
    monkeypatch.setattr(build, "compile_source", lambda *_: compiled.append(1) or b"code")
    assert [build.cubin(ITEM), build.cubin(ITEM)] == [b"code"] * 2
    assert len(compiled) == 1, "kept in the temporary folder"
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(blocked))
    assert build.cubin(ITEM) == b"code"
    assert len(compiled) == 2


@pytest.mark.parametrize(("value", "expected"), [("/somewhere", "/somewhere"), ("", "~/.cache"), ("relative", "~/.cache")])
def test_cache_folder(value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert build.cache_folder() == Path(expected).expanduser() / "eapo_kernels"


def test_packages_carry_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel has them beside the package's modules, where ``source_folder`` looks first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert project["wheel"]["force-include"] == {"csrc": "eapo_kernels/_csrc"}
    assert "csrc" in project["sdist"]["include"]
    assert build.source_folder() == ROOT / "csrc"
    shipped = tmp_path / "eapo_kernels" / "_csrc"
    shipped.mkdir(parents=True)
    monkeypatch.setattr(verdicts, "__file__", str(tmp_path / "eapo_kernels" / "ops" / "verdicts.py"))
    assert build.source_folder() == shipped


def test_the_sources_include_nothing_but_each_other() -> None:
    """So no CUDA header has to be found. ``math.h`` is for the host, and NVRTC never sees it."""
    sources = [path for path in build.source_folder().iterdir() if path.suffix in (".h", ".cu")]
    included = {
        line.split(maxsplit=1)[1] for path in sources for line in path.read_text().splitlines() if line.startswith("#include")
    }
    assert included - {f'"{path.name}"' for path in sources} == {"<math.h>"}


def test_the_command_builds_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "compile_source", lambda item, folder, form: b"code")
    assert command.main(["--build"]) == 0
    number = len(list(tiles.builds()))
    assert f"{number} kernels in {tmp_path / 'eapo_kernels'}" in capsys.readouterr().out
    assert len(files(tmp_path / "eapo_kernels")) == number


def test_the_command_names_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(item: Build, folder: Path, form: build.Form) -> bytes:
        raise build.BuildError("it does not compile")

    monkeypatch.setattr(build, "compile_source", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert command.main(["--build"]) == 1
    assert capsys.readouterr().err == "it does not compile\n"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert command.main(["--build"]) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("expected a cache folder (in XDG_CACHE_HOME) that can be written, got: ")
    assert str(tmp_path / "file" / "eapo_kernels") in message
    code = (
        "import sys; sys.modules['cuda.core'] = None; from eapo_kernels.ops.cuda.__main__ import main; exit(main(['--build']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    (message,) = done.stderr.splitlines()
    assert message.startswith("expected the packages of eapo-kernels[cuda], got: ")
