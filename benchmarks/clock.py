"""How long one run takes, and in which state the GPU was."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Protocol

import torch

_FLUSHED_BYTES = 2**28
"""Written before every timed run: more than any L2 cache (H200: 50 MB)."""


class Clock(Protocol):
    """Times single runs on one device."""

    def time(self, run: Callable[[], object]) -> float:
        """Milliseconds of one call, everything it started on the device included."""
        ...


class CpuClock:
    """Wall time."""

    def time(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3


class CudaClock:
    """CUDA events around the run, with the L2 cache flushed before.

    The flush also keeps the device busy while the host queues the run, so that launch overhead shows only where the device
    really waits for the host.
    """

    def __init__(self) -> None:
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")

    def time(self, run: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self._flushed.zero_()
        start.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end)


def make_clock(device: str) -> Clock:
    """The clock of a device type."""
    return CudaClock() if device == "cuda" else CpuClock()


def time_interleaved(
    runs: dict[str, Callable[[], object]], rounds: int, clock: Clock, *, seconds: float = float("inf"), seed: int = 0
) -> dict[str, list[float]]:
    """Milliseconds of up to ``rounds`` runs each, in a new random order every round, after one round that does not count.

    Stops early, after whole rounds and at least three, when ``seconds`` are over. All lists are equally long; place i of all
    lists comes from the same round, so that ratios can be taken of neighbours in time.
    """
    order, until = random.Random(seed), time.monotonic() + seconds
    times: dict[str, list[float]] = {name: [] for name in runs}
    for current in range(rounds + 1):
        for name in order.sample(list(runs), len(runs)):
            ms = clock.time(runs[name])
            if current:
                times[name].append(ms)
        if current >= 3 and time.monotonic() > until:
            break
    return times


_QUERY = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def telemetry(device: str) -> dict[str, float]:
    """Clocks, power and temperature of the GPU now; empty where nvidia-smi is not there or does not know."""
    if device != "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", f"--query-gpu={','.join(_QUERY.values())}", "--format=csv,noheader,nounits", "--id=0"]
    out = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return parse_telemetry(out)


def parse_telemetry(line: str) -> dict[str, float]:
    """``nvidia-smi``'s line of numbers by the names of this package; what it does not support is left out."""
    cells = [cell.strip() for cell in line.strip().split(",")]
    known = {name: cell for name, cell in zip(_QUERY, cells, strict=False) if cell.replace(".", "", 1).isdigit()}
    return {name: float(cell) for name, cell in known.items()}
