"""The EAPO loss: against the dense oracle, against equations typed again, and the two schedules against each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import CONFIGS, B, D, N, V, make_batch, run, small_options
from torch import Tensor

from eapo_kernels import (
    METHODS,
    EAPOConfig,
    EapoError,
    EAPOLoss,
    EntropyRatio,
    Method,
    Options,
    TokenBatch,
    eapo_loss,
    reference,
)
from eapo_kernels.testing import assert_no_worse_than, make_inputs


def test_default_is_the_oracle() -> None:
    inputs = make_inputs(N, D, V, dtype=torch.float64)
    batch = make_batch(inputs)
    leaves = [inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()]
    m = batch.mask
    logp = reference.token_stats(*leaves, inputs.targets).logp
    expected = reference.eapo_loss(
        logp[m],
        batch.old_logp[m].double(),
        batch.sequence_ids[m],
        batch.rewards.double(),
        batch.group_ids,
        positive_weight=0.7,
    )
    expected_grads = torch.autograd.grad(expected, leaves)
    for schedule in ("autograd", "one_pass"):
        out, grads = run(inputs, batch, positive_weight=0.7, schedule=schedule, options=small_options())
        torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-7)
        for got, exact in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(got, exact, rtol=2e-5, atol=2e-8)


def typed_again(c: EAPOConfig, logp: Tensor, entropy: Tensor, b: TokenBatch, w: float) -> Tensor:
    """The loss in a few plain lines per switch, float64, for advantages per response; cites what the switch cites."""
    r, ids, m = b.rewards.double(), b.sequence_ids, b.mask
    same = (b.group_ids[:, None] == b.group_ids[None, :]).double()
    mean = (same @ r) / same.sum(1)
    d = torch.where((r - mean).abs() < 1e-6, 0.0, r - mean)
    std = torch.stack([r[b.group_ids == g].std() for g in b.group_ids])
    bd = r - r.mean()
    advantage = {
        "group_norm": d / (std + 1e-6),  # arXiv 2402.03300
        "group_mean": d,  # arXiv 2503.20783
        "sign": d.sign(),
        "batch_norm": bd / (r.std() + 1e-6),
    }[c.advantage]
    positive = {"group": d > 0, "batch": bd > 0, "advantage": advantage > 0}[c.split]
    A = (torch.where(positive, w, c.negative_weight) * advantage)[ids]
    if c.drop_zero_weight:
        m = m & (torch.where(positive, w, c.negative_weight) != 0)[ids]
    log_ratio = logp - b.old_logp.double()
    length = torch.stack([m[ids == i].sum() for i in range(B)]).double().clamp_min(1)
    if c.surrogate == "gspo":  # arXiv 2507.18071: geometric mean over the response
        log_ratio = torch.stack([(log_ratio * (ids == i) * m).sum() for i in range(B)])[ids] / length[ids]
    rho = log_ratio.exp()
    bounded = rho.clamp(1 - c.clip_low, 1 + c.clip_high)
    if c.surrogate in ("ppo_clip", "gspo"):  # arXiv 1707.06347
        gain = torch.minimum(rho * A, bounded * A)
        if c.dual_clip:  # arXiv 1912.09729
            gain = torch.where(A < 0, torch.maximum(gain, c.dual_clip * A), gain)
    elif c.surrogate == "cispo":  # arXiv 2506.13585
        gain = bounded.detach() * A * logp
    else:
        gain = A * logp
    if c.importance_cap:
        gain = gain * (b.old_logp - b.rollout_logp).double().exp().clamp_max(c.importance_cap)
    gap = logp - b.ref_logp.double()
    kl = {"k1": gap, "k2": gap**2 / 2, "k3": (-gap).exp() - 1 + gap}[c.kl_estimator]
    term = -gain + c.kl_coef * kl - c.entropy_coef * entropy
    sequences = (torch.stack([m[ids == i].any() for i in range(B)])).sum()
    scale = {
        "token_mean": 1 / m.sum(),
        "seq_mean_token_mean": 1 / (length[ids] * sequences),
        "seq_mean_token_sum": 1 / sequences,
        "fixed_length": 1 / (sequences * (c.fixed_length or 1)),
    }[c.reduction]
    return (term * scale * m).sum()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_switch_against_its_equation(name: str) -> None:
    config = CONFIGS[name]
    inputs = make_inputs(N, D, V, dtype=torch.float64, bias=True)
    batch = make_batch(inputs)
    leaves = [t.clone().requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias)]
    stats = reference.token_stats(leaves[0], leaves[1], inputs.targets, bias=leaves[2])
    expected = typed_again(config, stats.logp, stats.entropy, batch, 0.7)
    expected_grads = torch.autograd.grad(expected, leaves)
    schedules = ("autograd",) if config.scope == "sequence" else ("autograd", "one_pass")
    for schedule in schedules:
        out, grads = run(inputs, batch, positive_weight=0.7, config=config, schedule=schedule, options=small_options())
        torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-7)
        for got, exact in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(got, exact, rtol=2e-5, atol=2e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transform", [{}, {"softcap": 4.0}, {"inv_temperature": 0.7, "logit_scale": 1.3}], ids=str)
@pytest.mark.parametrize("name", ["default", "entropy_bonus"])
def test_schedules_agree(name: str, transform: dict[str, float], dtype: torch.dtype, device: str, poisoned: None) -> None:
    inputs = make_inputs(N, D, V, dtype=dtype, device=device)
    batch = make_batch(inputs)
    common: dict[str, Any] = {"positive_weight": 0.7, "config": CONFIGS[name], "options": small_options(), **transform}
    exact_inputs = inputs.to(torch.float64)
    _, exact_grads = run(exact_inputs, batch, schedule="autograd", **common)
    autograd, plain = run(inputs, batch, schedule="autograd", **common)
    one_pass, grads = run(inputs, batch, schedule="one_pass", **common)
    torch.testing.assert_close(one_pass.loss, autograd.loss, rtol=1e-5, atol=1e-6)
    for key, value in autograd.metrics.items():
        torch.testing.assert_close(one_pass.metrics[key], value, rtol=1e-5, atol=1e-6)
    floor = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for got, other, exact in zip(grads, plain, exact_grads, strict=True):
        assert got.dtype == dtype
        assert_no_worse_than(got, other, exact, floor=floor)


@pytest.mark.parametrize("name", ["default", "gspo", "group_mean", "sign_fixed", "kl_k3"])
def test_micro_batches_add_up_to_the_batch(name: str) -> None:
    """Responses spread over micro-batches, one global denominator: losses and gradients add up exactly (to rounding)."""
    config = CONFIGS[name]
    inputs = make_inputs(N, D, V, dtype=torch.float64)
    batch = make_batch(inputs)
    full, grads = run(inputs, batch, positive_weight=0.7, config=config)
    tokens = batch.mask.sum()
    sequences = torch.tensor(sum(bool(batch.mask[batch.sequence_ids == i].any()) for i in range(B)))
    denominator = tokens if config.reduction == "token_mean" else sequences
    total, parts = 0.0, [torch.zeros_like(g) for g in grads]
    for half in (batch.sequence_ids < 5, batch.sequence_ids >= 5):
        part = {k: v[half] for k, v in vars(batch).items() if isinstance(v, Tensor) and v.shape == (N,)}
        micro = replace(batch, **part, denominator=denominator)
        out, (d_hidden, d_weight) = run(replace(inputs, hidden=inputs.hidden[half]), micro, positive_weight=0.7, config=config)
        total = total + out.loss
        parts[0][half] += d_hidden
        parts[1] += d_weight
    torch.testing.assert_close(total, full.loss, rtol=1e-6, atol=1e-8)
    for got, exact in zip(parts, grads, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-9)


def test_a_response_split_over_micro_batches_needs_its_length() -> None:
    config = EAPOConfig(reduction="seq_mean_token_mean")
    inputs = make_inputs(N, D, V, dtype=torch.float64)
    batch = make_batch(inputs, masked=False)
    full, _ = run(inputs, batch, positive_weight=0.7, config=config)
    lengths = torch.bincount(batch.sequence_ids, minlength=B)
    total = 0.0
    for half in (slice(0, 71), slice(71, N)):
        part = {k: v[half] for k, v in vars(batch).items() if isinstance(v, Tensor) and v.shape == (N,)}
        micro = replace(batch, **part, denominator=float((lengths > 0).sum()), sequence_lengths=lengths)
        out, _ = run(replace(inputs, hidden=inputs.hidden[half]), micro, positive_weight=0.7, config=config)
        total = total + out.loss
    torch.testing.assert_close(total, full.loss, rtol=1e-6, atol=1e-8)


def test_the_weight_is_applied_once() -> None:
    """The part of the positives is linear in the weight: twice the weight is twice their loss, not four times."""
    inputs = make_inputs(N, D, V, dtype=torch.float64)
    batch = make_batch(inputs)
    losses = [run(inputs, batch, positive_weight=w)[0].loss for w in (0.0, 1.0, 2.0)]
    assert abs(losses[1] - losses[0]) > 1e-3
    torch.testing.assert_close(losses[2] - losses[0], 2 * (losses[1] - losses[0]), rtol=1e-6, atol=1e-9)
    for schedule in ("autograd", "one_pass"):
        grads = [run(inputs, batch, positive_weight=w, schedule=schedule)[1][1] for w in (0.0, 1.0, 2.0)]
        torch.testing.assert_close(grads[2] - grads[0], 2 * (grads[1] - grads[0]), rtol=1e-6, atol=1e-9)


def test_weight_one_is_plain_policy_gradient() -> None:
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    eapo, eapo_grads = run(inputs, batch, positive_weight=1.0, config=EAPOConfig(reduction="seq_mean_token_mean"))
    grpo, grpo_grads = run(inputs, batch, method="grpo")
    assert torch.equal(eapo.loss, grpo.loss)
    assert all(torch.equal(a, b) for a, b in zip(eapo_grads, grpo_grads, strict=True))


def test_weighting_advantages_by_hand_is_the_same() -> None:
    """A' = where(positive, w A, A) before any loss (as the adapters do); per response and per token."""
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    expected, _ = run(inputs, batch, positive_weight=0.4)
    from eapo_kernels.objectives.advantages import group_norm

    advantages = group_norm(batch.rewards, batch.group_ids)
    weighted = torch.where(advantages > 0, 0.4 * advantages, advantages)
    per_token = replace(batch, rewards=None, group_ids=None, advantages=weighted[batch.sequence_ids])
    for by_hand in (replace(batch, advantages=weighted), per_token):
        out, _ = run(inputs, by_hand, positive_weight=1.0)
        torch.testing.assert_close(out.loss, expected.loss)


