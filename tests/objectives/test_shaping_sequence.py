"""Methods on responses' entropies, perplexities and phases, against their papers' equations typed out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from shaped import SIZES, by_response, compare, group_normalised, make_step, of_policy

from eapo_kernels import EapoError, get_method, weight_tokens


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.mean()


def test_aepo_agentic() -> None:
    """arXiv 2510.14545: A (1 + 0.2 z(H)); the upper bound keeps its gradient, (1 + eps) rho / sg(rho) A; dual clip 3."""
    step, method = make_step(), get_method("aepo_agentic", clip_high=0.05)
    a, ok, h = group_normalised(step)[step.ids], step.valid, step.old["entropy"]
    a = a * (1 + 0.2 * (h - h[ok].mean()) / h[ok].std(unbiased=False))

    def loss(hidden, weight):
        ratio = (step.logp(hidden, weight) - step.old["logp"]).exp()
        upper = 1.05 * ratio / ratio.detach()
        bounded = torch.where(ratio > 1.05, upper, ratio.clamp_min(0.8))
        term = torch.minimum(ratio * a, bounded * a)
        return -torch.where(a < 0, torch.maximum(term, 3.0 * a), term)[ok].sum() / ok.sum()

    compare(step, method, loss)


def test_aepo_agentic_without_strength_is_its_surrogate_alone() -> None:
    step = make_step()
    shaped = weight_tokens(get_method("aepo_agentic", strength=0.0), step.batch, step.stats)
    expected = torch.where(step.valid, group_normalised(step)[step.ids].float(), 0.0)
    torch.testing.assert_close(shaped.advantages, expected)


@pytest.mark.parametrize(("inter", "alpha"), [(1.0, 1.0), (0.3, 1.4)])
@pytest.mark.parametrize("split_by", ["entropy", "length"])
def test_canon(inter: float, alpha: float, split_by: str) -> None:
    """arXiv 2509.23962: sort the group by mean entropy (or length), low half n // 2; baselines across and within the halves."""
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
            if i in high:
                a[i] = inter * (r[i] - alpha * r[low].mean()) + (1 - inter) * (r[i] - r[high].mean())
            else:
                a[i] = inter * (alpha * r[i] - r[high].mean()) + (1 - inter) * (r[i] - r[low].mean())
    token_mean = of_policy(step, a[step.ids])
    tokens = int(step.valid.sum())
    compare(step, method, lambda hidden, weight: token_mean(hidden, weight) * tokens / (len(SIZES) * 40))


def test_canon_of_equal_rewards_and_of_lonely_responses_is_zero() -> None:
    """With alpha = 1 nobody beats the other half's mean of the same rewards; a group of one has no other half."""
    step = make_step()
    same = replace(step.batch, rewards=torch.full((len(SIZES),), 0.3))
    alone = replace(step.batch, group_ids=torch.arange(len(SIZES)))
    for batch in (same, alone):
        shaped = weight_tokens(get_method("canon", fixed_length=40), batch, step.stats)
        torch.testing.assert_close(shaped.advantages, torch.zeros_like(shaped.advantages), atol=1e-7, rtol=0)


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


def test_pear_of_confident_thinking_is_grpo() -> None:
    """Entropy zero in the thinking: no penalty."""
    step = make_step(binary=True)
    sure = step.stats._replace(entropy=torch.zeros_like(step.stats.entropy))
    shaped = weight_tokens(get_method("pear"), step.batch, sure, extras={"answer": torch.zeros_like(step.valid)})
    expected = torch.where(step.valid, group_normalised(step)[step.ids].float(), 0.0)
    torch.testing.assert_close(shaped.advantages, expected)


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


def test_exchange_ppl_of_equal_perplexities_is_its_base() -> None:
    step = make_step()
    flat = step.stats._replace(logp=torch.full_like(step.stats.logp, -0.7))
    shaped = weight_tokens(get_method("exchange_ppl"), step.batch, flat)
    expected = torch.where(step.valid, group_normalised(step)[step.ids].float(), 0.0)
    torch.testing.assert_close(shaped.advantages, expected)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("canon", {"inter": 1.5}, r"inter: expected a finite number in \[0, 1\], got 1.5"),
        ("canon", {"split_by": "reward"}, "split_by: expected one of entropy, length, got 'reward'"),
        ("pear", {"alpha": "1"}, "alpha: expected a finite number, got '1'"),
        ("exchange_ppl", {"low": 1.3}, "high: expected a finite number >= 1.3, got 1.2"),
        ("exchange_ppl", {"prefer": "mid"}, "prefer: expected one of low, high, got 'mid'"),
        ("aepo_agentic", {"strength": float("nan")}, "strength: expected a finite number, got nan"),
    ],
)
def test_bad_numbers(name: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(EapoError, match=message):
        get_method(name, **change)


@pytest.mark.parametrize("name", ["pear", "canon"])
def test_methods_of_raw_rewards_refuse_ready_advantages(name: str) -> None:
    step = make_step()
    batch = replace(step.batch, advantages=torch.zeros(len(SIZES)))
    extras = {"answer": torch.zeros_like(step.valid)}
    with pytest.raises(EapoError, match=r"batch\.advantages: expected None with a method that makes its own of the rewards"):
        weight_tokens(get_method(name, fixed_length=9), batch, step.stats, extras=extras)
