"""The directory of a run: what went in, and one JSON line for everything that came out."""

from __future__ import annotations

import json
import math
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..config import Config
from ..config.settings import to_toml
from ..errors import ConfigError

PACKAGES = ("torch", "triton", "transformers", "peft", "datasets", "numpy", "eapo-kernels")


class RunDirectory:
    """``<out>/<name>`` with config.toml, environment.json, metrics.jsonl, samples.jsonl, evaluations.jsonl and model/.

    Raises:
        ConfigError: it holds results already and ``overwrite`` is off.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.out) / config.name
        if any((self.path / name).exists() for name in ("metrics.jsonl", "evaluations.jsonl")):
            if not config.overwrite:
                raise ConfigError(
                    f"name: expected a new run (or --overwrite True), got {config.name!r}, which is in {self.path}"
                )
            for stale in (*self.path.glob("*.jsonl"), self.path / "report.md", self.path / "curves.png"):
                stale.unlink(missing_ok=True)
            shutil.rmtree(self.model, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.toml").write_text(to_toml(config))
        (self.path / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")

    @property
    def model(self) -> Path:
        return self.path / "model"

    def append(self, stream: str, record: dict[str, Any]) -> None:
        """Add one JSON object to ``<stream>.jsonl``; it is in the file when this returns. NaN becomes null."""
        with (self.path / f"{stream}.jsonl").open("a") as file:
            file.write(json.dumps(_finite(record), ensure_ascii=False) + "\n")


def read(path: Path, stream: str) -> list[dict[str, Any]]:
    """The objects of ``<stream>.jsonl`` in a run's directory; none when it does not exist."""
    file = path / f"{stream}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def environment() -> dict[str, Any]:
    """Versions, machine, command and git commit."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    cuda = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _git(*arguments: str) -> str | None:
    """Output of a git command in this checkout; None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
