"""The finalize kernel: the merge of ranges, and the surrogate against its equation (E10) in
float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from finalize_cases import exact_statistics, make_terms, partial_sums, sums_with_logp, typed_again
from torch import Tensor

from eapo_kernels.ops.dispatch import Coefficients, RowStatistics, SurrogateTerms
from eapo_kernels.ops.triton.online_softmax import PartialSums, finalize
from eapo_kernels.types import SUMS

pytestmark = pytest.mark.usefixtures("poisoned")


def run(logp: Tensor, terms: SurrogateTerms, splits: int = 3) -> tuple[RowStatistics, Coefficients]:
    launch, final = finalize(sums_with_logp(logp, splits), terms)
    launch()
    return final.statistics, final.coefficients()


def check(logp: Tensor, terms: SurrogateTerms, rtol: float = 2e-6) -> Tensor:
    statistics, (cotangents, sums) = run(logp, terms)
    torch.testing.assert_close(statistics.logp, logp, rtol=1e-6, atol=1e-7)
    expected, gradient = typed_again(statistics.logp, statistics.entropy, terms)
    assert sums.shape == (len(SUMS),)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected, rtol=rtol, atol=1e-6)
    torch.testing.assert_close(cotangents.logp.double(), gradient, rtol=rtol, atol=1e-9)
    assert cotangents.entropy is None
    assert cotangents.lse is None
    return sums


@pytest.mark.parametrize("n", [1, 63, 200, 2500])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_surrogate(n: int, dual_clip: float | None, device: str) -> None:
    terms = replace(make_terms(n, device), dual_clip=dual_clip)
    logp = terms.old_logp + 0.5 * torch.randn(n, generator=torch.Generator().manual_seed(1)).to(device)
    logp = logp.clamp(max=-1e-3)
    sums = check(logp, terms)
    if n > 1:
        assert 0 < sums[SUMS.index("clipped")] < n


@pytest.mark.parametrize("clips", [(0.0, 0.0), (0.2, 0.2), (0.9, 5.0)])
def test_on_policy_nothing_is_clipped(clips: tuple[float, float], device: str) -> None:
    """At a ratio of exactly 1 both branches are equal, and the gradient is the unclipped one for
    any bounds."""
    terms = replace(make_terms(200, device), clip_low=clips[0], clip_high=clips[1])
    logp = terms.old_logp
    terms = replace(terms, old_logp=run(logp, terms)[0].logp)
    _, (cotangents, sums) = run(logp, terms)
    i = terms.sequence_ids
    w = torch.where(terms.rewards[i] > terms.thresholds[i], terms.positive_weight, terms.negative_weight)
    torch.testing.assert_close(cotangents.logp, -terms.scale * w * terms.advantages[i])
    named = dict(zip(SUMS, sums.tolist(), strict=True))
    assert named["ratio"] == 200
    assert named["clipped"] == 0
    assert named["old_kl"] == 0
    assert named["kl"] == 0


def test_equal_bounds_are_the_symmetric_clip(device: str) -> None:
    terms = replace(make_terms(200, device), clip_low=0.2, clip_high=0.2, positive_weight=torch.ones((), device=device))
    terms = replace(terms, negative_weight=1.0)
    logp = (terms.old_logp + 0.4).clamp(max=-1e-3)
    statistics, (_, sums) = run(logp, terms)
    ratio = (statistics.logp - terms.old_logp).double().exp()
    advantage = terms.advantages.double()[terms.sequence_ids]
    loss = -(terms.scale * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)).sum()
    torch.testing.assert_close(sums[0].double(), loss, rtol=1e-5, atol=1e-7)


def test_far_ratios_are_finite_and_flat(device: str) -> None:
    """Beyond 60 nats the ratio is clamped and its gradient is zero."""
    terms = make_terms(4, device)
    terms = replace(terms, old_logp=torch.tensor([-100.0, -0.1, -61.0, -0.5], device=device))
    logp = torch.tensor([-0.1, -80.0, -0.5, -0.6], device=device)
    _, (cotangents, sums) = run(logp, terms)
    assert sums.isfinite().all()
    assert (cotangents.logp[:3] == 0).all()
    check(logp, terms, rtol=5e-6)  # a GPU computes e^60 as 2^(60 log2 e), whose exponent is rounded: 60 * 2^-24 and 2 ulp


def test_tie_with_the_threshold_is_not_positive(device: str) -> None:
    terms = make_terms(3, device)
    terms = replace(terms, sequence_ids=torch.tensor([0, 6, 1], device=device))  # above, at and below their thresholds
    _, (cotangents, _) = run(terms.old_logp, terms)
    ratio = (run(terms.old_logp, terms)[0].logp - terms.old_logp).exp()
    weights = -cotangents.logp / (terms.scale * terms.advantages[terms.sequence_ids] * ratio)
    torch.testing.assert_close(weights, torch.tensor([0.6, 1.25, 1.25], device=device))


def test_rows_that_do_not_count(device: str) -> None:
    """Invalid rows add to no sum and get a zero coefficient, whatever their statistics."""
    terms = make_terms(300, device)
    logp = (terms.old_logp + 0.1).clamp(max=-1e-3)
    valid = torch.arange(300, device=device) % 3 != 1
    per_token = ("sequence_ids", "old_logp", "scale")
    expected = run(logp[valid], replace(terms, **{k: getattr(terms, k)[valid] for k in per_token}))[1]
    spoiled = replace(terms, old_logp=torch.where(valid, terms.old_logp, math.nan), valid=valid)
    _, (cotangents, sums) = run(logp, spoiled)
    torch.testing.assert_close(sums, expected.sums)
    assert torch.equal(cotangents.logp[valid], expected.cotangents.logp)
    assert (cotangents.logp[~valid] == 0).all()


def test_run_to_run_bitwise_and_strided_terms(device: str) -> None:
    terms = make_terms(3000, device)
    logp = (terms.old_logp + 0.2).clamp(max=-1e-3)
    spread = replace(
        terms, old_logp=terms.old_logp.repeat_interleave(2)[::2], advantages=terms.advantages.repeat_interleave(3)[::3]
    )
    first, second = run(logp, terms)[1], run(logp, spread)[1]
    assert torch.equal(first.sums, second.sums)
    assert torch.equal(first.cotangents.logp, second.cotangents.logp)


@pytest.mark.parametrize("splits", [1, 2, 17])
def test_merging_ranges_is_summing_at_once(splits: int, device: str) -> None:
    """Random logits split into ranges, one of them empty, against float64 statistics of the whole
    vocabulary."""
    n, v = 300, 170
    g = torch.Generator().manual_seed(splits)
    z = 8 * torch.randn(n, v, generator=g, dtype=torch.float64)
    z[::5] += 1e4
    z = z.float().double()
    target = torch.randint(v, (n,), generator=g)
    columns = torch.arange(v)
    z[(columns < 10) & (columns != target.unsqueeze(1))] = -math.inf
    whole = exact_statistics(z, target)
    values = partial_sums(z, target, splits)
    launch, final = finalize(PartialSums(values.to(device), entropy=True, second_moments=True))
    launch()
    for name, got in final.statistics._asdict().items():
        exact = getattr(whole, name)
        floor = 1e-3 if name == "lse" else 2e-6  # lse is stored in fp32 next to 1e4
        torch.testing.assert_close(got.double().cpu(), exact, rtol=3e-6, atol=floor, msg=lambda m, n=name: f"{n}: {m}")
