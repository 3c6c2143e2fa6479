"""``policy_loss`` on any batch: against the definition, token by token; in parts; and with one wrong argument."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eapo_kernels import (
    METHODS,
    EAPOConfig,
    Options,
    TokenBatch,
    eapo_loss,
    idle_sequences,
    loss_denominator,
    policy_loss,
)  # fmt: skip

CONFIGS = st.builds(
    EAPOConfig,
    clip_low=st.sampled_from([0.0, 0.2, 1.0]),
    clip_high=st.sampled_from([0.0, 0.28, 9.0]),
    dual_clip=st.sampled_from([None, 1.5, 3.0]),
    surrogate=st.sampled_from(["reinforce", "ppo_clip", "unclipped", "cispo", "gspo"]),
    advantage=st.sampled_from(["group_norm", "group_mean", "sign", "batch_norm"]),
    split=st.sampled_from(["group", "batch", "advantage"]),
    reduction=st.sampled_from(["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "fixed_length"]),
    fixed_length=st.just(40),
    negative_weight=st.sampled_from([1.0, 0.0, 0.5]),
    drop_zero_weight=st.booleans(),
    kl_coef=st.sampled_from([0.0, 0.1]),
    kl_estimator=st.sampled_from(["k1", "k2", "k3"]),
    entropy_coef=st.sampled_from([0.0, 0.01, -0.01]),
    importance_cap=st.sampled_from([None, 1.2]),
)
# Rewards that a float holds exactly: (number + offset) * unit.
REWARDS = st.sampled_from([(0, 1.0), (0, 0.125), (10**9, 1.0), (0, 2.0**-60)])


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, TokenBatch]:
    """hidden, weight (fp32), batch. Values at tokens that do not count are NaN, ids there are out of range."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    N, B, D, V = draw(st.sampled_from([0, 1, 2, 9, 40])), draw(st.integers(1, 6)), 5, draw(st.sampled_from([1, 2, 37]))
    if B == N:
        B += 1  # ambiguous advantages have their own test
    offset, unit = draw(REWARDS)
    rewards = (torch.tensor(draw(st.lists(st.integers(-3, 3), min_size=B, max_size=B)), dtype=torch.float64) + offset) * unit
    exact = unit < 2.0**-50 or offset or draw(st.booleans())
    ids = torch.randint(B, (N,), generator=g)
    mask = draw(st.sampled_from([None, 0.0, 0.5, 0.9]))
    mask = None if mask is None else torch.rand(N, generator=g) < mask
    targets = torch.randint(V, (N,), generator=g)
    targets[torch.rand(N, generator=g) < 0.1] = -100
    valid = targets != -100 if mask is None else mask & (targets != -100)
    hidden = torch.where(valid[:, None], 2 * torch.randn(N, D, generator=g), math.nan)
    weight = torch.randn(V, D, generator=g)
    logp = torch.log_softmax(torch.where(valid[:, None], hidden, 0) @ weight.T, -1).gather(1, targets.clamp_min(0)[:, None])[
        :, 0
    ]

    def near(steps: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        """Log-probs away from the current ones by steps that no clip bound equals."""
        chosen = torch.tensor(steps)[torch.randint(len(steps), (N,), generator=g)]
        return torch.where(valid, logp + chosen, math.nan).to(dtype)

    steps = draw(st.sampled_from([[0.05, -0.05], [-3.0, -1.0, -0.3, 0.05, 0.1, 0.3, 1.0], [3.0, -9.0, 0.05]]))
    group_ids = torch.tensor(draw(st.lists(st.sampled_from([0, 7, -(2**62), 2**62]), min_size=B, max_size=B)))
    batch = TokenBatch(
        targets,
        torch.where(valid, ids, draw(st.sampled_from([0, -1, 10**12]))),
        rewards if exact else rewards.float(),
        group_ids,
        old_logp=near(steps, draw(st.sampled_from([torch.float32, torch.float64]))),
        mask=mask,
        ref_logp=near([-0.5, 0.02, 0.4]),
        rollout_logp=near([-0.5, 0.02, 0.4]),
    )
    return hidden, weight, batch


def model(logp: Tensor, entropy: Tensor, batch: TokenBatch, config: EAPOConfig, lam: float) -> Tensor:
    """docs/math.md E10 with every option, from fp64 log-probs and entropies [N]."""
    valid = (batch.targets != -100) & (True if batch.mask is None else batch.mask)
    assert batch.rewards is not None
    assert batch.group_ids is not None
    rewards, groups = [Fraction(r) for r in batch.rewards.tolist()], batch.group_ids.tolist()
    B = len(rewards)

    def margin(i: int, everyone: bool) -> tuple[Fraction, float]:
        """Reward minus the mean, and the unbiased deviation."""
        own = [r for r, g in zip(rewards, groups, strict=True) if everyone or g == groups[i]]
        mean = sum(own, Fraction(0)) / len(own)
        return rewards[i] - mean, math.sqrt(sum((r - mean) ** 2 for r in own) / max(len(own) - 1, 1))

    advantages, positive = [], []
    for i in range(B):
        deviation, std = margin(i, config.advantage == "batch_norm")
        sign = (deviation > 0) - (deviation < 0)
        value = {"group_mean": float(deviation), "sign": sign}.get(str(config.advantage), float(deviation) / (std + 1e-6))
        advantages.append(value)
        positive.append(value > 0 if config.split == "advantage" else margin(i, config.split == "batch")[0] > 0)
    weights = [lam if p else config.negative_weight for p in positive]
    tokens = [t for t in range(len(valid)) if valid[t]]
    ids = batch.sequence_ids.tolist()
    if config.drop_zero_weight:
        tokens = [t for t in tokens if weights[ids[t]] != 0]
    lengths = [sum(ids[t] == i for t in tokens) for i in range(B)]
    responses = max(sum(n > 0 for n in lengths), 1)
    assert batch.old_logp is not None
    assert batch.ref_logp is not None
    assert batch.rollout_logp is not None
    old, ref, rollout = batch.old_logp.double(), batch.ref_logp.double(), batch.rollout_logp.double()
    log_ratio = {t: (logp[t] - old[t]).clamp(-60, 60) for t in tokens}
    if config.surrogate == "gspo":
        mean = {i: sum(log_ratio[t] for t in tokens if ids[t] == i) / max(lengths[i], 1) for i in range(B)}
        log_ratio = {t: mean[ids[t]] for t in tokens}
    total = logp.new_zeros(())
    for t in tokens:
        a, ratio = advantages[ids[t]] * weights[ids[t]], log_ratio[t].exp()
        bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        if config.surrogate == "reinforce":
            term = a * logp[t]
        elif config.surrogate == "unclipped":
            term = a * ratio
        elif config.surrogate == "cispo":
            term = a * bounded.detach() * logp[t]
        else:
            term = torch.minimum(a * ratio, a * bounded)
            if config.dual_clip is not None and a < 0:
                term = torch.maximum(term, logp.new_tensor(config.dual_clip * a))
        if config.importance_cap is not None:
            term = term * (old[t] - rollout[t]).clamp(-60, 60).exp().clamp_max(config.importance_cap)
        delta = ref[t] - logp[t]
        kl = {"k1": -delta, "k2": delta**2 / 2, "k3": delta.exp() - 1 - delta}[config.kl_estimator]
        term = term - config.kl_coef * kl + config.entropy_coef * entropy[t]
        total = total - term / {
            "token_mean": len(tokens), "seq_mean_token_mean": lengths[ids[t]] * responses,
            "seq_mean_token_sum": responses, "fixed_length": responses * 40,
        }[config.reduction]  # fmt: skip
    return total


@given(
    batches(), CONFIGS, st.sampled_from([0.0, 0.7, 1.0, 3.0]), st.sampled_from(["one_pass", "autograd"]),
    st.sampled_from([None, 1500]), st.booleans(),
)  # fmt: skip
def test_the_loss_and_its_gradients(
    given: tuple[Tensor, Tensor, TokenBatch], config: EAPOConfig, lam: float, schedule: str, budget: int | None, metrics: bool
) -> None:
    hidden, weight, batch = given
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    out = eapo_loss(
        hidden, weight, batch, positive_weight=lam, config=config, metrics=metrics, options=Options(memory_budget=budget),
        schedule=schedule if config.scope == "token" else "autograd",
    )  # fmt: skip
    found = torch.autograd.grad(out.loss, leaves)
    valid = (batch.targets != -100) & (True if batch.mask is None else batch.mask)
    log_p = torch.log_softmax(torch.where(valid[:, None], hidden.double(), 0) @ weight.double().T, -1)
    logp = log_p.gather(1, batch.targets.clamp_min(0)[:, None])[:, 0]
    expected = model(logp, -(log_p.exp() * log_p).sum(1), batch, config, lam)
    exact = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True) if expected.requires_grad else None
    size = float(expected.detach().abs())
    spread = sum(float(g.norm()) for g in exact or ())
    tolerance = 1e-4 * (1e-3 + size + spread)
    assert abs(float(out.loss.detach()) - float(expected.detach())) <= tolerance
    for own, right in zip(found, exact or [torch.zeros_like(t) for t in leaves], strict=True):
        assert own.isfinite().all()
        assert float((own.double() - right.double()).abs().max() if own.numel() else 0) <= 10 * tolerance
    assert all(value.isfinite() for value in out.metrics.values())
    assert out.metrics["tokens"] <= valid.sum()


