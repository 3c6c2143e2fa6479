"""Losses over a support: against plain autograd through a dense matrix of masked logits, in both schedules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import CONFIGS, D, N, V, make_batch, run
from torch import Tensor

from eapo_kernels import (
    EAPOConfig,
    EapoError,
    Options,
    TokenBatch,
    TokenSupport,
    eapo_loss,
    policy_loss,
    reference,
    token_stats,
)
from eapo_kernels.objectives.policy import loss_and_sums, prepare
from eapo_kernels.testing import Inputs, make_inputs

WEIGHT = 0.7


def case(dtype: torch.dtype = torch.float32, *, masked: bool = True) -> tuple[Inputs, TokenBatch, Tensor]:
    """Inputs, a batch with a support of 1 to 40 ids a token and old log-probs over it, and the support as [N, V] bool."""
    inputs = make_inputs(N, D, V, dtype=dtype)
    draw = torch.Generator().manual_seed(5)
    kept = torch.rand(N, V, generator=draw) < 0.13 * torch.rand(N, 1, generator=draw)
    kept[torch.arange(N), inputs.targets] = True
    lists = [row.nonzero().squeeze(1) for row in kept]
    batch = make_batch(inputs, masked=masked)
    assert batch.mask is not None or not masked
    if batch.mask is not None:  # what does not count needs no ids
        lists = [ids if count else ids[:0] for ids, count in zip(lists, batch.mask.tolist(), strict=True)]
    wide = inputs.to(torch.float64)
    own = reference.token_stats(wide.hidden, wide.weight, wide.targets, allowed=kept).logp.float()
    noise = torch.randn(3, N, generator=draw)
    logs = {n: own + 0.2 * e for n, e in zip(("old_logp", "ref_logp", "rollout_logp"), noise, strict=True)}
    return inputs, replace(batch, support=TokenSupport.from_lists(lists), **logs), kept


def by_hand(inputs: Inputs, batch: TokenBatch, kept: Tensor, config: EAPOConfig) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients in float64."""
    wide = inputs.to(torch.float64)
    leaves = [t.detach().requires_grad_() for t in (wide.hidden, wide.weight)]
    s = reference.token_stats(leaves[0], leaves[1], inputs.targets, mask=batch.mask, allowed=kept)
    terms = prepare(batch, config, torch.tensor(WEIGHT))
    loss, _ = loss_and_sums(terms, s.logp, s.entropy)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(
    ("name", "schedule"),
    [(n, "autograd") for n in CONFIGS] + [(n, "one_pass") for n, config in CONFIGS.items() if config.scope == "token"],
)
def test_every_loss(name: str, schedule: str) -> None:
    config = CONFIGS[name]
    inputs, batch, kept = case()
    out, gradients = run(inputs, batch, positive_weight=WEIGHT, config=config, schedule=schedule)
    expected, exact = by_hand(inputs, batch, kept, config)
    torch.testing.assert_close(out.loss.double(), expected.double(), rtol=1e-5, atol=1e-7)
    for found, right in zip(gradients, exact, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=2e-5 * float(right.abs().max()))


