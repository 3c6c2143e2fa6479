"""What finishes a row (csrc/finish.h), over a launch's arguments, against float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from finalize_cases import exact_statistics, make_terms, partial_sums, typed_again
from torch import Tensor

from eapo_kernels.ops.backend import SurrogateTerms
from eapo_kernels.ops.cuda import rows
from eapo_kernels.ops.cuda.launch import Launch
from eapo_kernels.ops.projection import Projection
from eapo_kernels.ops.statistics import RowStatistics
from eapo_kernels.ops.triton.finalize import Finalized
from eapo_kernels.ops.triton.offsets import ScaledExpSums
from eapo_kernels.ops.triton.sums import PartialSums
from eapo_kernels.types import SUMS

pytestmark = [pytest.mark.csrc, pytest.mark.usefixtures("poisoned")]

Run = Callable[[Launch], object]
LOG2E = float(torch.tensor(1.4426950408889634))
"""As the kernels have it, in fp32: of all logits alike, so that its rounding does not matter."""

V = 50


def finalized(run: Run, values: Tensor, terms: SurrogateTerms | None = None) -> Finalized:
    partial = PartialSums(values, entropy=values.shape[0] > 3, second_moments=values.shape[0] > 4)
    launch, final = rows.finalize(partial, terms)
    run(launch)
    return final


def scaled_exp_finalized(
    run: Run,
    z: Tensor,
    targets: Tensor,
    off: Tensor,
    tiles: int,
    terms: SurrogateTerms | None = None,
    scale: float = 1.0,
) -> tuple[Finalized, Tensor]:
    """Sums of E as the product leaves them, from logits [N, V] float64 whose log-probs are expected ``off`` nats too high."""
    z_y = z.gather(1, targets.unsqueeze(1)).squeeze(1)
    y = torch.where(z_y.isinf(), -1e20, z_y / scale).float()
    expected = torch.where(z_y.isinf(), 0.0, z.log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1) + off)
    k = ((torch.where(z_y.isinf(), z.logsumexp(1), z_y) - expected) * LOG2E).float()
    x = z.scatter(1, targets.unsqueeze(1), -math.inf) * LOG2E - k.double().unsqueeze(1)
    e = torch.exp2(x)
    parts = [e, torch.where(e > 0, x * e, 0.0)]
    values = torch.stack([torch.stack([p.sum(1) for p in part.tensor_split(tiles, 1)]) for part in parts]).float()
    n = len(targets)
    sums = ScaledExpSums(torch.stack([k, y]), values, 256, torch.empty(n, dtype=torch.int32), torch.empty(1, dtype=torch.int32))
    launch, final, slopes = rows.scaled_exp_finalize(
        Projection(torch.empty(n, 8), torch.empty(V, 8), logit_scale=scale), sums, terms
    )
    run(launch)
    exact = -scale * torch.exp2(k.double() - (z * (LOG2E * math.log(2))).logsumexp(1) / math.log(2))
    torch.testing.assert_close(slopes[0].double(), exact, rtol=3e-6, atol=0)
    return final, slopes[1]


def random_rows(n: int, vocab: int = V, spread: float = 8.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [n, vocab] of fp32 in float64, and targets."""
    g = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(n, vocab, generator=g)).double(), torch.randint(vocab, (n,), generator=g)


def row_of(z_target: float, z_others: float | Tensor) -> tuple[Tensor, Tensor]:
    """One row whose target is column 3."""
    z = torch.zeros(1, V, dtype=torch.float64) + z_others
    z[0, 3] = z_target
    return z, torch.tensor([3])


