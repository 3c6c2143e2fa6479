"""Advantages, group statistics, controllers, supports and token weights of any step, against a few lines of Python."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eapo_kernels import (
    METHODS,
    EapoError,
    EntropyRatio,
    TokenBatch,
    TokenStats,
    TokenSupport,
    get_method,
    majority_rewards,
    make_controller,
    observed_entropy,
    semantic_rewards,
    weight_tokens,
)  # fmt: skip
from eapo_kernels.integrations import AdvantageWeight, scale_positive
from eapo_kernels.objectives.advantages import ADVANTAGES

IDS = st.integers(0, 3) | st.sampled_from([-1, -(2**63), 2**62, 2**63 - 1])
REWARDS = st.sampled_from([0.0, 1.0]) | st.floats(-1e30, 1e30) | st.floats(-2, 2) | st.integers(0, 5).map(lambda i: 1e9 + i)


@given(st.lists(st.tuples(REWARDS, IDS), max_size=8), st.sampled_from(["group_norm", "group_mean", "sign", "batch_norm"]))
def test_advantages(rows: list[tuple[float, int]], name: str) -> None:
    rewards = torch.tensor([r for r, _ in rows], dtype=torch.float64)
    found = ADVANTAGES[name](rewards, torch.tensor([i for _, i in rows], dtype=torch.int64)).tolist()
    for (reward, own), value in zip(rows, found, strict=True):
        group = [Fraction(r) for r, i in rows if i == own or name == "batch_norm"]
        mean = sum(group) / len(group)
        deviation, largest = float(Fraction(reward) - mean), max(abs(float(r)) for r in group)
        if abs(deviation) <= 2.0**-48 * largest:  # a tie, or too near to one for fp64
            assert abs(value) <= max(abs(deviation), 1e-12 * largest, 1e-6)
            continue
        std = math.sqrt(sum((float(r - mean)) ** 2 for r in group) / max(len(group) - 1, 1))
        right = {"group_mean": deviation, "sign": math.copysign(1, deviation)}.get(name, deviation / (std + 1e-6))
        error = 1e-5 * abs(right) + (0 if name == "sign" else 1e-14 * largest / (std + 1e-6 if "norm" in name else 1))
        assert abs(value - right) <= error + 1e-37


@given(st.lists(st.tuples(IDS, IDS), max_size=8))
def test_rewards_of_clusters(rows: list[tuple[int, int]]) -> None:
    clusters, groups = (torch.tensor([row[i] for row in rows], dtype=torch.int64) for i in (0, 1))
    shares, best = semantic_rewards(clusters, groups).tolist(), majority_rewards(clusters, groups).tolist()
    for (cluster, group), share, is_best in zip(rows, shares, best, strict=True):
        others = [c for c, g in rows if g == group]
        sizes = {c: others.count(c) for c in others if c >= 0}
        own, largest = sizes.get(cluster, 0), max(sizes.values(), default=0)
        assert share == pytest.approx(own / len(others) if largest > 1 else 0)
        assert is_best == (own == largest and cluster >= 0)


@given(
    st.builds(
        dict, kappa=st.floats(-9, 9), scale=st.floats(0, 9), low=st.sampled_from([0, 0.5]),
        high=st.sampled_from([0.5, math.inf]),
        ema=st.sampled_from([0, 0.9]), anchor_steps=st.integers(1, 3),
    ),
    st.lists(st.tuples(st.floats(0, 1e300), st.integers(1, 10**9)), max_size=6), st.integers(0, 5),
)  # fmt: skip
def test_the_weight_of_positives(settings: dict[str, Any], steps: list[tuple[float, int]], stop: int) -> None:
    """E9 by its definition; resumed after any step; a step without entropy is refused and changes nothing."""
    controller = EntropyRatio(**settings)
    entropies: list[float] = []
    smoothed = 0.0
    for number, (total, count) in enumerate(steps):
        before = controller.state_dict()
        if total / count == 0:
            with pytest.raises(EapoError, match="entropy_sum: expected a positive finite number"):
                controller.update(total, count)
            assert repr(controller.state_dict()) == repr(before)
            continue
        weight = float(controller.update(total, count))
        entropies.append(total / count)
        anchor = entropies[: settings["anchor_steps"]]
        initial = sum(anchor) / len(anchor)
        smoothed = (
            initial if len(anchor) == len(entropies) else settings["ema"] * smoothed + (1 - settings["ema"]) * entropies[-1]
        )
        try:
            power = (smoothed / initial) ** settings["kappa"]
        except (OverflowError, ZeroDivisionError):
            power = math.inf
        right = min(max(settings["scale"] * min(power, 1e30), settings["low"]), settings["high"], 1e30)
        assert weight == pytest.approx(right, rel=1e-6, abs=1e-300)
        if number == stop:
            again = EntropyRatio(**settings)
            again.load_state_dict(controller.state_dict())
            controller = again


@given(st.lists(st.lists(st.integers(0, 9), unique=True, max_size=5), max_size=5), st.sampled_from(["lists", "padded", "csr"]))
def test_supports(lists: list[list[int]], how: str) -> None:
    if how == "lists":
        support = TokenSupport.from_lists(lists)
    elif how == "padded":
        width = max(map(len, lists), default=0)
        padded = [own + [-1] * (width - len(own)) for own in lists]
        support = TokenSupport.from_padded(torch.tensor(padded, dtype=torch.int32).reshape(len(lists), width))
    else:
        ends = [sum(map(len, lists[:i])) for i in range(len(lists) + 1)]
        support = TokenSupport.from_csr(torch.tensor(sum(lists, []), dtype=torch.int64), torch.tensor(ends))  # noqa: RUF017

    def rows(one: TokenSupport) -> list[list[int]]:
        return [one.ids[a:b].tolist() for a, b in zip(one.offsets[:-1], one.offsets[1:], strict=True)]

    assert rows(support) == [sorted(own) for own in lists]
    chosen = [i for i in range(len(lists)) if i % 2]
    assert rows(support.select(torch.tensor(chosen, dtype=torch.int64))) == [sorted(lists[i]) for i in chosen]
    support.check(torch.tensor([own[0] if own else -100 for own in lists], dtype=torch.int64), 10)


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), max_size=5), st.floats(0, 1e3, width=32))
def test_scaled_advantages(values: list[float], weight: float) -> None:
    found = scale_positive(torch.tensor(values), weight)
    assert found.tolist() == pytest.approx([a * weight if a > 0 else a for a in values], rel=1e-6)


@st.composite
def steps(draw: st.DrawFn) -> tuple[TokenBatch, TokenStats, dict[str, Tensor]]:
    """A step of whole responses, some of them without tokens that count; values at the others are NaN."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 5]), min_size=1, max_size=7))
    B, N = len(lengths), sum(lengths)
    mask = torch.rand(N, generator=g) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    rewards = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=B, max_size=B)))

    def known(values: Tensor) -> Tensor:
        return torch.where(mask, values, math.nan)

    entropy = known(3 * torch.rand(N, generator=g))
    logp, p2 = known(-3 * torch.rand(N, generator=g)), known(torch.rand(N, generator=g))
    stats = TokenStats(logp, entropy, known(torch.zeros(N)), p2,
                       known(-torch.rand(N, generator=g)))  # fmt: skip
    batch = TokenBatch(
        torch.zeros(N, dtype=torch.int64), torch.repeat_interleave(torch.arange(B), torch.tensor(lengths)), rewards,
        torch.tensor(draw(st.lists(st.sampled_from([0, 5, -7]), min_size=B, max_size=B))), old_logp=stats.logp, mask=mask,
    )  # fmt: skip
    extras = {
        "tempered_logp": known(-3 * torch.rand(N, generator=g)), "nucleus_entropy": known(torch.rand(N, generator=g)),
        "teacher_logp": known(-3 * torch.rand(N, generator=g)), "answer": torch.rand(N, generator=g) < 0.3,
    }  # fmt: skip
    return batch, stats, extras


