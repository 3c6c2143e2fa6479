"""The directory of a run: its configuration, and log files of one JSON object a line."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic_core import to_json

from eapo_kernels.ops.dispatch import VARIABLE
from eapo_kernels.ops.verdicts import used

from .. import ranks
from ..config import Config
from ..config.settings import to_toml
from ..dataset import json_lines
from ..errors import CheckpointError, ConfigError, DataError, check
from .checkpoint import remove
from .locate import checkpoints

STREAMS = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl")
RESULTS = (*STREAMS, "finished.json", "report.md", "curves.png")
"""Files of a run that the next one of its name does not write at its start. A new run removes an
earlier one's files by name, so other files in its directory stay."""
PACKAGES = ("torch", "triton", "transformers", "peft", "datasets", "numpy", "eapo-kernels")


class RunDirectory:
    """``<out>/<name>`` with config.toml, environment.json, metrics.jsonl, samples.jsonl,
    evaluations.jsonl, model/ and checkpoints/. Only rank 0 writes.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, Path(config.out).expanduser() / config.name
        self.model, self.checkpoints = self.path / "model", self.path / "checkpoints"
        self._environment, self._finished = self.path / "environment.json", self.path / "finished.json"
        self._kernels: dict[str, str] = {}

    def check_free(self, *, replace: bool) -> None:
        """Refuse a directory whose results or model must not be replaced. Changes nothing.

        Raises:
            ConfigError: there are results and ``replace`` is False, or a model or checkpoints that
                no run wrote; or as ``check_writable``.
        """
        self.check_writable()
        if not replace and any((self.path / name).exists() for name in ("metrics.jsonl", "evaluations.jsonl")):
            raise ConfigError(
                f"name: expected a new run (or --overwrite True, or --resume auto), got {self.config.name!r}, "
                f"which is in {self.path}"
            )
        if not self._environment.exists() and (self.model.exists() or self.checkpoints.exists()):
            raise ConfigError(f"name: expected a new directory or that of a run, got {self.path}, where no run wrote model/")

    def check_writable(self) -> None:
        """
        Raises:
            ConfigError: files cannot be written to the directory.
        """
        there = next(path for path in (self.path, *self.path.parents) if os.path.lexists(path))
        writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        check(writable, "out", f"a directory in which {self.config.name!r} can be written", str(there))

    def start(self) -> None:
        """Begin a new run in the place of an earlier one. Called when everything that the run needs
        has been loaded, because the earlier run's files are removed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for name in RESULTS:
            (self.path / name).unlink(missing_ok=True)
        for stale in checkpoints(self.checkpoints):
            remove(stale)
        if self.model.exists():
            shutil.rmtree(self.model)
        self._describe(environment())

    def resume(self) -> None:
        """Continue the run: its configuration and environment are the present ones."""
        self._describe({**self._described(), **environment()})
        self._finished.unlink(missing_ok=True)

    def _describe(self, content: Mapping[str, Any]) -> None:
        """Write environment.json, and the present configuration without ``overwrite`` and ``resume``."""
        _write(self._environment, json.dumps(content, indent=2) + "\n")
        _write(self.path / "config.toml", to_toml(self.config.replace(overwrite=False, resume="")))

    def _described(self) -> dict[str, Any]:
        return _json(self._environment) or {}

    def command(self) -> str:
        """The command that resumes the run."""
        start = f"torchrun --standalone --nproc-per-node {ranks.size()}" if ranks.size() > 1 else "python"
        return f"{start} -m trainer train --config {self.path / 'config.toml'} --resume auto"

    def finish(self, step: int) -> None:
        """Mark the run as finished, after all its files have been written."""
        _write(self._finished, json.dumps({"step": step}) + "\n")

    def finished(self) -> int | None:
        """Number of steps of a finished run; None for an unfinished one."""
        found = _json(self._finished)
        return found["step"] if found else None

    def record_kernels(self) -> str | None:
        """Write what computed the losses so far to environment.json; return what has changed since
        an earlier part of this run, or None.

        Another backend changes the last bits of a loss, so a resumed run may differ from one that
        was not interrupted.
        """
        now = {VARIABLE: os.environ.get(VARIABLE, "auto"), **used()}
        if not ranks.is_main() or now == self._kernels:
            return None
        self._kernels, content = now, self._described()
        before = content.get("kernels", now)
        self._describe({**content, "kernels": now})
        changed = [
            f"{name}: {before[name]} before, {value} now" for name, value in now.items() if before.get(name, value) != value
        ]
        return f"other kernels than in the earlier part of the run: {'; '.join(changed)}" if changed else None

    def append(self, stream: str, record: dict[str, Any]) -> None:
        """Append one JSON object to ``<stream>.jsonl``. NaN becomes null; a value that JSON has no type for,
        text.

        Raises:
            OSError: it cannot be written; with the file's name.
        """
        if ranks.is_main():
            line = to_json(record, inf_nan_mode="null", bytes_mode="base64", serialize_unknown=True) + b"\n"
            path = self.path / f"{stream}.jsonl"
            try:
                with path.open("ab") as file:
                    file.write(line)
            except OSError as error:
                error.filename = str(path)  # a failed write does not say it
                raise

    def offsets(self) -> dict[str, int]:
        """Size in bytes of each log file."""
        return {name: (self.path / name).stat().st_size for name in STREAMS if (self.path / name).exists()}

    def sync(self) -> None:
        """Flush the log files to disk."""
        for name in self.offsets() if ranks.is_main() else ():
            with (self.path / name).open("rb") as file:
                os.fsync(file.fileno())

    def truncate(self, offsets: dict[str, int]) -> None:
        """Cut the log files back to earlier ``offsets()``, so that repeated steps are not logged
        twice.

        Raises:
            CheckpointError: a file is shorter than its offset.
        """
        there = self.offsets()
        for name, size in offsets.items():
            if there.get(name, 0) < size:
                expected = f"expected at least the {size} bytes of the checkpoint"
                raise CheckpointError(f"{self.path / name}: {expected}, got {there.get(name, 0)}")
        for name in there:
            os.truncate(self.path / name, offsets.get(name, 0))


def read(path: Path, stream: str) -> list[dict[str, Any]]:
    """The objects of ``<stream>.jsonl`` in a run's directory; none when it does not exist. A last
    line that a killed run left unfinished is skipped.

    Raises:
        DataError: another line is damaged.
    """
    file = path / f"{stream}.jsonl"
    try:
        return list(json_lines(file.read_bytes().split(b"\n")[:-1])) if file.exists() else []
    except ValueError as error:
        raise DataError(f"{file}: expected a JSON object a line, got {error}") from error


def _write(file: Path, text: str) -> None:
    """Write a file whole or leave the old one as it is."""
    scratch = file.with_name(f"{file.name}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def _json(file: Path) -> Any:
    """The content of a JSON file of the run; None where there is no such file."""
    try:
        return json.loads(file.read_bytes()) if file.exists() else None
    except ValueError as error:
        raise CheckpointError(f"{file}: expected JSON, got {error}: remove it, or restore it") from error


def environment() -> dict[str, Any]:
    """Versions, machine, command and git commit."""
    return {
        "command": sys.argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "processes": ranks.size(),
        "versions": {own.name: own.version for own in metadata.distributions() if own.name in PACKAGES},
    }


def _commit() -> str | None:
    """Git commit of this checkout, with "-dirty" where files differ from it; None outside one."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None
