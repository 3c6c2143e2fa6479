"""Result files: what is in them, writing one case after the other, finding the newest."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "results"
COMMIT = "BENCHMARK_COMMIT"
"""Environment variable that names the commit where there is a copy of the files without their
history."""

_RED = ".red.json"
"""How the names of files behind a red gate end: they never replace a green one."""

_PEERS = (
    "triton",
    "liger-kernel",
    "trl",
    "verl",
    "cut-cross-entropy",
    "quack-kernels",
    "unsloth_zoo",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
)


def environment(device: str) -> dict[str, Any]:
    """Where and with what the numbers are made."""
    cpu = f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
    gpu = torch.cuda.get_device_name() if device == "cuda" else cpu
    return {
        "gpu": gpu,
        "driver": _driver() if device == "cuda" else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in _PEERS},
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "clocks": telemetry(device),
    }


def _commit() -> str:
    """The commit; without a history what the environment says, else the package's version and a
    hash of its sources."""
    here = output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or os.environ.get(COMMIT, "")
    if here:
        return here
    sources = hashlib.sha256()
    for path in sorted([*(ROOT / "eapo_kernels").rglob("*.py"), *(ROOT / "csrc").glob("*")]):
        sources.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return f"{_version('eapo-kernels') or 'unknown'}+{sources.hexdigest()[:8]}"


def output(*command: str) -> str:
    """What a command prints; nothing where it fails or its program is not there."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


_TELEMETRY = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def telemetry(device: str) -> dict[str, float]:
    """Clocks, power and temperature of the GPU now, without what nvidia-smi does not know."""
    if device != "cuda":
        return {}
    query = f"--query-gpu={','.join(_TELEMETRY.values())}"
    return parse_telemetry(output("nvidia-smi", query, "--format=csv,noheader,nounits", "--id=0"))


def parse_telemetry(line: str) -> dict[str, float]:
    """``nvidia-smi``'s line of numbers by the names of this package; what it does not support is
    left out."""
    cells = [cell.strip() for cell in line.strip().split(",")]
    known = {name: cell for name, cell in zip(_TELEMETRY, cells, strict=False) if cell.replace(".", "", 1).isdigit()}
    return {name: float(cell) for name, cell in known.items()}


def _driver() -> str:
    return output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") or "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass
class ResultFile:
    """A result while it grows.

    Attributes:
        environment: see ``environment``.
        gate: "green", "tests" (of the test suite on a GPU) or None, "cases" by "<mode> <inputs>
            N=.. D=.. V=.. dtype=..", "red": sentences; "stages" of the GPU command: how many
            comparisons were right.
        rows: one a provider, case and mode; see ``measure``.
    """

    environment: dict[str, Any]
    gate: dict[str, Any] = field(default_factory=lambda: {"green": True, "red": [], "tests": None, "cases": {}})
    rows: list[dict[str, Any]] = field(default_factory=list)
    _replaced: dict[Path, bytes | None] = field(default_factory=dict, init=False, repr=False)

    @property
    def name(self) -> str:
        """``<gpu>-<date>-<commit>.json``, with ``.red.json`` behind a red gate; processors are
        "cpu"."""
        gpu = self.environment["gpu"]
        short = "cpu" if gpu.startswith("CPU") else "-".join(gpu.lower().removeprefix("nvidia ").split())
        ending = ".json" if self.gate["green"] else _RED
        return f"{short}-{self.environment['date'][:10]}-{self.environment['commit']}{ending}"

    def add(self, case: str, verdict: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Take in what ``measure`` found for a case and mode."""
        self.gate["cases"][case] = verdict
        self.redden(verdict["red"])
        self.rows += rows

    def redden(self, red: list[str]) -> None:
        """Note what is wrong; a single sentence turns the gate red for good."""
        self.gate["red"] += red
        self.gate["green"] = not self.gate["red"]

    def save(self, folder: Path) -> Path:
        """Write the file atomically and return its path.

        What this run wrote while it was still green goes when it is red, and what stood there
        before comes back.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.name
        if self.gate["green"]:
            self._replaced.setdefault(path, path.read_bytes() if path.exists() else None)
        scratch = path.with_suffix(".partial")
        content = {"environment": self.environment, "gate": self.gate, "rows": self.rows}
        scratch.write_text(json.dumps(_finite(content), indent=1) + "\n")
        scratch.replace(path)
        if not self.gate["green"]:
            self._give_back()
        return path

    def _give_back(self) -> None:
        for path, before in self._replaced.items():
            if before is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(before)
        self._replaced.clear()


def _finite(value: Any) -> Any:
    """NaN and infinities as text, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def load(path: Path) -> dict[str, Any]:
    """A result file; raises ValueError when a part is missing or the gate was red."""
    result = json.loads(path.read_text())
    missing = {"environment", "gate", "rows"} - set(result)
    if missing:
        raise ValueError(f"{path}: expected environment, gate and rows, got a file without {', '.join(sorted(missing))}")
    if "green" not in result["gate"]:
        raise ValueError(f"{path}: expected gate.green, got a file of an older schema")
    if not result["gate"]["green"]:
        raise ValueError(f"{path}: expected a green gate, got {'; '.join(result['gate']['red'])}")
    return result


def by_date(kind: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The results of this package's own GPU ("gpu") or processor ("cpu") runs, red ones left out, the latest last."""
    paths = [p for p in folder.glob("*.json") if p.name.startswith("cpu-") == (kind == "cpu") and not p.name.endswith(_RED)]
    return sorted((load(p) for p in paths), key=lambda r: str(r["environment"]["date"]))
