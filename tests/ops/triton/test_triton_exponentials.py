"""The scaled-exponential kernels: statistics and logit gradient of a chunk against the float64
oracle."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import dense, projection
from exponential_rows import check, floor, oracle, out_of_range, run

from eapo_kernels.ops.dispatch import Entries, LogitCotangents, LogitGradient
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.ops.triton import logit_grad, scaled_exp
from eapo_kernels.ops.triton.scaled_exp import ScaledExpChunk
from eapo_kernels.ops.triton.tiles import Tile
from eapo_kernels.testing import Inputs, assert_no_worse_than, eager_token_stats, make_inputs

pytestmark = [
    pytest.mark.usefixtures("poisoned", "narrow_fp16"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's, about overflow and infinities
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8, 1), (1, 72, 257), (63, 7, 1031), (200, 64, 257), (5, 72, 50257)]
SWITCHES = [(peaked, bias, with_guess) for peaked in (True, False) for bias in (False, True) for with_guess in (True, False)]
"""(peaked, bias, with_guess): all combinations at one shape, each value once or twice at the
others."""

CASES = [
    (shape, *switches)
    for shape in SHAPES
    for switches in (SWITCHES if shape == (63, 7, 1031) else [(True, False, False), (False, True, True)])
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "peaked", "bias", "with_guess"), CASES, ids=str)
def test_matches_the_oracle(
    shape: tuple[int, int, int], dtype: torch.dtype, peaked: bool, bias: bool, with_guess: bool, device: str
) -> None:
    inputs = make_inputs(*shape, dtype=dtype, peaked=peaked, bias=bias, device=device)
    p = projection(inputs)
    noise = 0.3 * torch.randn(shape[0], generator=torch.Generator().manual_seed(5)).to(device)
    logp_guess = oracle(p, inputs.targets)[0].logp.float() + noise if with_guess else None
    rescued = check(p, inputs.targets, logp_guess)
    assert rescued == int(out_of_range(p, inputs.targets, logp_guess).sum())
    assert rescued == 0 or (dtype == torch.float16 and not with_guess), (
        "targets are drawn at random, some 2^15 times less likely"
    )


@pytest.mark.parametrize("off", [5.0, -5.0, 30.0, -30.0, 60.0, -200.0, 3e38, -3e38])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_guess_changes_nothing(off: float, dtype: torch.dtype, device: str) -> None:
    """Rows whose guess is off by more than 33 nats (5.5 in fp16) are recomputed with their
    maximum."""
    inputs = make_inputs(63, 72, 1031, dtype=dtype, bias=True, device=device)
    p = projection(inputs)
    logp_guess = oracle(p, inputs.targets)[0].logp.float() + off
    assert check(p, inputs.targets, logp_guess) == (0 if abs(off) < (5.5 if dtype == torch.float16 else 33) else 63)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_guess_that_is_not_finite_is_none(dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(63, 72, 1031, dtype=dtype, device=device)
    p = projection(inputs)
    expected = run(p, inputs.targets, None)
    for value in (math.nan, math.inf, -math.inf):
        stats, matrix, rescued = run(p, inputs.targets, torch.full((63,), value, device=device))
        assert rescued == expected[2]
        assert torch.equal(stats.logp, expected[0].logp)
        assert torch.equal(stats.entropy, expected[0].entropy)
        assert torch.equal(matrix, expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_rows_out_of_range_are_rescued(dtype: torch.dtype, device: str) -> None:
    """Rows in range have the same bits whether or not other rows of the chunk are rescued."""
    inputs = make_inputs(200, 24, 515, dtype=dtype, device=device)
    p = projection(inputs)
    logp_guess = oracle(p, inputs.targets)[0].logp.float()
    good = run(p, inputs.targets, logp_guess)
    bad = torch.zeros(200, dtype=torch.bool, device=device)
    bad[torch.tensor([0, 3, 64, 65, 127, 199])] = True
    assert check(p, inputs.targets, torch.where(bad, logp_guess - 300.0, logp_guess)) == 6
    stats, matrix, _ = run(p, inputs.targets, torch.where(bad, logp_guess - 300.0, logp_guess))
    for name in ("logp", "entropy", "lse"):
        assert torch.equal(getattr(stats, name)[~bad], getattr(good[0], name)[~bad]), name
    assert torch.equal(matrix[~bad], good[1][~bad])


@pytest.mark.parametrize(
    "transform", [{"logit_scale": 0.3}, {"inv_temperature": 1 / 0.7}, {"row_inv_temperature": "rows"}], ids=str
)
@pytest.mark.parametrize("off", [0.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logit_transforms(transform: dict[str, Any], off: float, dtype: torch.dtype, device: str) -> None:
    rows = 0.5 + torch.rand(63, generator=torch.Generator().manual_seed(1)).to(device)
    inputs = make_inputs(63, 72, 1031, dtype=dtype, bias=True, device=device)
    p = projection(inputs, **{k: rows if v == "rows" else v for k, v in transform.items()})
    check(p, inputs.targets, oracle(p, inputs.targets)[0].logp.float() + off)


@pytest.mark.parametrize("off", [None, 0.0, 10.0, -10.0, 70.0])
def test_confident_tokens_keep_their_relative_precision(off: float | None, device: str) -> None:
    """1 - p_y from 1e-1 to 1e-12: logp, entropy and the target's gradient have relative errors
    below 1e-5."""
    gaps = torch.linspace(2.0, 27.0, 40, dtype=torch.float64)
    z = torch.stack([torch.zeros_like(gaps), -gaps, -gaps - 0.5], 1)
    p = Projection(z.float().to(device), torch.eye(3, device=device))
    targets = torch.zeros(40, dtype=torch.int64, device=device)
    exact = torch.log_softmax(p.hidden.double(), 1)
    logp_guess = None if off is None else exact[:, 0].float() + off
    stats, gradient, _ = run(p, targets, logp_guess)
    torch.testing.assert_close(stats.logp.double(), -torch.log1p(p.hidden[:, 1:].double().exp().sum(1)), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(stats.entropy.double(), -(exact.exp() * exact).sum(1), rtol=2e-5, atol=0.0)
    torch.testing.assert_close(gradient[:, 0], exact[:, 1:].exp().sum(1), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("off", [None, 0.0, 100.0])
@pytest.mark.parametrize("magnitude", [1e4, 1e-4])
def test_extreme_logits(magnitude: float, off: float | None, device: str) -> None:
    """Logits near +-1e4 (one-hot rows) and all equal."""
    inputs = make_inputs(40, 16, 99, device=device)
    inputs = Inputs(inputs.hidden * magnitude / 10, inputs.weight, inputs.targets)
    p = projection(inputs)
    ref64, exact = oracle(p, inputs.targets)
    eager = eager_token_stats(p.hidden, p.weight, inputs.targets)
    stats, gradient, _ = run(p, inputs.targets, None if off is None else ref64.logp.float() + off)
    for name in ("logp", "entropy"):
        got, plain, exact_value = (getattr(s, name).double() for s in (stats, eager, ref64))
        allowed = 2 * (plain - exact_value).abs().max() + 2e-6 * exact_value.abs().max().clamp_min(0.1)
        assert (got - exact_value).abs().max() <= allowed, name
    eager_gradient = torch.nn.functional.one_hot(inputs.targets, 99) - torch.softmax(p.hidden @ p.weight.T, 1)
    assert_no_worse_than(gradient, eager_gradient, exact, floor=1e-5, name="gradient")


@pytest.mark.parametrize("off", [None, 0.0, 100.0])
def test_removed_columns(off: float | None, device: str) -> None:
    """-inf in the bias: single columns, whole tiles, and a target, whose log-prob is -inf while its
    row stays finite."""
    inputs = make_inputs(20, 16, 4200, bias=True, device=device)
    bias = inputs.bias.clone()
    bias[2048:4096] = -math.inf
    bias[::7] = -math.inf
    targets = torch.where(bias[inputs.targets].isinf(), 1, inputs.targets)
    targets[4] = 7
    p = projection(replace(inputs, bias=bias, targets=targets))
    z = p.hidden.double() @ p.weight.double().T + bias.double()
    log_p = torch.log_softmax(z, 1)
    logp = log_p.gather(1, targets[:, None]).squeeze(1)
    logp_guess = None if off is None else logp.float() + off
    stats, gradient, rescued = run(p, targets, logp_guess)
    assert rescued == (20 if off == 100.0 else 1)
    assert stats.logp[4] == -math.inf
    torch.testing.assert_close(stats.logp.double(), logp, rtol=1e-5, atol=1e-5)
    entropy = -torch.where(log_p > -math.inf, log_p.exp() * log_p, 0.0).sum(1)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    exact = torch.nn.functional.one_hot(targets, 4200) - log_p.exp()
    assert_no_worse_than(gradient, exact, exact, floor=1e-5, name="gradient")
    assert (gradient[:, bias == -math.inf][torch.arange(20) != 4] == 0).all()


def test_a_row_without_any_column_is_nan_and_alone(device: str) -> None:
    inputs = make_inputs(4, 16, 99, device=device)
    p = projection(replace(inputs, bias=torch.full((99,), -math.inf, device=device)))
    stats, _, rescued = run(p, inputs.targets, None)
    assert rescued == 4
    assert stats.logp.isnan().all()
    hidden = inputs.hidden.clone()
    hidden[2] = math.nan
    stats, matrix, rescued = run(projection(replace(inputs, hidden=hidden)), inputs.targets, None)
    assert rescued == 1
    assert stats.logp.isnan().tolist() == [False, False, True, False]
    assert matrix[torch.tensor([0, 1, 3])].isfinite().all()


def test_strided_inputs(device: str) -> None:
    """Strided hidden and weight, and a matrix column as the bias, give the results of contiguous
    copies."""
    inputs = make_inputs(63, 72, 1031, dtype=torch.bfloat16, bias=True, device=device)
    strided = Projection(
        inputs.hidden.repeat_interleave(2, 1)[:, ::2],
        inputs.weight.t().contiguous().t(),
        torch.stack([inputs.bias, inputs.bias], 1)[:, 0],
    )
    targets = torch.stack([inputs.targets, inputs.targets], 1)[:, 0]
    logp_guess = torch.full((63, 2), -3.0, device=device)[:, 0]
    plain, matrix, _ = run(projection(inputs), inputs.targets, logp_guess)
    stats, other, _ = run(strided, targets, logp_guess)
    torch.testing.assert_close(stats.logp, plain.logp, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(stats.entropy, plain.entropy, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(other, matrix, rtol=4e-6 + 2 * floor(strided), atol=1e-6)


TILES = [
    Tile(16, 128, 16, descriptors=True, slices=4, stores=True),
    Tile(64, 64, 32, descriptors=True, slices=2, group_n=2, persistent=True, stores=True),
    Tile(32, 256, 16, slices=8, group_n=1, persistent=True),
    Tile(128, 128, 64, warps=8, slices=1),
]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "off"),
    [(torch.float32, 100.0), (torch.bfloat16, 0.0), (torch.bfloat16, 100.0), (torch.float16, 100.0)],
    ids=str,
)
def test_tiles_change_only_the_rounding(tile: Tile, off: float, dtype: torch.dtype, device: str) -> None:
    """Tiles that extend behind the last row and column, targets at tile borders, E in the operands'
    dtype."""
    inputs = make_inputs(40, 40, 259, dtype=dtype, bias=True, device=device)
    targets = inputs.targets.clone()
    targets[:8] = torch.tensor([0, 63, 64, 127, 128, 255, 256, 258], device=device)
    p = projection(inputs)
    ref64, exact = oracle(p, targets)
    sums = scaled_exp.ScaledExpSums.empty(p, True, tile=tile)
    matrix = logit_grad.workspace(p, dtype)
    scaled_exp.row_offsets(p, targets, ref64.logp.float() + off, sums, tile=Tile(8, 0, 16))()
    scaled_exp.scaled_exp_gemm(p, targets, sums, matrix, tile=tile)()
    scaled_exp.collect_rescue_ids(p, sums, tile=Tile(8, 4))()
    assert int(sums.n_rescue) == (40 if off else 0)
    scaled_exp.row_maxima(p, sums, tile=Tile(16, 64, 16))()
    scaled_exp.scaled_exp_gemm(p, targets, sums, matrix, rescue_ids=True, tile=Tile(16, tile.block_v, 16, slices=2))()
    launch, final, slopes = scaled_exp.scaled_exp_finalize(p, sums, tile=Tile(16, 2))
    launch()
    torch.testing.assert_close(final.statistics().logp.double(), ref64.logp, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(final.statistics().entropy.double(), ref64.entropy, rtol=1e-6, atol=1e-5)
    unit = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    least = 2**-25 * slopes[0].double().abs()[:, None] if dtype == torch.float16 else 0.0
    got = dense(LogitGradient(matrix, slopes[0], Entries.one_a_row(targets, slopes[1])))
    assert ((got - exact).abs() <= (unit * exact.abs() + least) * 1.02 + 1e-12).all(), "E is rounded to nearest, once"


@pytest.mark.parametrize("off", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bitwise_reproducible(off: float, dtype: torch.dtype, device: str) -> None:
    """Also with rescued rows, although the order of ``rescue_ids`` is undefined."""
    inputs = make_inputs(150, 24, 1301, dtype=dtype, device=device)
    p = projection(inputs)
    logp_guess = oracle(p, inputs.targets)[0].logp.float()
    logp_guess = torch.where(torch.arange(150, device=device) % 3 == 0, logp_guess + off, logp_guess)
    first, second = run(p, inputs.targets, logp_guess), run(p, inputs.targets, logp_guess)
    assert torch.equal(first[1], second[1])
    for a, b in zip(first[0], second[0], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_shift_of_all_logits_changes_nothing(device: str) -> None:
    """A constant added to the bias changes lse by itself, and no other result."""
    inputs = make_inputs(63, 16, 257, device=device, bias=True)
    p = projection(inputs)
    moved = replace(p, bias=p.bias + 8.0)
    logp_guess = oracle(p, inputs.targets)[0].logp.float()
    (stats, gradient, _), (other, other_gradient, _) = (
        run(p, inputs.targets, logp_guess),
        run(moved, inputs.targets, logp_guess),
    )
    torch.testing.assert_close(stats.logp, other.logp, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(stats.entropy, other.entropy, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(other.lse - stats.lse, torch.full_like(stats.lse, 8.0), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(gradient, other_gradient, rtol=2e-5, atol=1e-8)
    assert ((stats.entropy >= 0) & (stats.entropy <= math.log(257) + 1e-6)).all()


def test_without_entropy(device: str) -> None:
    inputs = make_inputs(20, 16, 99, device=device)
    chunk = ScaledExpChunk(projection(inputs), inputs.targets, None, entropy=False)
    stats = chunk.statistics()
    assert stats.entropy is None
    assert stats.mean_shifted is None
    torch.testing.assert_close(stats.logp, run(projection(inputs), inputs.targets, None)[0].logp)


def test_a_chunk_gives_its_gradient_once_and_only_for_logp(device: str) -> None:
    inputs = make_inputs(5, 16, 99, device=device)
    one = torch.ones(5, device=device)
    chunk = ScaledExpChunk(projection(inputs), inputs.targets, None, entropy=True)
    with pytest.raises(AssertionError):
        chunk.gradient(LogitCotangents(one, one))
    gradient = chunk.gradient(LogitCotangents(one))  # without statistics before it
    exact = oracle(projection(inputs), inputs.targets)[1]
    assert_no_worse_than(dense(gradient), exact, exact, floor=1e-5)
    with pytest.raises(AssertionError, match="one call per chunk"):
        chunk.gradient(LogitCotangents(one))
