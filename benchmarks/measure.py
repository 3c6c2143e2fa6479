"""Measuring: accuracy, memory and interleaved time of every provider on a case, behind a
correctness gate, as rows."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from eapo_kernels.testing import peak_memory

from .case import MODES, Case, Reference, Results, make_case, reference_of
from .providers import Provider
from .results import ResultFile, telemetry

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

    The flush also keeps the device busy while the host queues the run, so that launch overhead
    shows only where the device really waits for the host.
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
    """Milliseconds of up to ``rounds`` runs each, in a new random order every round, after one
    round that does not count.

    Stops early, after whole rounds and at least three, when ``seconds`` are over. All lists are
    equally long; place i of all lists comes from the same round, so that ratios can be taken of
    neighbours in time.
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


BOUNDS = {"logp": 5e-5, "entropy": 5e-5, "loss": 1e-3}
"""Largest relative error of ours, whatever the dtype: statistics come from fp32 sums. A loss is a
difference of large parts."""

GRADIENT_BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""The same for gradients: a few roundings of the gradient matrix and of the result to the dtype.
Not a multiple of unfused PyTorch's error, which in bf16 is 5 to 10 % on peaked logits."""

BASES = ("bare_gemms", "unfused_eager")

Errors = dict[str, float]


class DeviceLost(RuntimeError):
    """A provider left the GPU unusable for this process."""


def label(case: Case, mode: str) -> str:
    """The name of a case and mode, for people and as a key."""
    shape = " ".join(f"{key}={value}" for key, value in case.shape().items())
    budget = "" if case.memory_budget is None else f" budget={case.memory_budget / 2**20:g}MiB"
    return f"{mode} {case.inputs_name} {shape}{budget}"


def gate(errors: dict[str, Errors], dtype: torch.dtype, tolerance: float | None = None) -> dict[str, Any]:
    """Green when each error of each provider of ours is within its bound, and each was compared at
    all. tolerance: of gradients, which may then differ by twice as much."""
    red = []
    for provider, ours in errors.items():
        if provider.startswith("eapo"):
            red += [] if ours else [f"{provider}: nothing was compared"]
            bounds = {name: BOUNDS.get(name, max(GRADIENT_BOUND[dtype], 2 * (tolerance or 0))) for name in ours}
            red += [f"{provider}: {n} error {v:.2e}, allowed {bounds[n]:.0e}" for n, v in ours.items() if not v <= bounds[n]]
    return {"green": not red, "red": red}


