"""The finalize kernel: the merge of ranges, and the surrogate against its equation (E10) in
float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from finalize_cases import exact_statistics, make_terms, partial_sums, sums_with_logp, typed_again
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from eapo_kernels.ops.dispatch import Coefficients, RowStatistics, SurrogateTerms
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.ops.triton.online_softmax import PartialSums, finalize
from eapo_kernels.ops.triton.scaled_exp import ScaledExpSums, scaled_exp_finalize
from eapo_kernels.types import SUMS

pytestmark = pytest.mark.usefixtures("poisoned")

LOG2E = float(torch.tensor(1.4426950408889634))
"""log2(e) rounded to fp32 as in the kernels, so that its rounding cancels in the comparison."""


def run(logp: Tensor, terms: SurrogateTerms, splits: int = 3) -> tuple[RowStatistics, Coefficients]:
    launch, final = finalize(sums_with_logp(logp, splits), terms)
    launch()
    return final.statistics(), final.coefficients()


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
    terms = make_terms(n, device)._replace(dual_clip=dual_clip)
    logp = terms.old_logp + 0.5 * torch.randn(n, generator=torch.Generator().manual_seed(1)).to(device)
    logp = logp.clamp(max=-1e-3)
    sums = check(logp, terms)
    if n > 1:
        assert 0 < sums[SUMS.index("clipped")] < n


@pytest.mark.parametrize("clips", [(0.0, 0.0), (0.2, 0.2), (0.9, 5.0)])
def test_on_policy_nothing_is_clipped(clips: tuple[float, float], device: str) -> None:
    """At a ratio of exactly 1 both branches are equal, and the gradient is the unclipped one for
    any bounds."""
    terms = make_terms(200, device)._replace(clip_low=clips[0], clip_high=clips[1])
    logp = terms.old_logp
    terms = terms._replace(old_logp=run(logp, terms)[0].logp)
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
    terms = make_terms(200, device)._replace(clip_low=0.2, clip_high=0.2, positive_weight=torch.ones((), device=device))
    terms = terms._replace(negative_weight=1.0)
    logp = (terms.old_logp + 0.4).clamp(max=-1e-3)
    statistics, (_, sums) = run(logp, terms)
    ratio = (statistics.logp - terms.old_logp).double().exp()
    advantage = terms.advantages.double()[terms.sequence_ids]
    loss = -(terms.scale * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)).sum()
    torch.testing.assert_close(sums[0].double(), loss, rtol=1e-5, atol=1e-7)


def test_far_ratios_are_finite_and_flat(device: str) -> None:
    """Beyond 60 nats the ratio is clamped and its gradient is zero."""
    terms = make_terms(4, device)
    terms = terms._replace(old_logp=torch.tensor([-100.0, -0.1, -61.0, -0.5], device=device))
    logp = torch.tensor([-0.1, -80.0, -0.5, -0.6], device=device)
    _, (cotangents, sums) = run(logp, terms)
    assert sums.isfinite().all()
    assert (cotangents.logp[:3] == 0).all()
    check(logp, terms, rtol=5e-6)  # a GPU computes e^60 as 2^(60 log2 e), whose exponent is rounded: 60 * 2^-24 and 2 ulp


def test_tie_with_the_threshold_is_not_positive(device: str) -> None:
    terms = make_terms(3, device)
    terms = terms._replace(sequence_ids=torch.tensor([0, 6, 1], device=device))  # above, at and below their thresholds
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
    expected = run(logp[valid], terms._replace(**{k: getattr(terms, k)[valid] for k in per_token}))[1]
    spoiled = terms._replace(old_logp=torch.where(valid, terms.old_logp, math.nan), valid=valid)
    _, (cotangents, sums) = run(logp, spoiled)
    torch.testing.assert_close(sums, expected.sums)
    assert torch.equal(cotangents.logp[valid], expected.cotangents.logp)
    assert (cotangents.logp[~valid] == 0).all()


def test_run_to_run_bitwise_and_strided_terms(device: str) -> None:
    terms = make_terms(3000, device)
    logp = (terms.old_logp + 0.2).clamp(max=-1e-3)
    spread = terms._replace(
        old_logp=terms.old_logp.repeat_interleave(2)[::2], advantages=terms.advantages.repeat_interleave(3)[::3]
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
    full = exact_statistics(z, target)
    values = partial_sums(z, target, splits)
    launch, final = finalize(PartialSums(values.to(device), entropy=True, second_moments=True))
    launch()
    for name, got in final.statistics()._asdict().items():
        exact = getattr(full, name)
        floor = 1e-3 if name == "lse" else 2e-6  # lse is stored in fp32 next to 1e4
        torch.testing.assert_close(got.double().cpu(), exact, rtol=3e-6, atol=floor, msg=lambda m, n=name: f"{n}: {m}")


def row_of(z_target: float, z_others: float | Tensor) -> tuple[Tensor, Tensor]:
    """Logits [1, 50] float64 and the target, column 3."""
    z = torch.zeros(1, 50, dtype=torch.float64) + z_others
    z[0, 3] = z_target
    return z, torch.tensor([3])


@functools.cache
def hard_rows() -> dict[str, tuple[Tensor, Tensor]]:
    """Rows in which differences of large numbers would lose the result."""
    noise = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tiny, even = 1e-7, math.log(49)
    other = torch.arange(50) == 7
    return {
        "p = 1 - 1e-7": row_of(0.0, math.log(tiny) - even),
        "p = 1 - 1e-5": row_of(0.0, math.log(1e-5) - even + 0.1 * noise),
        "p = 1e-30": row_of(math.log(1e-30) + even, 0.1 * noise),
        "another column is nearly certain": row_of(-30.0, torch.where(other, 0.0, -20.0)),
        "target and one other column": row_of(0.0, torch.where(other, 0.0, -90.0)),
        "logits of 1e4": row_of(9990.0, (1e4 + 3 * noise).float().double()),
        "logits of -1e4": row_of(-9990.0, (-1e4 + 3 * noise).float().double()),
        "target -inf": row_of(-math.inf, noise),
        "all other columns -inf": row_of(2.5, -math.inf),
    }


def check_statistics(actual: RowStatistics, exact: RowStatistics, rtol: float = 2e-6, atol: float = 1.5e-6) -> None:
    assert actual.entropy is not None
    assert actual.mean_shifted is not None
    assert not (actual.logp > 0).any()
    for name in ("logp", "entropy", "lse", "p2", "p2_logp", "varentropy"):
        got = getattr(actual, name)
        if got is not None:
            expected = getattr(exact, name)
            torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(actual.row_offset + actual.log_sum, actual.lse, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(actual.log_sum - actual.mean_shifted, actual.entropy, rtol=1e-6, atol=4e-6)


def on_cpu(statistics: RowStatistics) -> RowStatistics:
    return RowStatistics(*(None if value is None else value.cpu() for value in statistics))


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("case", hard_rows())
def test_hard_rows(case: str, splits: int, device: str) -> None:
    z, targets = hard_rows()[case]
    exact = exact_statistics(z, targets)
    values = partial_sums(z, targets, splits).to(device)
    launch, final = finalize(PartialSums(values, entropy=True, second_moments=True))
    launch()
    actual = on_cpu(final.statistics())
    check_statistics(actual, exact)
    if case.startswith("p = 1 - "):  # relative to 1 - p
        for name in ("logp", "entropy"):
            torch.testing.assert_close(getattr(actual, name).double(), getattr(exact, name), rtol=3e-6, atol=0)
    if case == "all other columns -inf":
        assert (actual.logp, actual.entropy, actual.p2, actual.varentropy) == (0, 0, 1, 0)


@pytest.fixture
def fused_fma(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the interpreter round ``tl.fma`` once, as the hardware does, instead of after the product as well."""

    def create_fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        result = x.data.astype("float64") * y.data + z.data
        return TensorHandle(result.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)


