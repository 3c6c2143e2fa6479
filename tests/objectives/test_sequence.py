"""Weights from responses, turns and positions, against their papers' equations typed out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from token_steps import (
    SIZES,
    Step,
    by_response,
    compare,
    group_normalised,
    make_step,
    of_policy,
)

from eapo_kernels import EapoError, get_method, weight_tokens


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.mean()


@pytest.mark.parametrize(("inter", "alpha", "split_by"), [(0.8, 1.3, "length"), (0.3, 1.4, "entropy")])
def test_canon(inter: float, alpha: float, split_by: str) -> None:
    """arXiv 2509.23962: sort the group by mean entropy (or length), low half n // 2; baselines across and within the halves.
    alpha is at the rewards of the low entropies, but of the long responses, as in the release."""
    step = make_step(1)
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])  # an odd group: 1 low, 2 high
    step = replace(step, batch=replace(step.batch, group_ids=ids))
    method = get_method("canon", inter=inter, alpha=alpha, split_by=split_by, fixed_length=40)
    key = by_response(step, _mean if split_by == "entropy" else lambda v: torch.tensor(float(len(v))), step.old["entropy"])
    r, a = step.batch.rewards.double(), torch.zeros(len(SIZES), dtype=torch.float64)
    for group in range(2):
        order = sorted((ids == group).nonzero()[:, 0].tolist(), key=lambda i: float(key[i]))
        low, high = order[: len(order) // 2], order[len(order) // 2 :]
        for i in order:
            at_high, at_low = (alpha, 1) if split_by == "length" else (1, alpha)
            if i in high:
                a[i] = inter * (at_high * r[i] - at_low * r[low].mean()) + (1 - inter) * (r[i] - r[high].mean())
            else:
                a[i] = inter * (at_low * r[i] - at_high * r[high].mean()) + (1 - inter) * (r[i] - r[low].mean())
    token_mean = of_policy(step, a[step.ids])
    tokens = int(step.valid.sum())
    compare(step, method, lambda hidden, weight: token_mean(hidden, weight) * tokens / (len(SIZES) * 40))


def test_canon_of_equal_rewards_and_of_groups_of_one_is_zero() -> None:
    """With alpha = 1 equal rewards equal the other half's mean; a group of one has no other half."""
    step = make_step()
    same = replace(step.batch, rewards=torch.full((len(SIZES),), 0.3))
    alone = replace(step.batch, group_ids=torch.arange(len(SIZES)))
    for batch in (same, alone):
        weighted = weight_tokens(get_method("canon", fixed_length=40), batch, step.stats)
        torch.testing.assert_close(weighted.advantages, torch.zeros_like(weighted.advantages), atol=1e-7, rtol=0)


def test_pear() -> None:
    """arXiv 2510.08026: r = min(1, s - max(0, H_think - alpha H_answer)) where correct, else 0; then GRPO."""
    step, method = make_step(2, binary=True), get_method("pear", alpha=0.5)
    answer = torch.zeros_like(step.valid)
    for i in range(1, len(SIZES)):  # the first response has no final answer
        answer[(step.ids == i).nonzero()[-2:, 0]] = True
    h, rewards = step.old["entropy"], torch.zeros(len(SIZES), dtype=torch.float64)
    for i in range(len(SIZES)):
        think, final = (h[step.valid & (step.ids == i) & part] for part in (~answer, answer))
        after = final.mean() if len(final) else torch.tensor(0.0)
        penalty = max(0.0, float(think.mean() - 0.5 * after))
        rewards[i] = min(1.0, 1.0 - penalty) if step.batch.rewards[i] == 1 else 0.0
    loss = of_policy(step, group_normalised(step, rewards)[step.ids], mean="responses")
    compare(step, method, loss, extras={"answer": answer}, tolerance=5e-5)


@pytest.mark.parametrize("prefer", ["low", "high"])
def test_exchange_ppl(prefer: str) -> None:
    """arXiv 2508.02260: s = group z-score of log PPL without outliers beyond 1.5 IQR; A clamp(1 -+ alpha s, 0.8, 1.2)."""
    step, method = make_step(3), get_method("exchange_ppl", alpha=0.1, prefer=prefer)
    log_p = step.old["logp"].clone()
    log_p[step.ids == 2] -= 4.0  # an outlier
    step = replace(step, stats=step.stats._replace(logp=log_p.float()))
    surprisal, w = -by_response(step, _mean, log_p), torch.zeros(len(SIZES), dtype=torch.float64)
    outliers = 0
    for group in range(2):
        own = step.batch.group_ids == group
        values = surprisal[own]
        q1, q3 = values.quantile(0.25), values.quantile(0.75)
        inside = (values >= q1 - 1.5 * (q3 - q1)) & (values <= q3 + 1.5 * (q3 - q1))
        outliers += int((~inside).sum())
        clean = values[inside]
        s = (values - clean.mean()) / clean.std(unbiased=False)
        w[own] = (1 + (-0.1 if prefer == "low" else 0.1) * s).clamp(0.8, 1.2)
    assert outliers == 1
    compare(step, method, of_policy(step, w[step.ids] * group_normalised(step)[step.ids]))


