"""``metrics=False``: the same loss and gradients, with less work."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import CONFIGS, B, D, N, V, make_batch, run, small_options
from torch import Tensor

from eapo_kernels import EAPOConfig, TokenBatch
from eapo_kernels.integrations.cross_entropy import linear_cross_entropy
from eapo_kernels.ops import torch_backend
from eapo_kernels.testing import Inputs, make_inputs

KEPT = {"eapo/positive_weight", "eapo/positive_fraction", "tokens"}
PULLED = {"entropy_bonus", "kl_k1", "kl_k2", "kl_k3", "gspo"}
"""Configurations in which a token of advantage zero has a term, or a say in another token's."""
ADVANTAGES = torch.randn(B, generator=torch.Generator().manual_seed(0))


def half_idle(inputs: Inputs) -> TokenBatch:
    """Every other response has advantage zero."""
    return replace(
        make_batch(inputs), advantages=torch.randn(B, generator=torch.Generator().manual_seed(0)) * (torch.arange(B) % 2)
    )


def idle_tokens(batch: TokenBatch) -> Tensor:
    return batch.sequence_ids % 2 == 0


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("schedule", ["autograd", "one_pass"])
def test_the_loss_is_the_same(schedule: str, name: str) -> None:
    config = CONFIGS[name]
    if config.scope == "sequence" and schedule == "one_pass":
        schedule = "auto"
    inputs = make_inputs(N, D, V, dtype=torch.float64, bias=True)
    batch = half_idle(inputs)
    common = {"positive_weight": 0.7, "config": config, "schedule": schedule, "options": small_options()}
    full, gradients = run(inputs, batch, **common)
    plain, bare_gradients = run(inputs, batch, **common, metrics=False)
    torch.testing.assert_close(plain.loss, full.loss, rtol=1e-6, atol=1e-8)
    for got, expected in zip(bare_gradients, gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-10)
    assert plain.metrics.keys() == KEPT
    assert all(torch.equal(value, full.metrics[key]) for key, value in plain.metrics.items())


@pytest.mark.parametrize("schedule", ["autograd", "one_pass"])
def test_without_idle_tokens_it_is_the_same_bit_for_bit(schedule: str) -> None:
    inputs = make_inputs(N, D, V)
    batch = replace(make_batch(inputs), advantages=ADVANTAGES)
    full, gradients = run(inputs, batch, positive_weight=0.7, schedule=schedule)
    plain, bare_gradients = run(inputs, batch, positive_weight=0.7, schedule=schedule, metrics=False)
    for got, expected in zip((plain.loss, *bare_gradients), (full.loss, *gradients), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("schedule", ["autograd", "one_pass"])
def test_idle_tokens_do_no_work(schedule: str, name: str) -> None:
    """NaN in their hidden states does not propagate, unless another term of the loss uses these tokens."""
    config = CONFIGS[name]
    if config.scope == "sequence" and schedule == "one_pass":
        schedule = "auto"
    inputs = make_inputs(N, D, V)
    batch = half_idle(inputs)
    poisoned = replace(inputs, hidden=torch.where(idle_tokens(batch)[:, None], math.nan, inputs.hidden))
    common = {"positive_weight": 0.7, "config": config, "schedule": schedule}
    plain, gradients = run(poisoned, batch, **common, metrics=False)
    assert bool(plain.loss.isfinite()) == (name not in PULLED)
    if name not in PULLED:
        expected, expected_gradients = run(inputs, batch, **common)
        torch.testing.assert_close(plain.loss, expected.loss)
        for got, plain in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-7)


def test_a_callers_own_surrogate_keeps_its_tokens() -> None:
    """Its value at an advantage of zero is unknown."""

    def exploring(logp: Tensor, log_ratio: Tensor, advantages: Tensor, clip: object) -> tuple[Tensor, Tensor]:
        return log_ratio.exp() * (advantages + 1), torch.zeros_like(logp, dtype=torch.bool)

    inputs = make_inputs(N, D, V)
    common = {"positive_weight": 0.7, "config": EAPOConfig(surrogate=exploring)}
    full, _ = run(inputs, half_idle(inputs), **common)
    plain, _ = run(inputs, half_idle(inputs), **common, metrics=False)
    assert torch.equal(plain.loss, full.loss)


@pytest.mark.parametrize("schedule", ["autograd", "one_pass"])
def test_a_step_without_any_advantage(schedule: str) -> None:
    inputs = make_inputs(N, D, V)
    batch = replace(make_batch(inputs), advantages=torch.zeros(B))
    out, gradients = run(inputs, batch, positive_weight=0.7, schedule=schedule, metrics=False)
    assert out.loss == 0
    assert all((g == 0).all() for g in gradients)
    assert out.metrics["tokens"] == batch.mask.sum()


@pytest.mark.parametrize("schedule", ["one_pass", "autograd"])
def test_cross_entropy_computes_no_entropies(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, plain = [], torch_backend._range_sums

    def spied(*args: Any, entropy: bool, **rest: Any) -> list[Tensor]:
        wanted.append(entropy)
        return plain(*args, entropy=entropy, **rest)

    monkeypatch.setattr(torch_backend, "_range_sums", spied)
    inputs = make_inputs(N, D, V)
    linear_cross_entropy(*inputs.leaves(), inputs.targets, schedule=schedule, backend="torch").backward()
    assert wanted
    assert not any(wanted)