def scaled_exp_finalized(
    z: Tensor, targets: Tensor, guess_error: float, n_tiles: int, device: str, scale: float = 1.0
) -> tuple[RowStatistics, Tensor]:
    """Statistics and target entries of the gradient from logits [N, V] float64.

    The sums are those that ``scaled_exp_gemm`` leaves, with offsets from a guess of logp that is ``guess_error`` nats too
    high. Checks the row factors as well.
    """
    n, vocab = z.shape
    z_y = z.gather(1, targets.unsqueeze(1)).squeeze(1)
    y = torch.where(z_y.isinf(), -1e20, z_y / scale).float()
    logp = z.log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
    k = (torch.where(z_y.isinf(), z.logsumexp(1), z_y - logp - guess_error) * LOG2E).float()
    x = z.scatter(1, targets.unsqueeze(1), -math.inf) * LOG2E - k.double().unsqueeze(1)
    e = torch.exp2(x)
    parts = [e, torch.where(e > 0, x * e, 0.0)]
    values = torch.stack([torch.stack([p.sum(1) for p in part.tensor_split(n_tiles, 1)]) for part in parts]).float()
    rescue_ids, n_rescue = (torch.zeros(size, dtype=torch.int32, device=device) for size in (n, 1))
    sums = ScaledExpSums(torch.stack([k, y]).to(device), values.to(device), 256, rescue_ids, n_rescue)
    hidden, weight = torch.zeros(n, 8, device=device), torch.zeros(vocab, 8, device=device)
    launch, final, slopes = scaled_exp_finalize(Projection(hidden, weight, logit_scale=scale), sums)
    launch()
    factor, target = slopes.cpu()
    exact = -scale * torch.exp2(k.double() - (z * (LOG2E * math.log(2))).logsumexp(1) / math.log(2))
    torch.testing.assert_close(factor.double(), exact, rtol=3e-6, atol=0)
    return on_cpu(final.statistics()), target