def measure(
    case: Case,
    reference: Reference,
    providers: list[Provider],
    mode: str,
    clock: Clock,
    *,
    rounds: int,
    seconds: float = float("inf"),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(verdict, rows) of one case and mode, ``case`` and ``reference`` being those of the mode.

    A provider that cannot run has a row with the reason in "error". When the verdict is red, none
    is timed. Raises DeviceLost when the GPU fails for good.
    """
    device = case.hidden.device.type
    torch.compiler.reset()  # compiled providers start anew: past a few shapes they would silently fall back to eager
    able = [p for p in providers if mode in p.modes]
    runs: dict[str, Callable[[], Results]] = {}
    errors: dict[str, Errors] = {}
    largest: dict[str, Errors] = {}
    metrics: dict[str, dict[str, float]] = {}
    memory: dict[str, int] = {}
    reasons: dict[str, str] = {}
    broken: list[str] = []
    for provider in able:
        reason = provider.unavailable(device)
        if reason is None:
            reason = _try(provider, case, reference, mode, runs, errors, largest, metrics, memory)
            if reason is not None and provider.name.startswith("eapo"):
                broken.append(f"{provider.name}: {reason}")
        if reason is not None:
            reasons[provider.name] = reason
    verdict = gate(errors, case.dtype, case.gradient_tolerance)
    verdict["red"] += broken
    verdict["green"] = not verdict["red"]
    guarded = {name: _guarded(name, run, reasons) for name, run in runs.items()}
    times = time_interleaved(guarded, rounds, clock, seconds=seconds) if verdict["green"] else {}
    times = {name: ms for name, ms in times.items() if name not in reasons}
    state = telemetry(device)
    rows = [
        _row(provider, case, mode, reference)
        | {"errors": errors.get(provider.name, {}), "largest_errors": largest.get(provider.name, {})}
        | {"peak_bytes": memory.get(provider.name)}
        | ({"metrics": metrics[provider.name]} if metrics.get(provider.name) else {})
        | _timing(provider.name, times, case.useful_flops(mode))
        | {"clocks": state, "error": reasons.get(provider.name) or (None if verdict["green"] else "not timed: the gate is red")}
        for provider in able
    ]
    return verdict, rows


def _try(
    provider: Provider,
    case: Case,
    reference: Reference,
    mode: str,
    runs: dict[str, Callable[[], Results]],
    errors: dict[str, Errors],
    largest: dict[str, Errors],
    metrics: dict[str, dict[str, float]],
    memory: dict[str, int],
) -> str | None:
    """Prepare and run once for the errors and once for the memory; why it failed, or None."""
    cuda = case.hidden.is_cuda
    try:
        run = provider.prepare(case, mode)
        results = run()
        errors[provider.name] = reference.errors(results, provider.objective)
        largest[provider.name] = reference.largest_errors(results, provider.objective)
        metrics[provider.name] = {name: float(value) for name, value in results.items() if "/" in name}
        del results  # before the memory is measured
        memory[provider.name] = peak_memory(run, case.hidden.device)
        runs[provider.name] = run
    except Exception as error:  # a peer's own code: whatever it raises is its result
        errors.pop(provider.name, None)
        largest.pop(provider.name, None)
        if cuda:
            _check_device(provider.name, error)
        return _sentence(error)
    return None


def _guarded(name: str, run: Callable[[], Results], reasons: dict[str, str]) -> Callable[[], Results]:
    """``run``, which after a failure does nothing any more but leave its reason: the others go
    on."""

    def call() -> Results:
        if name not in reasons:
            try:
                return run()
            except Exception as error:  # a peer's own code, beside the others' buffers
                reasons[name] = f"while timed: {_sentence(error)}"
                if torch.cuda.is_available():
                    _check_device(name, error)
        return {}

    return call


def _check_device(name: str, error: Exception) -> None:
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except RuntimeError as lost:
        raise DeviceLost(f"{name} left the GPU unusable ({_sentence(error)}); run again with --without {name}") from lost


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def _row(provider: Provider, case: Case, mode: str, reference: Reference) -> dict[str, Any]:
    return {
        "provider": provider.name,
        "mode": mode,
        "job": provider.job,
        "objective": provider.objective,
        "settings": provider.settings,
        "shape": case.shape(),
        "inputs": case.inputs_name,
        "memory_budget": case.memory_budget,
        "mean_entropy_nats": float(reference.entropy[reference.valid].mean()),
        "largest_logit": case.largest_logit,
    }


def _timing(name: str, times: dict[str, list[float]], flops: int) -> dict[str, Any]:
    """Quantiles, useful rate, and medians of the ratios to the bases in the same round."""
    if name not in times:
        return {"ms": None, "rounds": 0, "tflops_useful": None, "time_over": {}}
    ms = sorted(times[name])
    p20, p50, p80 = (ms[round(q * (len(ms) - 1))] for q in (0.2, 0.5, 0.8))
    over = {
        base: statistics.median(a / b for a, b in zip(times[name], times[base], strict=True)) for base in BASES if base in times
    }
    return {
        "ms": {"p20": p20, "p50": p50, "p80": p80},
        "rounds": len(ms),
        "tflops_useful": flops / p50 / 1e9,
        "time_over": over,
    }


@dataclass(frozen=True)
class Job:
    """A case to be made, and the modes to measure on it."""

    n: int
    d: int
    v: int
    dtype: torch.dtype = torch.bfloat16
    inputs: str = "peaked"
    modes: tuple[str, ...] = MODES
    memory_budget: int | None = None

    def __str__(self) -> str:
        budget = "" if self.memory_budget is None else f" budget={self.memory_budget / 2**20:g}MiB"
        return f"{self.inputs} N={self.n} D={self.d} V={self.v} {str(self.dtype).removeprefix('torch.')}{budget}"


@dataclass(frozen=True)
class Limits:
    """rounds: runs of a provider that count; seconds: for the timed rounds of one mode; until:
    ``time.monotonic`` at which no further mode is begun."""

    rounds: int = 20
    seconds: float = float("inf")
    until: float = float("inf")


def sweep(
    jobs: Sequence[Job], providers: Sequence[Provider], result: ResultFile, folder: Path | None, device: str, limits: Limits
) -> None:
    """Measure every job and mode into ``result``, in this order, until time is up; what was left
    out is printed.

    Raises DeviceLost when a provider breaks the GPU; everything before is saved.
    """
    clock = make_clock(device)
    for job in jobs:
        if time.monotonic() > limits.until:
            print(f"left out, time is up: {job} {' '.join(job.modes)}", flush=True)
            continue
        case = make_case(job.n, job.d, job.v, job.dtype, inputs=job.inputs, device=device, memory_budget=job.memory_budget)
        print(
            f"\n{job}: mean entropy {float(case.entropy.mean()):.2f} nats, largest |logit| {case.largest_logit:.1f}", flush=True
        )
        dense = reference_of(case)
        for mode in job.modes:
            if time.monotonic() > limits.until:
                print(f"left out, time is up: {job} {mode}", flush=True)
                continue
            this = case.for_mode(mode)
            reference = dense if this is case else reference_of(this)
            verdict, rows = measure(this, reference, list(providers), mode, clock, rounds=limits.rounds, seconds=limits.seconds)
            result.add(label(this, mode), verdict, rows)
            if folder is not None:
                result.save(folder)
            print_rows(mode, rows)
            for sentence in verdict["red"]:
                print(f"gate red: {sentence}", file=sys.stderr, flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()


def print_missing(providers: Sequence[Provider], device: str) -> None:
    """Which providers cannot run here, and why."""
    for provider in providers:
        reason = provider.unavailable(device)
        if reason is not None:
            print(f"not here: {provider.name}: {reason}")


def print_rows(mode: str, rows: list[dict[str, Any]]) -> None:
    """A short table of one case and mode, fastest first, then those that failed."""
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
