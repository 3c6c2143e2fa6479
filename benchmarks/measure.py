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

BOUNDS = {"logp": 5e-5, "entropy": 5e-5, "loss": 1e-3}
"""Largest relative error of ours, whatever the dtype: statistics come from fp32 sums. A loss is a difference of large parts."""

GRADIENT_BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""The same for gradients: a few roundings of the gradient matrix and of the result to the dtype. Not a multiple of unfused
PyTorch's error, which in bf16 is 5 to 10 % on peaked logits."""

BASES = ("bare_gemms", "unfused_eager")

Errors = dict[str, float]


class DeviceLost(RuntimeError):
    """A provider left the GPU unusable for this process."""


def label(case: Case, mode: str) -> str:
    """The name of a case and mode, for people and as a key."""
    shape = " ".join(f"{key}={value}" for key, value in case.shape().items())
    return f"{mode} {case.inputs_name} {shape}"


def gate(errors: dict[str, Errors], dtype: torch.dtype) -> dict[str, Any]:
    """Green when each error of each provider of ours is within its bound, and each was held against the truth at all."""
    red = []
    for provider, ours in errors.items():
        if provider.startswith("eapo"):
            red += [] if ours else [f"{provider}: nothing was compared"]
            bounds = {name: BOUNDS.get(name, GRADIENT_BOUND[dtype]) for name in ours}
            red += [f"{provider}: {n} error {v:.2e}, allowed {bounds[n]:.0e}" for n, v in ours.items() if not v <= bounds[n]]
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
    torch.compiler.reset()  # compiled providers start anew: past a few shapes they would silently fall back to eager
    able = [p for p in providers if mode in p.modes]
    runs: dict[str, Callable[[], Results]] = {}
    errors: dict[str, Errors] = {}
    memory: dict[str, int] = {}
    reasons: dict[str, str] = {}
    broken: list[str] = []
    for provider in able:
        reason = provider.unavailable(device)
        if reason is None:
            reason = _try(provider, case, truth, mode, runs, errors, memory)
            if reason is not None and provider.name.startswith("eapo"):
                broken.append(f"{provider.name}: {reason}")
        if reason is not None:
            reasons[provider.name] = reason
    verdict = gate(errors, case.dtype)
    verdict["red"] += broken
    verdict["green"] = not verdict["red"]
    guarded = {name: _guarded(name, run, reasons) for name, run in runs.items()}
    times = time_interleaved(guarded, rounds, clock, seconds=seconds) if verdict["green"] else {}
    times = {name: ms for name, ms in times.items() if name not in reasons}
    state = telemetry(device)
    rows = [
        _row(provider, case, mode, truth)
        | {"errors": errors.get(provider.name, {}), "peak_bytes": memory.get(provider.name)}
        | _timing(provider.name, times, case.useful_flops(mode))
        | {"clocks": state, "error": reasons.get(provider.name) or (None if verdict["green"] else "not timed: the gate is red")}
        for provider in able
    ]
    return verdict, rows


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


def _guarded(name: str, run: Callable[[], Results], reasons: dict[str, str]) -> Callable[[], Results]:
    """``run``, which after a failure does nothing any more but leave its reason: the others go on."""

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