# A compilation takes seconds.
@settings(max_examples=max(settings.default.max_examples // 15, 2))
@given(batches(), CONFIGS, st.sampled_from([0.0, 0.7, 3.0]), st.booleans())
def test_a_compiled_loss_is_the_same(
    given: tuple[Tensor, Tensor, TokenBatch], config: EAPOConfig, lam: float, metrics: bool
) -> None:
    hidden, weight, batch = given
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def loss(hidden: Tensor, weight: Tensor, batch: TokenBatch) -> Tensor:
        return eapo_loss(
            hidden, weight, batch, positive_weight=lam, config=config, metrics=metrics, schedule="autograd"
        ).loss  # fmt: skip

    plain = loss(hidden, weight, batch)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight, batch)
    gradients = torch.autograd.grad(plain, leaves)
    tolerance = 1e-5 * (1e-3 + plain.detach().abs() + sum(g.norm() for g in gradients))
    assert (compiled.detach() - plain.detach()).abs() <= tolerance
    for own, right in zip(torch.autograd.grad(compiled, leaves), gradients, strict=True):
        assert (own - right).norm() <= tolerance


@given(batches(), CONFIGS, st.sampled_from([0.0, 0.7]), st.integers(0, 40))
def test_losses_of_parts_add_up(given: tuple[Tensor, Tensor, TokenBatch], config: EAPOConfig, lam: float, cut: int) -> None:
    """Cut anywhere, within responses too, with the global denominator and lengths."""
    hidden, weight, batch = given
    if config.scope == "sequence":
        config = replace(config, surrogate="ppo_clip")
    method = replace(METHODS["eapo"], config=config)
    whole = policy_loss(hidden, weight, batch, method=method, positive_weight=lam)
    valid = (batch.targets != -100) & (True if batch.mask is None else batch.mask)
    assert batch.rewards is not None
    lengths = torch.bincount(batch.sequence_ids[valid], minlength=len(batch.rewards))
    batch = replace(batch, denominator=loss_denominator(batch, method=method, positive_weight=lam), sequence_lengths=lengths)
    parts = [
        policy_loss(hidden[rows], weight, batch.select(rows), method=method, positive_weight=lam).loss
        for rows in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole.loss, rtol=1e-4, atol=1e-5 * (1 + float(parts[0].abs())))
    idle = idle_sequences(batch, method=method, positive_weight=lam)
    ids = torch.where(valid, batch.sequence_ids, 0)
    busy = batch.select((valid & ~idle[ids]).nonzero()[:, 0])
    left = policy_loss(hidden[valid & ~idle[ids]], weight, busy, method=method, positive_weight=lam).loss
    torch.testing.assert_close(left, whole.loss, rtol=1e-4, atol=1e-5 * (1 + float(whole.loss.abs())))