def test_without_old_logp_the_ratio_is_one_with_gradient() -> None:
    inputs = make_inputs(N, D, V, dtype=torch.float64)
    batch = replace(make_batch(inputs), old_logp=None)
    out, grads = run(inputs, batch, positive_weight=0.7)
    _, expected = run(inputs, batch, positive_weight=0.7, config=EAPOConfig(surrogate="reinforce"))
    assert out.metrics["ratio_mean"] == 1
    assert out.metrics["clip_fraction"] == 0
    for got, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-10)


def test_metrics() -> None:
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    controller = EntropyRatio()
    controller.update(200.0, 100)
    controller.update(150.0, 100)
    out, _ = run(inputs, batch, positive_weight=controller)
    m = batch.mask
    stats = reference.token_stats(inputs.hidden, inputs.weight, inputs.targets)
    ratio = (stats.logp - batch.old_logp).exp()
    expected = {
        "eapo/entropy": stats.entropy[m].mean(),
        "eapo/entropy_ratio": torch.tensor(0.75),
        "eapo/entropy_init": torch.tensor(2.0),
        "eapo/positive_weight": torch.tensor(0.75),
        "ratio_mean": ratio[m].mean(),
        "tokens": m.sum().float(),
    }
    for key, value in expected.items():
        torch.testing.assert_close(out.metrics[key], value, rtol=1e-4, atol=1e-6)
    mean = torch.stack([batch.rewards[batch.group_ids == g].mean() for g in batch.group_ids])
    positive = batch.rewards > mean + 1e-6
    assert out.metrics["eapo/positive_fraction"] == positive.float().mean()
    assert 0 < out.metrics["clip_fraction"] < 1
    assert out.metrics["old_kl"] > 0
    assert not any(v.requires_grad for v in out.metrics.values())


