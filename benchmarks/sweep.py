"""Many cases one after the other into one result file, which is saved after every mode so that a cut run keeps what it has."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .case import MODES, make_case
from .clock import make_clock
from .measure import label, measure
from .providers import Provider
from .results import ResultFile
from .truth import exact


@dataclass(frozen=True)
class Job:
    """A case to be made, and the modes to measure on it."""

    n: int
    d: int
    v: int
    dtype: torch.dtype = torch.bfloat16
    inputs: str = "peaked"
    modes: tuple[str, ...] = MODES

    def __str__(self) -> str:
        return f"{self.inputs} N={self.n} D={self.d} V={self.v} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Limits:
    """rounds: runs of a provider that count; seconds: for the timed rounds of one mode; until: ``time.monotonic`` at which no
    further mode is begun."""

    rounds: int = 20
    seconds: float = float("inf")
    until: float = float("inf")


def sweep(
    jobs: Sequence[Job], providers: Sequence[Provider], result: ResultFile, folder: Path | None, device: str, limits: Limits
) -> None:
    """Measure every job and mode into ``result``, in this order, until time is up; what was left out is printed.

    Raises DeviceLost when a provider breaks the GPU; everything before is saved.
    """
    clock = make_clock(device)
    for job in jobs:
        if time.monotonic() > limits.until:
            print(f"left out, time is up: {job} {' '.join(job.modes)}", flush=True)
            continue
        case = make_case(job.n, job.d, job.v, job.dtype, inputs=job.inputs, device=device)
        print(
            f"\n{job}: mean entropy {float(case.entropy.mean()):.2f} nats, largest |logit| {case.largest_logit:.1f}", flush=True
        )
        dense = exact(case)
        for mode in job.modes:
            if time.monotonic() > limits.until:
                print(f"left out, time is up: {job} {mode}", flush=True)
                continue
            this = case.for_mode(mode)
            truth = dense if this is case else exact(this)
            verdict, rows = measure(this, truth, list(providers), mode, clock, rounds=limits.rounds, seconds=limits.seconds)
            result.add(label(this, mode), verdict, rows)
            if folder is not None:
                result.save(folder)
            print_rows(mode, rows)
            for sentence in verdict["red"]:
                print(f"gate red: {sentence}", file=sys.stderr, flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()


def print_missing(providers: Sequence[Provider], device: str) -> None:
    """Who cannot run here, and why."""
    for provider in providers:
        reason = provider.unavailable(device)
        if reason is not None:
            print(f"not here: {provider.name}: {reason}")


def print_rows(mode: str, rows: list[dict[str, Any]]) -> None:
    """A short table of one case and mode, fastest first, then who failed."""
    timed = sorted((r for r in rows if r["ms"]), key=lambda r: r["ms"]["p50"])
    if timed:
        title = f"{mode}, {timed[0]['rounds']} rounds"
        print(f"{title:34} {'ms':>9} {'/floor':>7} {'/unfused':>8} {'MiB':>7}  largest error")
    for row in timed:
        over = [
            f"{row['time_over'][base]:.2f}" if base in row["time_over"] else "-" for base in ("bare_gemms", "unfused_eager")
        ]
        error = f"{max(row['errors'].values()):.1e}" if row["errors"] else "-"
        mib = row["peak_bytes"] / 2**20
        print(f"  {row['provider']:32} {row['ms']['p50']:9.2f} {over[0]:>7} {over[1]:>8} {mib:7.0f}  {error}")
    for row in rows:
        if row["error"]:
            print(f"  {row['provider']:32} {row['error']}")
    sys.stdout.flush()
