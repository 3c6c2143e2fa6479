"""The pytest-benchmark suite (``make bench``): every provider and mode on one shape; accuracy and
memory in ``extra_info``.

On a GPU the shape is a real one; on a CPU it is small, and only the ratios between the lines of a
group mean something.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from eapo_kernels.testing import peak_memory

from .case import MODES, Case, Reference, Results, make_case, reference_of
from .measure import gate
from .providers import Provider, load_providers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (4096, 2048, 151936) if DEVICE == "cuda" else (512, 256, 16384)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[Case, Reference]]:
    case = make_case(*SHAPE, DTYPE, device=DEVICE)
    half, dense = case.for_mode("half_zero_rows"), reference_of(case)
    return {mode: (half, reference_of(half)) if mode == "half_zero_rows" else (case, dense) for mode in MODES}


@pytest.mark.parametrize(
    ("provider", "mode"), [pytest.param(p, m, id=f"{p.name}-{m}") for p in load_providers() for m in MODES if m in p.modes]
)
def test_speed(
    benchmark: BenchmarkFixture,
    cases: dict[str, tuple[Case, Reference]],
    provider: Provider,
    mode: str,
) -> None:
    reason = provider.unavailable(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    case, reference = cases[mode]
    benchmark.group = f"{mode} {DEVICE} " + " ".join(f"{key}={value}" for key, value in case.shape().items())
    run = _synchronised(provider.prepare(case, mode))
    errors = reference.errors(run(), provider.objective)
    assert gate({provider.name: errors}, DTYPE)["green"], errors
    benchmark.extra_info.update(
        job=provider.job,
        errors=errors,
        peak_bytes=peak_memory(run, DEVICE),
        flops=case.useful_flops(mode),
        bytes=case.least_bytes(mode),
        shape=case.shape(),
        mean_entropy_nats=float(reference.entropy.mean()),
    )
    benchmark.pedantic(run, rounds=2 if _seconds(run) > 1 else 5, warmup_rounds=1)


def _synchronised(run: Callable[[], Results]) -> Callable[[], Results]:
    if DEVICE == "cpu":
        return run

    def wait() -> Results:
        results = run()
        torch.cuda.synchronize()
        return results

    return wait


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