def test_module_keeps_the_controller_in_its_state() -> None:
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    module = EAPOLoss(EAPOConfig(clip_high=0.3))
    module.controller.update(30.0, 10)
    module.controller.update(20.0, 10)
    out = module(inputs.hidden, inputs.weight, batch)
    expected, _ = run(inputs, batch, positive_weight=2 / 3, config=EAPOConfig(clip_high=0.3))
    torch.testing.assert_close(out.loss, expected.loss)
    fresh = EAPOLoss()
    fresh.load_state_dict(module.state_dict())
    assert fresh.controller.initial_entropy == 3.0
    assert fresh.controller.weight == module.controller.weight


def test_a_users_own_method_is_just_another_object() -> None:
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    mine = Method("mine", EAPOConfig(advantage=lambda rewards, groups: rewards - 0.5, split="advantage"), positive_weight=0.3)
    out, _ = run(inputs, batch, method=mine)
    by_hand = replace(batch, advantages=batch.rewards - 0.5)
    expected, _ = run(inputs, by_hand, positive_weight=0.3, config=EAPOConfig(split="advantage"))
    torch.testing.assert_close(out.loss, expected.loss)


def test_given_advantages_are_split_by_the_rewards() -> None:
    """Where there are rewards, they decide which tokens are positive (E10), also with advantages per token."""
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    mean = torch.stack([batch.rewards[batch.group_ids == g].mean() for g in batch.group_ids])
    positive = (batch.rewards > mean + 1e-6)[batch.sequence_ids]
    per_token = torch.randn(N, generator=torch.Generator().manual_seed(0))
    out, _ = run(inputs, replace(batch, advantages=per_token), positive_weight=0.3)
    by_hand = replace(batch, rewards=None, group_ids=None, advantages=torch.where(positive, 0.3, 1.0) * per_token)
    expected, _ = run(inputs, by_hand, positive_weight=1.0)
    torch.testing.assert_close(out.loss, expected.loss)
    batch_split = replace(batch, group_ids=None, advantages=torch.randn(B))
    out, _ = run(inputs, batch_split, positive_weight=0.3, config=EAPOConfig(split="batch"))
    assert out.metrics["eapo/positive_fraction"] == (batch.rewards > batch.rewards.mean()).float().mean()
    with pytest.raises(EapoError, match=r"batch.group_ids: expected \[B\] with split='group', got None"):
        run(inputs, batch_split, positive_weight=0.3)


