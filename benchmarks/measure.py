"""Interleaved timing, memory and accuracy of several providers on one case, and the rows that go into the JSON."""

from __future__ import annotations

import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eapo_kernels.testing import peak_memory

from .case import Case, Truth
from .providers import Provider, Results

GATE_FACTOR = 2.0
"""A provider of ours is red when an error is more than this many times unfused PyTorch's, plus the floor below."""

GATE_FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def environment() -> dict[str, Any]:
    """Where and with what the numbers were made."""
    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root, check=False)
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def relative_errors(results: Results, truth: Truth) -> dict[str, float]:
    """||result - truth|| / ||truth|| of everything the provider returned."""

    def error(name: str, value: Tensor) -> float:
        exact = getattr(truth, name)
        return float((value.double() - exact).norm() / exact.norm())

    return {name: error(name, value) for name, value in results.items()}


def gate(errors: dict[str, dict[str, float]], dtype: torch.dtype) -> dict[str, Any]:
    """Green when each of our errors is at most twice unfused PyTorch's plus the dtype's rounding."""
    plain = errors["unfused_eager"]
    red = [
        f"{provider}: {name} error {value:.2e}, unfused {plain[name]:.2e}"
        for provider, ours in errors.items()
        if provider.startswith("eapo")
        for name, value in ours.items()
        if not value <= GATE_FACTOR * plain[name] + GATE_FLOOR[dtype]
    ]
    return {"green": not red, "red": red}


def time_interleaved(runs: dict[str, Callable[[], object]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Milliseconds of ``rounds`` runs each, in a new random order every round, after one round that does not count."""
    order, clock = random.Random(seed), time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for current in range(rounds + 1):
        for name in order.sample(list(runs), len(runs)):
            start = clock()
            runs[name]()
            if current:
                times[name].append((clock() - start) * 1e3)
    return times


def measure(
    case: Case, truth: Truth, providers: list[Provider], mode: str, rounds: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(gate, rows) of one case and mode. Rows are made only when the gate is green."""
    able = [p for p in providers if mode in p.modes]
    runs = {p.name: p.prepare(case, mode) for p in able}
    errors = {name: relative_errors(run(), truth) for name, run in runs.items()}
    verdict = gate(errors, case.dtype)
    if not verdict["green"]:
        return verdict, []
    memory = {name: peak_memory(run) for name, run in runs.items()}
    times = time_interleaved(runs, rounds)
    rows = []
    for provider in able:
        ms = sorted(times[provider.name])
        p20, p50, p80 = (ms[round(q * (len(ms) - 1))] for q in (0.2, 0.5, 0.8))
        ratios = {
            f"time_over_{base}": statistics.median(a / b for a, b in zip(times[provider.name], times[base], strict=True))
            for base in ("unfused_eager", "bare_gemms")
        }
        rows.append(
            {
                "provider": provider.name,
                "mode": mode,
                "job": provider.job,
                "shape": case.shape(),
                "inputs": case.inputs_name,
                "mean_entropy_nats": float(truth.entropy.mean()),
                "ms": {"p20": p20, "p50": p50, "p80": p80},
                **ratios,
                "peak_bytes": memory[provider.name],
                "errors": errors[provider.name],
            }
        )
    return verdict, rows
