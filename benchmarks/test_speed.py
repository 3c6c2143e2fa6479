"""The pytest-benchmark suite (``make bench``): every provider and mode on one shape; accuracy and memory in ``extra_info``."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from eapo_kernels.testing import peak_memory

from .case import Case, Truth, make_case
from .measure import relative_errors
from .providers import MODES, Provider, load_providers


@pytest.fixture(scope="module")
def case() -> tuple[Case, Truth]:
    return make_case(512, 256, 16384, torch.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", load_providers(), ids=lambda p: p.name)
def test_speed(benchmark: BenchmarkFixture, case: tuple[Case, Truth], provider: Provider, mode: str) -> None:
    if mode not in provider.modes:
        pytest.skip(f"{provider.name} has no {mode}")
    benchmark.group = mode
    run = provider.prepare(case[0], mode)
    errors = relative_errors(run(), case[1])
    assert all(error < 1e-4 for error in errors.values())
    benchmark.extra_info.update(errors=errors, peak_bytes=peak_memory(run), flops=case[0].flops, shape=case[0].shape())
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
