"""The loss at its edges: empty batches, NaN in masked rows, distant policies, half precision, which inputs get a gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from loss_cases import CONFIGS, B, D, N, V, make_batch, run
from torch import Tensor

from eapo_kernels import (
    EAPOConfig,
    EapoError,
    Options,
    eapo_loss,
)
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.testing import make_inputs


@pytest.mark.parametrize("schedule", ["autograd", "one_pass"])
def test_fully_masked_and_empty_batches(schedule: str) -> None:
    inputs = make_inputs(20, D, V)
    batch = make_batch(inputs)
    for changed, hidden in (
        (replace(batch, mask=torch.zeros(20, dtype=torch.bool)), inputs.hidden),
        (replace(batch, targets=torch.full((20,), -100)), inputs.hidden),
        (
            replace(batch, **{k: v[:0] for k, v in vars(batch).items() if isinstance(v, Tensor) and len(v) == 20}),
            inputs.hidden[:0],
        ),
    ):
        out, (d_hidden, d_weight) = run(replace(inputs, hidden=hidden), changed, positive_weight=0.7, schedule=schedule)
        assert out.loss == 0
        assert (d_hidden == 0).all()
        assert d_hidden.shape == hidden.shape
        assert (d_weight == 0).all()
        assert all(v.isfinite() for v in out.metrics.values())


def test_masked_tokens_may_hold_anything() -> None:
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    clean, clean_grads = run(inputs, batch, positive_weight=0.7, config=CONFIGS["importance"])
    dirty = {k: torch.where(batch.mask, getattr(batch, k), math.nan) for k in ("old_logp", "ref_logp", "rollout_logp")}
    hidden = torch.where(batch.mask[:, None], inputs.hidden, math.nan)
    for schedule in ("autograd", "one_pass"):
        out, grads = run(
            replace(inputs, hidden=hidden),
            replace(batch, **dirty),
            positive_weight=0.7,
            config=CONFIGS["importance"],
            schedule=schedule,
        )
        torch.testing.assert_close(out.loss, clean.loss)
        torch.testing.assert_close(grads[0], clean_grads[0])


@pytest.mark.parametrize("schedule", ["autograd", "one_pass"])
def test_without_compaction_masked_rows_may_hold_anything_too(schedule: str) -> None:
    """What a CUDA graph under capture does."""
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    _, clean = run(inputs, batch, positive_weight=0.7, schedule=schedule)
    hidden = torch.where(batch.mask[:, None], inputs.hidden, math.nan)
    ids = torch.where(batch.mask, batch.sequence_ids, -1)
    out, grads = run(
        replace(inputs, hidden=hidden), replace(batch, sequence_ids=ids), positive_weight=0.7, schedule=schedule,
        options=Options(compact=False), inv_temperature=torch.where(batch.mask, 1.0, 0.0),
    )  # fmt: skip
    assert out.loss.isfinite()
    for got, expected in zip(grads, clean, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_far_off_policy_stays_finite() -> None:
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs, off_policy=200.0)
    for schedule in ("autograd", "one_pass"):
        out, grads = run(inputs, batch, positive_weight=1.0, config=EAPOConfig(dual_clip=3.0), schedule=schedule)
        assert out.loss.isfinite()
        assert all(g.isfinite().all() for g in grads)


def test_groups_of_one_and_groups_without_spread_have_no_gradient() -> None:
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    for rewards, groups in ((batch.rewards, torch.arange(B)), (torch.full((B,), 0.1), batch.group_ids)):
        for advantage in ("group_norm", "group_mean", "sign"):
            lonely = replace(batch, rewards=rewards, group_ids=groups)
            out, grads = run(inputs, lonely, positive_weight=0.7, config=EAPOConfig(advantage=advantage))
            assert out.loss == 0
            assert all((g == 0).all() for g in grads)
            assert out.metrics["eapo/positive_fraction"] == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_rewards_beyond_the_integers_of_fp32_keep_their_order(name: str) -> None:
    """1e9 + i in fp64 is i: fp32 would make one number of them, and every advantage zero."""
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    near = torch.tensor([0.0, 1, 2, 3, 5, 5, 5, 5, 4, 1, 1, 2], dtype=torch.float64)
    for schedule in ("autograd", "one_pass") if CONFIGS[name].scope == "token" else ("autograd",):
        given = {"positive_weight": 0.7, "config": CONFIGS[name], "schedule": schedule}
        found, grads = run(inputs, replace(batch, rewards=near + 1e9), **given)
        expected, right = run(inputs, replace(batch, rewards=near.float()), **given)
        assert found.metrics["eapo/positive_fraction"] == expected.metrics["eapo/positive_fraction"] > 0
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(grads, right, rtol=1e-4, atol=1e-7)


def test_one_pass_backward_scales_and_runs_once() -> None:
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    hidden, weight = inputs.leaves()
    _, plain = run(inputs, batch, positive_weight=0.7)
    out = eapo_loss(hidden, weight, batch, positive_weight=0.7, schedule="one_pass")
    (out.loss * 3).backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 3 * plain[1])
    with pytest.raises(EapoError, match="expected one call per one_pass loss"):
        out.loss.backward()


def test_no_grad_computes_no_gradient() -> None:
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    hidden, weight = inputs.leaves()
    with torch.no_grad():
        out = eapo_loss(hidden, weight, batch, positive_weight=0.7, schedule="one_pass")
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, run(inputs, batch, positive_weight=0.7)[0].loss)


def test_frozen_head_gets_none() -> None:
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    for schedule in ("autograd", "one_pass"):
        hidden = inputs.hidden.detach().requires_grad_()
        eapo_loss(hidden, inputs.weight.detach(), batch, positive_weight=0.7, schedule=schedule).loss.backward()
        torch.testing.assert_close(hidden.grad, run(inputs, batch, positive_weight=0.7)[1][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peaked", [True, False], ids=["peaked", "uniform"])
@pytest.mark.parametrize("schedule", ["autograd", "one_pass"])
def test_half_precision_operands_as_on_a_gpu(
    schedule: str, peaked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products take half precision as on CUDA, at a vocabulary larger than the largest number of fp16."""
    n, v = 64, 70_000
    inputs = make_inputs(n, D, v, dtype=dtype, peaked=peaked)
    batch = make_batch(inputs, masked=False)
    _, exact_grads = run(inputs.to(torch.float64), batch, positive_weight=0.7, schedule="autograd")
    monkeypatch.setattr(Projection, "operand_dtype", property(lambda self: self.hidden.dtype))
    _, grads = run(inputs, batch, positive_weight=0.7, schedule=schedule)
    limit = {torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    for got, exact in zip(grads, exact_grads, strict=True):
        if dtype == torch.float16:  # the results themselves are fp16: leave out what it cannot hold
            exact = torch.where(exact.abs() < 6e-5, got.double(), exact)
        assert (got.double() - exact).norm() <= limit * exact.norm()


def test_second_derivatives_are_refused() -> None:
    inputs = make_inputs(N, D, V)
    hidden, weight = inputs.leaves()
    scale = torch.ones((), requires_grad=True)
    out = eapo_loss(hidden, weight, make_batch(inputs), positive_weight=0.7, schedule="one_pass")
    (gradient,) = torch.autograd.grad(scale * out.loss, [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