@functools.cache
def hard_rows() -> dict[str, tuple[Tensor, Tensor]]:
    noise = torch.randn(V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tiny, even = 1e-7, math.log(V - 1)
    return {
        "p = 1 - 1e-7": row_of(0.0, math.log(tiny) - even),
        "p = 1 - 1e-5": row_of(0.0, math.log(1e-5) - even + 0.1 * noise),
        "p = 1e-30": row_of(math.log(1e-30) + even, 0.1 * noise),
        "another is nearly certain": row_of(-30.0, torch.where(torch.arange(V) == 7, 0.0, -20.0)),
        "target and another": row_of(0.0, torch.where(torch.arange(V) == 7, 0.0, -90.0)),
        "logits of 1e4": row_of(9990.0, (1e4 + 3 * noise).float().double()),
        "logits of -1e4": row_of(-9990.0, (-1e4 + 3 * noise).float().double()),
        "target removed": row_of(-math.inf, noise),
        "all others removed": row_of(2.5, -math.inf),
    }


def check(actual: RowStatistics, exact: RowStatistics, rtol: float = 2e-6, atol: float = 1.5e-6) -> None:
    assert not (actual.logp > 0).any()
    for name in ("logp", "entropy", "lse", "p2", "p2_logp", "varentropy"):
        got = getattr(actual, name)
        if got is not None:
            torch.testing.assert_close(
                got.double(), getattr(exact, name), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
    torch.testing.assert_close(actual.row_max + actual.log_sum, actual.lse, rtol=1e-6, atol=4e-6)
    if actual.entropy is not None:
        torch.testing.assert_close(actual.log_sum - actual.mean_shifted, actual.entropy, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("fields", [3, 4, 7])
@pytest.mark.parametrize("splits", [1, 2, 33, 60])
@pytest.mark.parametrize("n", [1, 31, 100])
def test_merging_ranges_is_summing_at_once(n: int, splits: int, fields: int, run: Run) -> None:
    """Up to more ranges than columns, so that some are empty; and some columns removed."""
    z, targets = random_rows(n)
    z[:, ::7] = torch.where(torch.arange(V)[::7] == targets.unsqueeze(1), z[:, ::7], -math.inf)
    actual = finalized(run, partial_sums(z, targets, splits)[:fields].contiguous()).statistics
    check(actual, exact_statistics(z, targets))
    assert [actual.entropy is None, actual.p2 is None] == [fields == 3, fields < 7]


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("case", hard_rows())
def test_hard_rows(case: str, splits: int, run: Run) -> None:
    z, targets = hard_rows()[case]
    exact = exact_statistics(z, targets)
    actual = finalized(run, partial_sums(z, targets, splits)).statistics
    check(actual, exact)
    if case.startswith("p = 1 - "):  # relative to what is left of certainty
        for name in ("logp", "entropy"):
            torch.testing.assert_close(getattr(actual, name).double(), getattr(exact, name), rtol=3e-6, atol=0)
    if case == "all others removed":
        assert (actual.logp, actual.entropy, actual.p2, actual.varentropy) == (0, 0, 1, 0)


def test_rows_without_a_distribution_or_a_target_are_nan_alone(run: Run) -> None:
    z, targets = random_rows(8)
    values = partial_sums(z, targets, 3)
    right = finalized(run, values).statistics
    values[0, :, 2], values[1, :, 2], values[2:, :, 2] = -math.inf, -math.inf, 0.0  # every column removed
    values[1, 1, 5] = math.nan  # what the kernels write where the target is no token
    spoiled = finalized(run, values).statistics
    bad = torch.zeros(8, dtype=torch.bool)
    bad[[2, 5]] = True
    for name in ("logp", "entropy", "lse", "p2"):
        got = getattr(spoiled, name)
        assert torch.equal(got.isnan(), bad), name
        assert torch.equal(got[~bad], getattr(right, name)[~bad]), name


@pytest.mark.parametrize("off", [0.0, 0.3, 5.0, -5.0, 30.0, -30.0])
@pytest.mark.parametrize(("n", "tiles"), [(1, 1), (33, 7), (100, 41)])
def test_the_e_form_whatever_the_offset(n: int, tiles: int, off: float, run: Run) -> None:
    z, targets = random_rows(n, spread=4.0)
    final, target = scaled_exp_finalized(run, z, targets, torch.full((n,), off, dtype=torch.float64), tiles, scale=0.5)
    exact = exact_statistics(z, targets)
    check(final.statistics, exact, atol=4e-6 if abs(off) < 30 else 1e-5)
    torch.testing.assert_close(target.double(), -0.5 * torch.expm1(exact.logp), rtol=1e-5, atol=0)


@pytest.mark.parametrize("off", [0.0, 25.0, -25.0])
@pytest.mark.parametrize("case", hard_rows())
def test_hard_rows_of_the_e_form(case: str, off: float, run: Run) -> None:
    """The target's entry of the gradient, a (1 - p_y), keeps its relative precision."""
    z, targets = hard_rows()[case]
    exact = exact_statistics(z, targets)
    final, target = scaled_exp_finalized(run, z, targets, torch.tensor([off], dtype=torch.float64), 5)
    check(final.statistics, exact, atol=4e-6)
    left = -torch.expm1(exact.logp)
    torch.testing.assert_close(target.double(), left, rtol=3e-5, atol=0)
    if case.startswith("p = 1 - "):
        for name in ("logp", "entropy"):
            torch.testing.assert_close(getattr(final.statistics, name).double(), getattr(exact, name), rtol=2e-5, atol=0)


def test_compensated_sums_need_no_second_pass(run: Run) -> None:
    """600 tiles, k off by 32 nats: X and c R far exceed their difference. Plain sums would be 5e-6 nats off."""
    z, targets = random_rows(200, 600, spread=0.5)
    for off in (32.0, -32.0):
        final, _ = scaled_exp_finalized(run, z, targets, torch.full((200,), off, dtype=torch.float64), 600)
        torch.testing.assert_close(final.statistics.entropy.double(), exact_statistics(z, targets).entropy, rtol=0, atol=2.5e-6)


def test_a_written_offset_fits_its_log_sum(run: Run) -> None:
    """k below 2^14 bits, k + c above it, where fp32 has half as many numbers: what the sum loses is in ``log_sum``."""
    z, targets = random_rows(100, spread=1.0)
    z = (z + 11358.0).float().double()
    statistics = scaled_exp_finalized(run, z, targets, torch.full((100,), 25.0, dtype=torch.float64), 5)[0].statistics
    lse = (z * (LOG2E * math.log(2))).logsumexp(1)
    torch.testing.assert_close(statistics.row_max.double() + statistics.log_sum.double(), lse, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["ranges", "exponentials"])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("n", [1, 32, 200])
def test_surrogate(n: int, dual_clip: float | None, form: str, run: Run) -> None:
    """Coefficients and totals beside the statistics, rows that do not count left out; and the same statistics as without."""
    z, targets = random_rows(n, spread=1.0)
    noise = 0.3 * torch.randn(n, generator=torch.Generator().manual_seed(2))
    g = torch.Generator().manual_seed(3)
    terms = make_terms(n, "cpu")
    valid = torch.rand(n, generator=g) < 0.8
    valid[0] = True
    old_logp = torch.where(valid, exact_statistics(z, targets).logp.float() + noise, math.nan)
    terms = SurrogateTerms(**{**vars(terms), "dual_clip": dual_clip, "valid": valid, "old_logp": old_logp})
    if form == "ranges":
        values = partial_sums(z, targets, 3)[:4].contiguous()
        plain, final = (finalized(run, values, t) for t in (None, terms))
    else:
        none = torch.zeros(n, dtype=torch.float64)
        plain, final = (scaled_exp_finalized(run, z, targets, none, 3, t)[0] for t in (None, terms))
    assert plain.totals is None
    assert torch.equal(final.statistics.logp, plain.statistics.logp)
    kept = {k: getattr(terms, k)[valid] for k in ("sequence_ids", "old_logp", "scale")}
    expected, gradient = typed_again(
        final.statistics.logp[valid], final.statistics.entropy[valid], SurrogateTerms(**{**vars(terms), **kept})
    )
    (cotangents, sums), coefficient = final.coefficients(), final.coefficient
    assert final.totals.shape == (-(-n // 32), len(SUMS))
    torch.testing.assert_close(sums.double(), expected, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(coefficient[valid].double(), gradient, rtol=3e-6, atol=1e-9)
    assert (coefficient[~valid] == 0).all()
    assert cotangents.logp is coefficient