@pytest.mark.parametrize("name", ["pear", "canon"])
def test_methods_of_raw_rewards_refuse_a_batch_with_advantages(name: str) -> None:
    step = make_step()
    batch = replace(step.batch, advantages=torch.zeros(len(SIZES)))
    extras = {"answer": torch.zeros_like(step.valid)}
    with pytest.raises(EapoError, match=r"batch\.advantages: expected None with a method that makes its own of the rewards"):
        weight_tokens(get_method(name, fixed_length=9), batch, step.stats, extras=extras)


def test_exchange_position() -> None:
    """arXiv 2508.02260: b_t = alpha sigmoid(15 (t / len - 0.5)), at most 0.5 |A|; A + sign(A) b_t."""
    step, method = make_step(), get_method("exchange_position", alpha=0.6)
    a = group_normalised(step)[step.ids]
    capped = 0
    for i in range(len(SIZES)):
        tokens = (step.valid & (step.ids == i)).nonzero()[:, 0].tolist()
        for t, token in enumerate(tokens):
            b = 0.6 / (1 + math.exp(-15 * (t / len(tokens) - 0.5)))
            capped += b > 0.5 * abs(float(a[token]))
            a[token] += torch.sign(a[token]) * min(b, 0.5 * abs(float(a[token])))
    assert 0 < capped < int(step.valid.sum())
    compare(step, method, of_policy(step, a))


TURNS = (0, 2, 5)  # the numbers of the turns: rising, not without gaps


def _turns(step: Step) -> tuple[torch.Tensor, list[tuple[int, torch.Tensor]]]:
    """turn_ids [N]: responses are cut in up to three turns; and (response, its tokens) turn by turn, in order."""
    turn_ids = torch.zeros_like(step.ids)
    parts = []
    for i in range(len(SIZES)):
        tokens = (step.ids == i).nonzero()[:, 0]
        for turn, piece in zip(TURNS, tokens.tensor_split(1 + i % 3), strict=False):
            turn_ids[piece] = turn
            piece = piece[step.valid[piece]]
            if len(piece):
                parts.append((i, piece))
    assert len(parts) > 10
    return turn_ids, parts


def test_aem() -> None:
    """arXiv 2605.00425: alpha = exp(-lambda h) / mean_G exp(-lambda h), h min-max scaled over the group's turns."""
    step, method = make_step(), get_method("aem", strength=1.7)
    turn_ids, parts = _turns(step)
    h, a = step.old["entropy"], group_normalised(step)[step.ids]
    for group in range(2):
        own = [(i, piece) for i, piece in parts if step.batch.group_ids[i] == group]
        means = torch.stack([h[piece].mean() for _, piece in own])
        scaled = (means - means.min()) / (means.max() - means.min() + 1e-8)
        alpha = (-1.7 * scaled).exp() / (-1.7 * scaled).exp().mean()
        for weight, (_, piece) in zip(alpha, own, strict=True):
            a[piece] *= weight
    compare(step, method, of_policy(step, a), extras={"turn_ids": turn_ids})


def test_empg() -> None:
    """arXiv 2509.09265, eqs. 7, 10-12: A g(h_t) + zeta f(h_{t+1}), minus its mean over the steps of the batch."""
    step, method = make_step(1), get_method("empg", k=1.3, k_future=0.7, zeta=0.2)
    turn_ids, parts = _turns(step)
    entropy, a = step.old["entropy"], group_normalised(step)
    means = torch.stack([entropy[piece].mean() for _, piece in parts])
    h = (means - means.min()) / (means.max() - means.min() + 1e-8)
    g = (-1.3 * h).exp() / ((-1.3 * h).exp().mean() + 1e-8)
    values = []
    for n, (i, _) in enumerate(parts):
        follows = n + 1 < len(parts) and parts[n + 1][0] == i
        values.append(a[i] * g[n] + (0.2 * math.exp(-0.7 * float(h[n + 1])) if follows else 0.0))
    mean = torch.stack(values).mean()
    per_token = torch.zeros_like(entropy)
    for value, (_, piece) in zip(values, parts, strict=True):
        per_token[piece] = value - mean
    compare(step, method, of_policy(step, per_token), extras={"turn_ids": turn_ids})


def test_without_turns_a_response_is_one() -> None:
    step = make_step()
    for name in ("aem", "empg"):
        alone = weight_tokens(get_method(name), step.batch, step.stats)
        zeros = weight_tokens(get_method(name), step.batch, step.stats, extras={"turn_ids": torch.zeros_like(step.ids)})
        torch.testing.assert_close(alone.advantages, zeros.advantages)


def test_empg_without_its_terms_is_the_centred_advantage() -> None:
    """k and zeta 0: the advantage minus its mean over responses."""
    step = make_step(2)
    base = group_normalised(step).float()
    centred = weight_tokens(get_method("empg", k=0.0, zeta=0.0), step.batch, step.stats)
    expected = torch.where(step.valid, (base - base.mean())[step.ids], 0.0)
    torch.testing.assert_close(centred.advantages, expected, atol=1e-6, rtol=1e-5)