@pytest.mark.usefixtures("fused_fma")
@pytest.mark.parametrize("guess_error", [0.0, 25.0, -25.0])
@pytest.mark.parametrize("case", hard_rows())
def test_hard_rows_of_the_scaled_exponential_form(case: str, guess_error: float, device: str) -> None:
    """The target's entry of the gradient, a (1 - p_y), keeps its relative precision."""
    z, targets = hard_rows()[case]
    exact = exact_statistics(z, targets)
    actual, target = scaled_exp_finalized(z, targets, guess_error, 5, device)
    check_statistics(actual, exact, atol=4e-6)
    torch.testing.assert_close(target.double(), -torch.expm1(exact.logp), rtol=3e-5, atol=0)
    if case.startswith("p = 1 - "):
        for name in ("logp", "entropy"):
            torch.testing.assert_close(getattr(actual, name).double(), getattr(exact, name), rtol=2e-5, atol=0)


@pytest.mark.usefixtures("fused_fma")
@pytest.mark.parametrize("guess_error", [0.0, 0.3, 5.0, -5.0, 30.0, -30.0])
@pytest.mark.parametrize(("n", "n_tiles"), [(1, 1), (33, 7), (100, 41)])
def test_the_scaled_exponential_form_with_any_offset(n: int, n_tiles: int, guess_error: float, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    z, targets = (4 * torch.randn(n, 50, generator=g)).double(), torch.randint(50, (n,), generator=g)
    actual, target = scaled_exp_finalized(z, targets, guess_error, n_tiles, device, scale=0.5)
    exact = exact_statistics(z, targets)
    check_statistics(actual, exact, atol=4e-6 if abs(guess_error) < 30 else 1e-5)
    torch.testing.assert_close(target.double(), -0.5 * torch.expm1(exact.logp), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("fused_fma")
def test_compensated_sums_need_no_second_pass(device: str) -> None:
    """600 tiles and offsets 32 nats off: X and c R far exceed their difference. Plain sums would be 5e-6 nats off."""
    g = torch.Generator().manual_seed(0)
    z, targets = (0.5 * torch.randn(200, 600, generator=g)).double(), torch.randint(600, (200,), generator=g)
    for guess_error in (32.0, -32.0):
        actual, _ = scaled_exp_finalized(z, targets, guess_error, 600, device)
        assert actual.entropy is not None
        torch.testing.assert_close(actual.entropy.double(), exact_statistics(z, targets).entropy, rtol=0, atol=2.5e-6)
