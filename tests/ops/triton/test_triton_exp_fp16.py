"""Scaled exponentials in fp16, whose largest number is 65504: rescued rows, rounding, and scaled
losses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import dense, policy_batch, projection
from exponential_rows import oracle, out_of_range, run
from torch import Tensor

from eapo_kernels import Options, TokenBatch, eapo_loss, token_stats
from eapo_kernels.ops import gemm
from eapo_kernels.ops.dispatch import LogitCotangents
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.ops.triton.scaled_exp import ScaledExpChunk, window
from eapo_kernels.testing import Inputs, make_inputs

pytestmark = [
    pytest.mark.usefixtures("poisoned", "narrow_fp16"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's, about overflow before rows are rescued
]

SCALES = (1.0, 1e4, 65536.0)
LIMITS = window(torch.float16)


def rows_of_logits(z: Tensor, device: str) -> Projection:
    """Operands whose product is the given logits [N, V], exactly."""
    return Projection(z.half().to(device), torch.eye(z.shape[1], dtype=torch.float16, device=device))


def gap(e: float) -> float:
    """Nats by which a logit exceeds the target's if its E is ``e`` without a logp_guess."""
    return math.log(e) - LIMITS.without_guess * math.log(2)


@pytest.mark.parametrize("others", [1, 7])
def test_the_upper_edge_is_the_largest_fp16_number(others: int, device: str) -> None:
    """A row whose tile sums to more than 65504 is rescued; E is finite below, above and far above
    that sum."""
    edge = gap(65504 / others)
    above = torch.cat([edge + torch.linspace(-0.05, 0.05, 24), torch.tensor([11.5, 20.0, 80.0, 1000.0, 3e4])])
    z = torch.zeros(len(above), 1 + others)
    z[:, 1:] = above[:, None]
    p = rows_of_logits(z, device)
    targets = torch.zeros(len(z), dtype=torch.int64, device=device)
    expected = out_of_range(p, targets, None)
    assert 5 < int(expected.sum()) < len(z) - 5
    chunk = ScaledExpChunk(p, targets, None, entropy=True)
    rescue_ids = chunk.sums.rescue_ids[: int(chunk.sums.n_rescue)]
    assert sorted(rescue_ids.tolist()) == expected.nonzero().squeeze(1).tolist()
    ref64, exact = oracle(p, targets)
    stats = chunk.statistics()
    torch.testing.assert_close(stats.logp.double(), ref64.logp, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(stats.entropy.double(), ref64.entropy, rtol=2e-6, atol=2e-6)
    gradient = chunk.gradient(LogitCotangents(torch.ones_like(stats.logp)))
    assert gradient.matrix.isfinite().all()
    torch.testing.assert_close(dense(gradient), exact, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("off", [-6.0, -5.0, 5.0, 6.0])
def test_a_guess_may_be_off_by_the_window(off: float, device: str) -> None:
    """5.5 nats either way; rescued rows are not checked a second time, whatever their sum."""
    inputs = make_inputs(64, 24, 2000, dtype=torch.float16, peaked=False, device=device)
    p = projection(inputs)
    ref64, exact = oracle(p, inputs.targets)
    stats, got, rescued = run(p, inputs.targets, ref64.logp.float() + off)
    assert rescued == (64 if abs(off) > 5.5 else 0)
    torch.testing.assert_close(stats.logp.double(), ref64.logp, rtol=1e-6, atol=4e-6)
    error = (got - exact).norm(dim=1) / exact.norm(dim=1)
    assert (error < 2e-5).all()  # near uniform: the unrounded entry of the target is far larger than the others


def test_flat_rows_are_not_rescued(device: str) -> None:
    """A row may sum to far more than 65504 if none of its tiles does: an untrained model without a
    logp_guess."""
    inputs = make_inputs(5, 16, 50_257, dtype=torch.float16, peaked=False, device=device)
    stats, got, rescued = run(projection(inputs), inputs.targets, None)
    assert rescued == 0
    exact = oracle(projection(inputs), inputs.targets)[1]
    assert ((got - exact).norm(dim=1) < 2e-5 * exact.norm(dim=1)).all()
    assert stats.logp.isfinite().all()


@pytest.mark.parametrize("with_guess", [True, False], ids=["logp_guess", "no_guess"])
@pytest.mark.parametrize("probability", [1 - 1e-4, 0.9, 0.5, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("peaked", [True, False], ids=["peaked", "flat"])
def test_rounding_whatever_the_targets_probability(probability: float, peaked: bool, with_guess: bool, device: str) -> None:
    """Row errors are at most 1.3 times those of exact logit gradients rounded once to fp16, or
    2^-11 of the row's norm."""
    n, v = 24, 2304
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(n, v, generator=generator) * (3.0 if peaked else 0.1)
    z[:, 0] = z[:, 1:].double().logsumexp(1).float() + math.log(probability / (1 - probability))
    p = rows_of_logits(z, device)
    targets = torch.zeros(n, dtype=torch.int64, device=device)
    ref64, exact = oracle(p, targets)
    logp_guess = ref64.logp.float() if with_guess else None
    _, got, rescued = run(p, targets, logp_guess)
    assert rescued == int(out_of_range(p, targets, logp_guess).sum())
    assert rescued == 0 or (not with_guess and probability == 1e-6)
    ideal = (exact.half().double() - exact).norm(dim=1)
    error = (got - exact).norm(dim=1)
    assert (error <= torch.maximum(1.3 * ideal, 2**-11 * exact.norm(dim=1))).all(), (error / ideal).max()
    assert error.norm() <= 1.3 * ideal.norm(), error.norm() / ideal.norm()


def test_sums_of_one_chunk_may_differ_by_many_bits(device: str) -> None:
    """Without a logp_guess S = 2 / p_y: one fp16 operand holds the factors a / S of likely and
    unlikely targets."""
    n, d, v = 64, 32, 4096
    g = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(n, d, generator=g).half(), (torch.randn(v, d, generator=g) / 8).half()
    z = hidden.double() @ weight.double().T
    order = z.argsort(1)
    targets = torch.where(torch.arange(n) % 2 == 0, order[:, -1], order[:, 0])
    bias = torch.zeros(v)
    bias[order[::2, -1]] = 12.0  # p_y near 1 in every other row
    p = Projection(hidden.to(device), weight.to(device), bias.half().to(device))
    targets = targets.to(device)
    chunk = ScaledExpChunk(p, targets, None, entropy=False)
    a = torch.randn(n, generator=g).to(device)
    row_scale = chunk.gradient(LogitCotangents(a)).row_scale
    assert row_scale is not None
    assert float(row_scale.abs().max() / row_scale.abs().min()) > 2**10
    scaled, unit = gemm.scale_rows(p.hidden, row_scale, torch.float16)
    assert unit is not None
    exact = p.hidden.double() * row_scale.double()[:, None]
    error = (scaled.double() * unit.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert (error < 2**-11).all(), "as if no number were subnormal"


def scaled_case(device: str) -> tuple[Inputs, TokenBatch, tuple[Tensor, ...]]:
    """fp16 inputs, a batch, and the exact gradients of its loss."""
    inputs = make_inputs(96, 24, 700, dtype=torch.float16, bias=True, device=device)
    batch = replace(policy_batch(inputs, device), mask=None)
    wide = inputs.to(torch.float64)
    leaves = [t.detach().requires_grad_() for t in (wide.hidden, wide.weight, wide.bias)]
    loss = eapo_loss(*leaves[:2], batch, bias=leaves[2], positive_weight=0.7, backend="torch").loss
    return inputs, batch, torch.autograd.grad(loss, leaves)


def relative(got: Tensor, exact: Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("options", "scale"), [*((Options(), scale) for scale in SCALES), (Options(plan="chunks"), SCALES[-1])], ids=str
)
def test_one_pass_holds_a_scaled_loss(options: Options, scale: float, device: str) -> None:
    """Scaled by ``main_grad_scale``, by a GradScaler's ``(scale * loss).backward()``, or as a sum
    over tokens."""
    inputs, batch, exact = scaled_case(device)
    main = torch.zeros(700, 24, device=device)
    given: dict[str, Any] = {"positive_weight": 0.7, "schedule": "one_pass", "backend": "triton", "options": options}
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias)]
    eapo_loss(leaves[0], leaves[1].detach(), batch, bias=leaves[2].detach(), main_grad=main, main_grad_scale=scale, **given)
    assert relative(main / scale, exact[1]) < 5e-4
    (scale * eapo_loss(*leaves[:2], batch, bias=leaves[2], **given).loss).backward()
    for leaf, ref64, bound in zip(leaves, exact, (1e-3, 1e-3, 1e-3), strict=True):
        assert relative(leaf.grad.double() / scale, ref64) < bound
    batch = replace(batch, denominator=96.0 / scale)
    gradients = torch.autograd.grad(eapo_loss(*leaves[:2], batch, bias=leaves[2], **given).loss, leaves)
    for got, ref64 in zip(gradients, exact, strict=True):
        assert relative(got.double() / scale, ref64) < 1e-3


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kept", [96, 50, 0])
def test_autograd_holds_a_scaled_loss(kept: int, scale: float, device: str) -> None:
    """Rows saved as E and rows that are recomputed, each scaled by its own power of two."""
    inputs, batch, exact = scaled_case(device)
    budget = {96: 2**24, 50: 2 * 64 * (704 * 2 + 8), 0: 2**14}[kept]
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias)]
    given: dict[str, Any] = {"schedule": "autograd", "backend": "triton", "options": Options(memory_budget=budget)}
    loss = eapo_loss(*leaves[:2], batch, bias=leaves[2], positive_weight=0.7, **given).loss
    for got, ref64 in zip(torch.autograd.grad(scale * loss, leaves), exact, strict=True):
        assert relative(got.double() / scale, ref64) < 1e-3


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_extreme_logits_stay_finite(size: float, device: str) -> None:
    """Logits near +-1e4, and nearly equal ones; with a right, a wrong and no logp_guess."""
    inputs = make_inputs(40, 16, 99, device=device)
    inputs = Inputs(inputs.hidden * size / 10, inputs.weight, inputs.targets).to(torch.float16)
    p = projection(inputs)
    ref64, exact = oracle(p, inputs.targets)
    for logp_guess in (None, ref64.logp.float(), ref64.logp.float() + 100.0, torch.full((40,), -3.0, device=device)):
        stats, got, _ = run(p, inputs.targets, logp_guess)
        torch.testing.assert_close(stats.logp.double(), ref64.logp, rtol=1e-6, atol=2e-3 if size > 1 else 1e-5)
        assert got.isfinite().all()
        assert ((got - exact).norm(dim=1) <= 1e-3 * exact.norm(dim=1) + 2e-3 * (size > 1)).all()


def test_statistics_are_as_good_as_from_fp32_operands(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(63, 72, 1031, dtype=torch.float16, device=device)
    narrow = token_stats(inputs.hidden, inputs.weight, inputs.targets, entropy="nograd", backend="triton")
    wide = token_stats(inputs.hidden.float(), inputs.weight.float(), inputs.targets, entropy="nograd", backend="triton")
    torch.testing.assert_close(narrow.logp, wide.logp, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(narrow.entropy, wide.entropy, rtol=1e-6, atol=4e-6)