@pytest.mark.parametrize("options", [Options(plan="chunks"), Options(memory_budget=20_000), Options(compact=False)], ids=str)
def test_chunks_of_rows(options: Options) -> None:
    inputs, batch, kept = case()
    out, gradients = run(inputs, batch, positive_weight=WEIGHT, schedule="one_pass", options=options)
    expected, exact = by_hand(inputs, batch, kept, EAPOConfig())
    torch.testing.assert_close(out.loss.double(), expected.double(), rtol=1e-5, atol=1e-7)
    for found, right in zip(gradients, exact, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=2e-5 * float(right.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    inputs, batch, kept = case(dtype)
    for schedule in ("autograd", "one_pass"):
        out, gradients = run(inputs, batch, positive_weight=WEIGHT, schedule=schedule)
        expected, exact = by_hand(inputs, batch, kept, EAPOConfig())
        torch.testing.assert_close(out.loss.double(), expected.double(), rtol=1e-5, atol=1e-6)
        for found, right in zip(gradients, exact, strict=True):
            assert found.dtype == dtype
            near = 1e-10 if dtype == torch.float64 else 5e-3
            assert (found.double() - right).norm() <= max(near, 1e-6) * right.norm()


def test_all_ids_are_no_support() -> None:
    """The loss, its metrics and gradients, with old log-probs that clip some tokens."""
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    everything = TokenSupport.from_padded(torch.arange(V).expand(N, V))
    for schedule in ("autograd", "one_pass"):
        a, ours = run(inputs, replace(batch, support=everything), positive_weight=WEIGHT, schedule=schedule)
        b, plain = run(inputs, batch, positive_weight=WEIGHT, schedule=schedule)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-7)
        assert a.metrics.keys() == b.metrics.keys()
        for name, value in a.metrics.items():
            torch.testing.assert_close(value, b.metrics[name], rtol=1e-5, atol=1e-6, msg=name)
        for x, y in zip(ours, plain, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5 * float(y.abs().max()))


def test_main_grad_receives_the_gradient_of_the_weight() -> None:
    inputs, batch, _ = case(torch.bfloat16)
    _, (_, d_weight) = run(inputs, batch, positive_weight=WEIGHT)
    main = torch.ones(V, D)
    leaves = inputs.leaves()
    out = eapo_loss(*leaves, batch, positive_weight=WEIGHT, main_grad=main, main_grad_scale=0.5)
    out.loss.backward()
    assert leaves[1].grad is None
    torch.testing.assert_close((main - 1) * 2, d_weight.float(), rtol=1e-2, atol=1e-4)


def test_entropy_of_the_vocabulary_is_a_bonus_and_a_metric() -> None:
    inputs, batch, kept = case(masked=False)
    assert batch.support is not None
    wide_support = TokenSupport(batch.support.ids, batch.support.offsets, full_entropy=True)
    config = EAPOConfig(entropy_coef=0.05)
    out, gradients = run(inputs, replace(batch, support=wide_support), positive_weight=WEIGHT, config=config)
    wide = inputs.to(torch.float64)
    leaves = [t.detach().requires_grad_() for t in (wide.hidden, wide.weight)]
    logp = reference.token_stats(leaves[0], leaves[1], inputs.targets, allowed=kept).logp
    entropy = reference.token_stats(leaves[0], leaves[1], inputs.targets).entropy
    loss, _ = loss_and_sums(prepare(batch, config, torch.tensor(WEIGHT)), logp, entropy)
    torch.testing.assert_close(out.loss.double(), loss.double(), rtol=1e-5, atol=1e-7)
    assert entropy is not None
    assert float(out.metrics["eapo/entropy"]) == pytest.approx(float(entropy.detach().mean()), rel=1e-5)
    for found, right in zip(gradients, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=2e-5 * float(right.abs().max()))
    with pytest.raises(EapoError, match="schedule: expected 'autograd' for a support with full_entropy, got 'one_pass'"):
        run(inputs, replace(batch, support=wide_support), positive_weight=WEIGHT, schedule="one_pass")


def test_micro_batches_add_up() -> None:
    inputs, batch, _ = case(masked=False)
    whole, expected = run(inputs, batch, positive_weight=WEIGHT)
    batch = replace(batch, denominator=N)
    total: list[Any] = [0.0, 0.0]
    loss = 0.0
    for part in (slice(0, 50), slice(50, N)):
        some = Inputs(inputs.hidden[part], inputs.weight, inputs.targets[part])
        out, (d_hidden, d_weight) = run(some, batch.select(part), positive_weight=WEIGHT)
        loss += float(out.loss.detach())
        total = [torch.cat([total[0], d_hidden]) if part.start else d_hidden, total[1] + d_weight]
    assert loss == pytest.approx(float(whole.loss.detach()), rel=1e-5)
    for found, right in zip(total, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["grpo", "gspo", "cispo", "dapo"])
def test_an_unchanged_policy_has_a_ratio_of_one(method: str) -> None:
    """Log-probs of the sampled support: without it every ratio is about the mass that was kept."""
    inputs, batch, _ = case(masked=False)
    old = token_stats(inputs.hidden, inputs.weight, inputs.targets, support=batch.support).logp
    batch = replace(batch, old_logp=old)
    own = policy_loss(inputs.hidden, inputs.weight, batch, method=method).metrics["ratio_mean"]
    biased = policy_loss(inputs.hidden, inputs.weight, replace(batch, support=None), method=method).metrics["ratio_mean"]
    assert abs(float(own) - 1) < 1e-5
    assert float(biased) < 0.9


def test_what_does_not_fit_is_refused() -> None:
    inputs, batch, _ = case(masked=False)
    assert batch.support is not None
    with pytest.raises(EapoError, match=r"batch.support: expected 150 positions on cpu, got 149 positions on cpu"):
        run(inputs, replace(batch, support=batch.support.select(slice(1, N))), positive_weight=WEIGHT)
    with pytest.raises(EapoError, match=r"batch.support: expected None with entropy_top_p"):
        run(inputs, batch, positive_weight=WEIGHT, config=EAPOConfig(entropy_coef=0.1, entropy_top_p=0.9))
    other = replace(batch, targets=(batch.targets + 1) % V)
    for schedule in ("autograd", "one_pass"):
        with pytest.raises(EapoError, match=r"support.ids: expected the target \d+ among the ids of row 0"):
            run(replace(inputs, targets=other.targets), other, positive_weight=WEIGHT, schedule=schedule)
