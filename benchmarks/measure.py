"""One case and mode: everyone's accuracy, memory and interleaved time, behind a gate, as rows of the result file."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from eapo_kernels.testing import peak_memory

from .case import Case
from .clock import Clock, telemetry, time_interleaved
from .providers import Provider
from .truth import Results, Truth

GATE_FACTOR = 2.0
"""A provider of ours is red when an error is more than this many times unfused PyTorch's, plus the floor below."""

GATE_FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

BASES = ("bare_gemms", "unfused_eager")

Errors = dict[str, float]


class DeviceLost(RuntimeError):
    """A provider left the GPU unusable for this process."""


def label(case: Case, mode: str) -> str:
    """The name of a case and mode, for people and as a key."""
    shape = " ".join(f"{key}={value}" for key, value in case.shape().items())
    return f"{mode} {case.inputs_name} {shape}"


def gate(errors: dict[str, Errors], dtype: torch.dtype) -> dict[str, Any]:
    """Green when each of our errors is at most twice unfused PyTorch's plus the dtype's rounding."""
    plain = errors.get("unfused_eager", {})
    red = [
        f"{provider}: {name} error {value:.2e}, unfused {plain.get(name, 0.0):.2e}"
        for provider, ours in errors.items()
        if provider.startswith("eapo")
        for name, value in ours.items()
        if not value <= GATE_FACTOR * plain.get(name, 0.0) + GATE_FLOOR[dtype]
    ]
    return {"green": not red, "red": red}


def measure(
    case: Case,
    truth: Truth,
    providers: list[Provider],
    mode: str,
    clock: Clock,
    *,
    rounds: int,
    seconds: float = float("inf"),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(verdict, rows) of one case and mode, ``case`` and ``truth`` being those of the mode.

    A provider that cannot run has a row with the reason in "error". When the verdict is red, nobody is timed.
    Raises DeviceLost when the GPU fails for good.
    """
    device = case.hidden.device.type
    able = [p for p in providers if mode in p.modes]
    runs: dict[str, Callable[[], Results]] = {}
    errors: dict[str, Errors] = {}
    memory: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for provider in able:
        reason = provider.unavailable(device)
        if reason is None:
            reason = _try(provider, case, truth, mode, runs, errors, memory)
        if reason is not None:
            reasons[provider.name] = reason
    verdict = gate(errors, case.dtype)
    verdict["red"] += [f"{n}: {r}" for n, r in reasons.items() if n.startswith("eapo") and n in _started(able, device)]
    verdict["green"] = not verdict["red"]
    times = time_interleaved(runs, rounds, clock, seconds=seconds) if verdict["green"] else {}
    state = telemetry(device)
    rows = [
        _row(provider, case, mode, truth)
        | {"errors": errors.get(provider.name, {}), "peak_bytes": memory.get(provider.name)}
        | _timing(provider.name, times, case.useful_flops(mode))
        | {"clocks": state, "error": reasons.get(provider.name) or (None if verdict["green"] else "not timed: the gate is red")}
        for provider in able
    ]
    return verdict, rows


def _started(providers: list[Provider], device: str) -> set[str]:
    return {p.name for p in providers if p.unavailable(device) is None}


def _try(
    provider: Provider,
    case: Case,
    truth: Truth,
    mode: str,
    runs: dict[str, Callable[[], Results]],
    errors: dict[str, Errors],
    memory: dict[str, int],
) -> str | None:
    """Prepare and run once for the errors and once for the memory; why it failed, or None."""
    cuda = case.hidden.is_cuda
    try:
        run = provider.prepare(case, mode)
        errors[provider.name] = truth.errors(run(), provider.objective)
        memory[provider.name] = peak_memory(run, case.hidden.device)
        runs[provider.name] = run
    except Exception as error:  # a peer's own code: whatever it raises is its result
        errors.pop(provider.name, None)
        if cuda:
            _check_device(provider.name, error)
        return _sentence(error)
    return None


def _check_device(name: str, error: Exception) -> None:
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except RuntimeError as lost:
        raise DeviceLost(f"{name} left the GPU unusable ({_sentence(error)}); run again with --without {name}") from lost


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def _row(provider: Provider, case: Case, mode: str, truth: Truth) -> dict[str, Any]:
    return {
        "provider": provider.name,
        "mode": mode,
        "job": provider.job,
        "objective": provider.objective,
        "settings": provider.settings,
        "shape": case.shape(),
        "inputs": case.inputs_name,
        "mean_entropy_nats": float(truth.entropy[truth.valid].mean()),
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
