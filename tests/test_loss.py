"""The EAPO loss: against the dense oracle, against equations typed again, and the two schedules against each other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_kernels import (
    METHODS,
    EAPOConfig,
    EapoError,
    EAPOLoss,
    EntropyRatio,
    LossOutput,
    Method,
    Options,
    ShapeError,
    TokenBatch,
    eapo_loss,
    policy_loss,
    reference,
)
from eapo_kernels.ops.projection import Projection
from eapo_kernels.testing import Inputs, assert_no_worse_than, make_inputs

N, D, V, B = 150, 24, 301, 12


def make_batch(inputs: Inputs, *, seed: int = 3, off_policy: float = 0.3, masked: bool = True) -> TokenBatch:
    """Twelve responses of uneven length in three groups; a tied reward, masked tokens, all optional log-probs."""
    generator = torch.Generator().manual_seed(seed)
    device = inputs.hidden.device
    wide = inputs.to(torch.float64)
    with torch.no_grad():
        bias = None if wide.bias is None else wide.bias.detach()
        logp = reference.token_stats(wide.hidden.detach(), wide.weight.detach(), wide.targets, bias=bias).logp.float().cpu()
    n = inputs.targets.numel()
    old = logp + off_policy * torch.randn(n, generator=generator)
    rewards = torch.rand(B, generator=generator)
    rewards[0] = rewards[1:4].mean()  # a tie with its group's mean
    mask = torch.rand(n, generator=generator) > 0.2 if masked else None
    batch = TokenBatch(
        targets=inputs.targets,
        sequence_ids=torch.randint(B, (n,), generator=generator).sort().values,
        rewards=rewards,
        group_ids=torch.tensor([7, 7, 7, 7, -1, -1, -1, -1, 3, 3, 3, 3]),
        old_logp=old,
        mask=mask,
        ref_logp=old + 0.1 * torch.randn(n, generator=generator),
        rollout_logp=old - 0.2 * torch.randn(n, generator=generator),
    )
    moved = {k: v.to(device) for k, v in vars(batch).items() if isinstance(v, Tensor)}
    return replace(batch, **moved)


def run(inputs: Inputs, batch: TokenBatch, **options: Any) -> tuple[LossOutput, list[Tensor]]:
    leaves = [t.detach().requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias) if t is not None]
    call = policy_loss if "method" in options else eapo_loss
    out = call(leaves[0], leaves[1], batch, bias=leaves[2] if len(leaves) > 2 else None, **options)
    return out, list(torch.autograd.grad(out.loss, leaves))


def small_options() -> Options:
    return Options(memory_budget=V * 4 * 64)


CONFIGS = {
    "default": EAPOConfig(),
    "asymmetric_dual": EAPOConfig(clip_low=0.1, clip_high=0.3, dual_clip=1.5),
    "entropy_bonus": EAPOConfig(entropy_coef=0.05),
    "kl_k1": EAPOConfig(kl_coef=0.1, kl_estimator="k1"),
    "kl_k2": EAPOConfig(kl_coef=0.1, kl_estimator="k2"),
    "kl_k3": EAPOConfig(kl_coef=0.1, kl_estimator="k3"),
    "importance": EAPOConfig(importance_cap=1.1),
    "reinforce": EAPOConfig(surrogate="reinforce"),
    "cispo": EAPOConfig(surrogate="cispo"),
    "gspo": EAPOConfig(surrogate="gspo", reduction="seq_mean_token_mean", clip_low=0.05, clip_high=0.05),
    "group_mean": EAPOConfig(advantage="group_mean", reduction="seq_mean_token_sum"),
    "sign_fixed": EAPOConfig(advantage="sign", reduction="fixed_length", fixed_length=40),
    "batch": EAPOConfig(advantage="batch_norm", split="batch", negative_weight=0.5),
    "dropped": EAPOConfig(split="advantage", negative_weight=0.0, drop_zero_weight=True),
}


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
    truth_inputs = inputs.to(torch.float64)
    _, truth = run(truth_inputs, batch, schedule="autograd", **common)
    autograd, plain = run(inputs, batch, schedule="autograd", **common)
    one_pass, grads = run(inputs, batch, schedule="one_pass", **common)
    torch.testing.assert_close(one_pass.loss, autograd.loss, rtol=1e-5, atol=1e-6)
    for key, value in autograd.metrics.items():
        torch.testing.assert_close(one_pass.metrics[key], value, rtol=1e-5, atol=1e-6)
    floor = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for got, other, exact in zip(grads, plain, truth, strict=True):
        assert got.dtype == dtype
        assert_no_worse_than(got, other, exact, floor=floor)


@pytest.mark.parametrize("name", ["default", "gspo", "group_mean", "sign_fixed", "kl_k3"])
def test_micro_batches_add_up_to_the_batch(name: str) -> None:
    """Responses spread over micro-batches, one global denominator: losses and gradients add up exactly (to rounding)."""
    config = CONFIGS[name]
    inputs = make_inputs(N, D, V, dtype=torch.float64)
    batch = make_batch(inputs)
    whole, grads = run(inputs, batch, positive_weight=0.7, config=config)
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
    torch.testing.assert_close(total, whole.loss, rtol=1e-6, atol=1e-8)
    for got, exact in zip(parts, grads, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-9)


def test_a_response_split_over_micro_batches_needs_its_length() -> None:
    config = EAPOConfig(reduction="seq_mean_token_mean")
    inputs = make_inputs(N, D, V, dtype=torch.float64)
    batch = make_batch(inputs, masked=False)
    whole, _ = run(inputs, batch, positive_weight=0.7, config=config)
    lengths = torch.bincount(batch.sequence_ids, minlength=B)
    total = 0.0
    for half in (slice(0, 71), slice(71, N)):
        part = {k: v[half] for k, v in vars(batch).items() if isinstance(v, Tensor) and v.shape == (N,)}
        micro = replace(batch, **part, denominator=float((lengths > 0).sum()), sequence_lengths=lengths)
        out, _ = run(replace(inputs, hidden=inputs.hidden[half]), micro, positive_weight=0.7, config=config)
        total = total + out.loss
    torch.testing.assert_close(total, whole.loss, rtol=1e-6, atol=1e-8)


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
    """A' = where(positive, w A, A) before any loss (how the adapters will do it); per response and per token."""
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


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rewards": torch.full((B,), math.nan)}, EapoError, r"batch.rewards: expected finite numbers, got nan at 0"),
        ({"rewards": torch.zeros(B, dtype=torch.int64)}, ShapeError, r"batch.rewards: expected .* \[12\] cpu, got int64"),
        ({"rewards": None}, EapoError, r"batch.rewards: expected \[B\] unless advantages are given, got None"),
        ({"group_ids": None}, EapoError, r"batch.group_ids: expected \[B\]"),
        ({"group_ids": torch.zeros(3, dtype=torch.int64)}, ShapeError, r"batch.group_ids: expected int64 \[12\]"),
        ({"sequence_ids": torch.full((N,), B)}, EapoError, r"batch.sequence_ids: expected values in \[0, 12\), got 12"),
        ({"sequence_ids": torch.zeros(4, dtype=torch.int64)}, ShapeError, r"batch.sequence_ids: expected int64 \[150\]"),
        ({"targets": torch.full((N,), V)}, EapoError, r"targets: expected values in \[0, 301\)"),
        ({"targets": torch.zeros(N)}, ShapeError, r"batch.targets: expected int64 \[N\], got float32 \[150\]"),
        ({"mask": torch.ones(N)}, ShapeError, r"batch.mask: expected bool \[150\]"),
        ({"old_logp": torch.full((N,), -math.inf)}, EapoError, r"batch.old_logp: expected finite numbers, got -inf at 0"),
        ({"old_logp": torch.zeros(N, 1)}, ShapeError, r"batch.old_logp: expected .* \[150\] cpu, got float32 \[150, 1\]"),
        ({"advantages": torch.zeros(5)}, ShapeError, r"batch.advantages: expected"),
        ({"denominator": math.inf}, EapoError, r"batch.denominator: expected a positive finite number, got inf"),
        ({"denominator": torch.ones(2)}, EapoError, r"batch.denominator: expected a number or a 0-dim tensor"),
        ({"rewards": [0.0] * B}, ShapeError, r"batch.rewards: expected .* \[12\] cpu, got \[0.0, "),
        ({"sequence_lengths": torch.full((B,), -3)}, EapoError, r"batch.sequence_lengths: expected at least .* got -3.0"),
        ({"sequence_lengths": torch.full((B,), math.nan)}, EapoError, r"batch.sequence_lengths: expected at least .*, got nan"),
        ({"denominator": 0.0}, EapoError, r"batch.denominator: expected a positive finite number, got 0.0"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)  # fmt: skip