def test_a_users_surrogate_may_look_across_tokens() -> None:
    """Its scope is unknown, so it is not cut into chunks."""

    def normalised(logp: Tensor, log_ratio: Tensor, advantages: Tensor, clip: object) -> tuple[Tensor, Tensor]:
        ratio = log_ratio.exp()
        return ratio / ratio.mean() * advantages, torch.zeros_like(logp, dtype=torch.bool)

    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    config = EAPOConfig(surrogate=normalised)
    auto, _ = run(inputs, batch, positive_weight=1.0, config=config, options=small_options())
    autograd, _ = run(inputs, batch, positive_weight=1.0, config=config, schedule="autograd")
    assert torch.equal(auto.loss, autograd.loss)
    with pytest.raises(EapoError, match="expected 'autograd' for a loss of batch scope"):
        run(inputs, batch, positive_weight=1.0, config=config, schedule="one_pass")


def test_methods_are_listed() -> None:
    assert {"eapo", "grpo", "dr_grpo", "psr", "nsr", "w_reinforce"} <= set(METHODS)
    assert METHODS["eapo"].controller == "entropy_ratio"


def test_an_operand_changed_before_the_backward_is_noticed() -> None:
    """One chunk multiplies hidden and weight in the backward: an optimizer step in between must not change the gradient."""
    inputs = make_inputs(N, D, V)
    hidden, weight = inputs.leaves()
    loss = eapo_loss(hidden, weight, make_batch(inputs), positive_weight=0.7, schedule="one_pass").loss
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_rows_that_count_are_kept_for_the_backward() -> None:
    """A copy, where others are left out: hidden may be freed or written over, and is not gathered a second time."""
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    _, expected = run(inputs, batch, positive_weight=0.7, schedule="one_pass")
    hidden, weight = inputs.leaves()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = eapo_loss(hidden, weight, batch, positive_weight=0.7, schedule="one_pass").loss
    *_, rows, operand = kept  # behind those of the coefficients
    assert torch.equal(rows, inputs.hidden[batch.mask])
    assert operand.data_ptr() == weight.data_ptr()
    with torch.no_grad():
        hidden.fill_(torch.nan)
    loss.backward()
    assert torch.equal(hidden.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


@pytest.mark.parametrize("plan", ["one_chunk", "chunks"])
def test_the_incoming_gradient_scales_all_gradients(plan: str) -> None:
    """In fp16 too, where a small loss is scaled up before the backward."""
    inputs = make_inputs(N, D, V, dtype=torch.float16, bias=True)
    batch = make_batch(inputs)

    def gradients(factor: float) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias)]
        out = eapo_loss(
            *leaves[:2], batch, bias=leaves[2], positive_weight=0.7, schedule="one_pass", options=Options(plan=plan)
        )
        (out.loss * factor).backward()
        return [t.grad.double() for t in leaves]

    for one, many in zip(gradients(1.0), gradients(1024.0), strict=True):
        assert many.abs().max() > 0
        torch.testing.assert_close(many / 1024, one, rtol=2e-3, atol=2**-24)