@given(st.sampled_from(sorted(METHODS)), steps(), st.floats(0, 1), st.integers(0, 99))
def test_token_weights_of_every_method(
    name: str, given: tuple[TokenBatch, TokenStats, dict[str, Tensor]], progress: float, seed: int
) -> None:
    """Finite; zero where nothing counts; the same with other numbers for the groups and another value where nothing counts."""
    batch, stats, extras = given
    method, valid = METHODS[name], batch.mask
    if method.config.reduction == "fixed_length":
        method = get_method(name, fixed_length=16)
    assert valid is not None
    controller = make_controller(method)
    if controller is not None:
        total, count = observed_entropy(method, batch, stats, extras=extras)
        if count > 0 and total > 0:
            controller.update(total, count)
        elif any(value.isnan() for value in controller.values().values()):
            return  # there is no state before a step with entropy
    how: dict[str, Any] = {"state": controller.values() if controller else {}, "progress": progress, "seed": seed}
    found = weight_tokens(method, batch, stats, extras=extras, **how)
    if method.token_weighting is None:
        assert found is batch
        return
    assert batch.group_ids is not None
    for field in ("advantages", "entropy_coef", "ratio_penalty"):
        value = getattr(found, field)
        assert value is None or (value.isfinite().all() and (value[~valid] == 0).all()), field
    assert found.mask is not None
    assert not (found.mask & ~valid).any()

    def other(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.where(valid, values, 7 if values.is_floating_point() else True)

    again = weight_tokens(
        method, replace(batch, group_ids=batch.group_ids * 11 + 3), TokenStats(*map(other, stats)),
        extras={key: other(value) for key, value in extras.items()}, **how,
    )  # fmt: skip
    torch.testing.assert_close(again.advantages, found.advantages, rtol=0, atol=0)
    assert torch.equal(again.mask, found.mask)


@given(st.lists(st.tuples(st.lists(st.floats(0, 9), min_size=1, max_size=4), st.booleans()), max_size=5))
def test_advantage_weight(micro_batches: list[tuple[list[float], bool]]) -> None:
    """The sums of all micro-batches make one step."""
    weight, whole = AdvantageWeight(), EntropyRatio()
    for _ in range(2):
        kept = [(torch.tensor(values), torch.ones(len(values), dtype=torch.bool) & use) for values, use in micro_batches]
        for values, mask in kept:
            weight.observe(torch.where(mask, values, math.nan), mask)
        total = sum(float(values[mask].double().sum()) for values, mask in kept)
        count = sum(int(mask.sum()) for _, mask in kept)
        if total <= 0:
            return
        assert float(weight.step()) == pytest.approx(float(whole.update(total, count)), rel=1e-5)