def test_bad_batches(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = make_inputs(N, D, V)
    with pytest.raises(error, match=message):
        run(inputs, replace(make_batch(inputs), **changes), positive_weight=1.0)


def test_a_batch_that_is_none() -> None:
    inputs = make_inputs(N, D, V)
    for call, message in (
        (lambda: eapo_loss(inputs.hidden, inputs.weight, {}, positive_weight=1.0), "batch: expected a TokenBatch, got {}"),
        (lambda: eapo_loss(inputs.hidden, None, make_batch(inputs), positive_weight=1.0), r"weight: expected \[V, D\] on cpu"),
        (lambda: run(inputs, make_batch(inputs), positive_weight=1.0, config={}), "config: expected an EAPOConfig or None"),
        (lambda: run(inputs, make_batch(inputs), positive_weight=1.0, options={}), "options: expected Options or None"),
        (lambda: run(inputs, make_batch(inputs), positive_weight="x"), "positive_weight: expected a number, .* got 'x'"),
    ):
        with pytest.raises(EapoError, match=message):
            call()


def test_gspo_wants_whole_responses() -> None:
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs, masked=False)
    lengths = torch.bincount(batch.sequence_ids, minlength=B)
    run(inputs, replace(batch, sequence_lengths=lengths), positive_weight=1.0, config=CONFIGS["gspo"])
    with pytest.raises(EapoError, match="expected whole responses with surrogate 'gspo', got parts"):
        run(inputs, replace(batch, sequence_lengths=lengths + 1), positive_weight=1.0, config=CONFIGS["gspo"])


def test_advantages_of_one_token_responses_must_not_be_ambiguous() -> None:
    inputs = make_inputs(B, D, V)
    batch = replace(make_batch(inputs, masked=False), sequence_ids=torch.arange(B).flip(0), advantages=torch.randn(B))
    for rewards, groups in ((batch.rewards, batch.group_ids), (None, None)):
        with pytest.raises(EapoError, match=r"batch.advantages: expected \[B\] or \[N\] with B != N .*, got B = N = 12"):
            run(inputs, replace(batch, rewards=rewards, group_ids=groups), positive_weight=1.0)
    run(inputs, replace(batch, sequence_ids=torch.arange(B)), positive_weight=1.0)


def test_given_advantages_are_split_by_the_rewards() -> None:
    """What is positive is the rewards' matter (E10) where there are rewards, also with advantages per token."""
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
    """Nothing is known of its scope, so it is not cut into chunks."""

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peaked", [True, False], ids=["peaked", "uniform"])
@pytest.mark.parametrize("schedule", ["autograd", "one_pass"])
def test_half_precision_operands_as_on_a_gpu(
    schedule: str, peaked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA the products take the inputs' dtype; here the CPU is made to, at a vocabulary that fp16 cannot count."""
    n, v = 64, 70_000
    inputs = make_inputs(n, D, v, dtype=dtype, peaked=peaked)
    batch = make_batch(inputs, masked=False)
    _, truth = run(inputs.to(torch.float64), batch, positive_weight=0.7, schedule="autograd")
    monkeypatch.setattr(Projection, "operand_dtype", property(lambda self: self.hidden.dtype))
    _, grads = run(inputs, batch, positive_weight=0.7, schedule=schedule)
    limit = {torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    for got, exact in zip(grads, truth, strict=True):
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive_weight": -1.0}, r"positive_weight: expected a finite number >= 0, got -1.0"),
        ({"positive_weight": math.nan}, r"positive_weight: expected a finite number >= 0, got nan"),
        ({"positive_weight": torch.ones(2)}, r"positive_weight: expected a number, .* got float32 \[2\]"),
        ({"positive_weight": 1.0, "schedule": "fast"}, r"schedule: expected one of auto, one_pass, autograd, got 'fast'"),
        ({"positive_weight": 1.0, "config": CONFIGS["gspo"], "schedule": "one_pass"}, r"expected 'autograd' for a loss of seq"),
        ({"method": "grpo", "positive_weight": 0.5}, r"expected None for method 'grpo'"),
        ({"method": "eapo"}, r"positive_weight: expected a number, .* for method 'eapo', got None"),
        ({"method": "gpro"}, r"method: expected one of eapo, grpo, .*, got 'gpro'"),
        ({"method": "dr_grpo"}, r"fixed_length: expected a positive int with reduction 'fixed_length', got None"),
        ({"method": "psr"}, r"rewards: expected 0 or 1 with advantage 'binary'"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    inputs = make_inputs(N, D, V)
    with pytest.raises(EapoError, match=message):
        run(inputs, make_batch(inputs), **options)


@pytest.mark.parametrize("missing", [{"kl_coef": 0.1}, {"importance_cap": 2.0}], ids=str)
def test_what_a_loss_needs_must_be_there(missing: dict[str, float]) -> None:
    inputs = make_inputs(N, D, V)
    batch = replace(make_batch(inputs), ref_logp=None, rollout_logp=None)
    with pytest.raises(EapoError, match=r"batch.(ref|rollout)_logp: expected \[N\] floats with"):
        run(inputs, batch, positive_weight=1.0, config=EAPOConfig(**missing))


def test_methods_are_listed() -> None:
    assert {"eapo", "grpo", "dr_grpo", "psr", "nsr", "w_reinforce"} <= set(METHODS)
    assert METHODS["eapo"].controller == "entropy_ratio"
