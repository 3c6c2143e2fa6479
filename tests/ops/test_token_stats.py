"""The op on the torch backend against the float64 oracle and against plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import compare, cotangents, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eapo_kernels import Options, reference, token_stats
from eapo_kernels.ops import gemm, torch_backend
from eapo_kernels.testing import Inputs, assert_no_worse_than, eager_token_stats, make_inputs, oracle_token_stats

SHAPES = [(1, 8, 1), (1, 72, 257), (63, 72, 1031), (200, 64, 257), (5, 72, 50257), (3, 8, 151936)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("peaked", [True, False], ids=["peaked", "uniform"])
def test_matches_the_oracle(shape: tuple[int, int, int], dtype: torch.dtype, peaked: bool, device: str, poisoned: None) -> None:
    inputs = make_inputs(*shape, dtype=dtype, peaked=peaked, device=device)
    compare(inputs, cotangents(shape[0], "all", device))


@pytest.mark.parametrize("which", ["logp", "entropy", "lse"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_each_cotangent_alone(which: str, bias: bool, device: str, poisoned: None) -> None:
    compare(make_inputs(63, 72, 1031, bias=bias, device=device), cotangents(63, which, device))


@pytest.mark.parametrize(
    "transform",
    [
        {"softcap": 5.0},
        {"logit_scale": 0.3},
        {"inv_temperature": 1 / 0.7},
        {"inv_temperature": "rows"},
        {"softcap": 3.0, "logit_scale": 0.5, "inv_temperature": "rows"},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_logit_transforms(transform: dict[str, Any], bias: bool, device: str, poisoned: None) -> None:
    rows = 0.5 + torch.rand(63, generator=torch.Generator().manual_seed(1)).to(device)
    transform = {k: rows if v == "rows" else v for k, v in transform.items()}
    compare(make_inputs(63, 72, 1031, bias=bias, device=device), cotangents(63, "all", device), **transform)


def test_small_budget_changes_nothing_but_rounding(device: str) -> None:
    inputs = make_inputs(130, 24, 5000, device=device)
    compare(inputs, cotangents(130, "all", device), options=Options(memory_budget=5000 * 16))


def test_second_moments(device: str, poisoned: None) -> None:
    inputs = make_inputs(63, 72, 1031, device=device)
    exact = oracle_token_stats(inputs, second_moments=True)
    eager = eager_token_stats(inputs.hidden, inputs.weight, inputs.targets, second_moments=True)
    actual = token_stats(inputs.hidden, inputs.weight, inputs.targets, second_moments=True)
    for name in ("p2", "p2_logp", "varentropy"):
        assert_no_worse_than(getattr(actual, name), getattr(eager, name), getattr(exact, name), floor=2e-6, name=name)


def test_left_out_rows_are_exact_zeros(device: str, poisoned: None) -> None:
    inputs = make_inputs(40, 16, 99, device=device)
    hidden, weight = inputs.leaves()
    targets = inputs.targets.clone()
    targets[::4] = -100
    mask = torch.arange(40, device=device) % 3 != 0
    out = (targets == -100) | ~mask
    with torch.no_grad():
        hidden[out] = math.nan  # no work is done on them, so not even NaN gets through
    stats = token_stats(hidden, weight, targets, mask=mask, second_moments=True)
    for values in stats:
        assert (values[out] == 0).all()
        assert values[~out].isfinite().all()
    (stats.logp.sum() + stats.entropy.sum() + stats.lse.sum()).backward()
    assert (hidden.grad[out] == 0).all()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_compaction_is_only_a_schedule(device: str) -> None:
    inputs = make_inputs(40, 16, 99, device=device)
    mask = torch.arange(40, device=device) % 3 != 0
    results = []
    for compact in (True, False):
        hidden, weight = inputs.to(torch.float64).leaves()
        stats = token_stats(hidden, weight, inputs.targets, mask=mask, options=Options(compact=compact))
        grads = torch.autograd.grad(stats.logp.sum() + stats.entropy.sum(), [hidden, weight])
        results.append((*stats[:3], *grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0)])
def test_any_leading_shape(shape: tuple[int, ...], device: str) -> None:
    n = math.prod(shape)
    inputs = make_inputs(max(n, 1), 8, 33, device=device)
    hidden = inputs.hidden[:n].reshape(*shape, 8).requires_grad_()
    targets = inputs.targets[:n].reshape(shape)
    stats = token_stats(hidden, inputs.weight.requires_grad_(), targets, second_moments=True)
    assert all(s.shape == shape for s in stats)
    stats.logp.sum().backward()
    assert hidden.grad.shape == hidden.shape
    torch.testing.assert_close(stats.logp, reference.token_stats(hidden, inputs.weight, targets).logp)


def test_strided_inputs(device: str) -> None:
    inputs = make_inputs(64, 48, 200, device=device)
    wide = torch.cat([inputs.hidden, inputs.hidden], 1)
    strided = token_stats(wide[::2, :48], inputs.weight.t().contiguous().t(), inputs.targets[::2])
    plain = token_stats(inputs.hidden[::2].contiguous(), inputs.weight, inputs.targets[::2].contiguous())
    torch.testing.assert_close(strided.logp, plain.logp)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits(scale: float, device: str, poisoned: None) -> None:
    inputs = make_inputs(32, 16, 200, device=device)
    extreme = Inputs(inputs.hidden * scale, inputs.weight, inputs.targets)
    compare(extreme, cotangents(32, "all", device))


def test_confident_token_keeps_its_precision(device: str) -> None:
    """1 - p = e^-20: log(1 + 2e-9) is 0 in fp32, log1p is not; the gradient's coefficient keeps its relative precision."""
    hidden = torch.tensor([[1.0]], device=device).requires_grad_()
    weight = torch.tensor([[20.0], [0.0]], device=device)
    stats = token_stats(hidden, weight, torch.tensor([0], device=device))
    torch.testing.assert_close(stats.logp.item(), -math.log1p(math.exp(-20)), rtol=1e-5, atol=0.0)
    (gradient,) = torch.autograd.grad(stats.logp.sum(), [hidden])
    torch.testing.assert_close(gradient.item(), 20 * math.exp(-20) / (1 + math.exp(-20)), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("height", [-1e-3, -20.0, -79.9, -85.0, -200.0])
def test_improbable_target_among_many_keeps_its_precision(height: float, device: str) -> None:
    """Below 20,000 equal columns; the quotient of the sums would overflow from about -79 nats on."""
    weight = torch.zeros(20_000, 16, device=device)
    weight[7, 0] = height
    stats = token_stats(torch.ones(1, 16, device=device), weight, torch.tensor([7], device=device))
    expected = weight[7, 0].item() - math.log(19_999 + math.exp(height))
    torch.testing.assert_close(stats.logp.item(), expected, rtol=3e-7, atol=0.0)


def test_minus_infinity_columns(device: str, poisoned: None) -> None:
    inputs = make_inputs(63, 16, 300, bias=True, device=device)
    inputs.bias[::2] = -math.inf
    keep = inputs.targets % 2 == 1
    inputs = Inputs(inputs.hidden[keep], inputs.weight, inputs.targets[keep], inputs.bias)
    stats, grads = run(token_stats, inputs, cotangents(int(keep.sum()), "all", device))
    small = Inputs(inputs.hidden.detach(), inputs.weight.detach()[1::2], inputs.targets // 2, inputs.bias.detach()[1::2])
    expected, expected_grads = run(token_stats, small, cotangents(int(keep.sum()), "all", device))
    torch.testing.assert_close(stats.entropy, expected.entropy)
    torch.testing.assert_close(grads[0], expected_grads[0])
    torch.testing.assert_close(grads[1][1::2], expected_grads[1])
    assert (grads[1][::2] == 0).all()
    assert (grads[2][::2] == 0).all()


def test_target_on_a_removed_column_is_minus_infinity(device: str) -> None:
    bias = torch.tensor([0.0, -math.inf, 0.0], device=device)
    hidden, weight = torch.ones(1, 4, device=device), torch.ones(3, 4, device=device)
    stats = token_stats(hidden, weight, torch.tensor([1], device=device), bias=bias)
    assert stats.logp.item() == -math.inf
    assert stats.entropy.item() == pytest.approx(math.log(2))


def test_frozen_parts_get_no_gradient(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = gemm.add_product_
    monkeypatch.setattr(gemm, "add_product_", lambda out, *a, **k: calls.append(tuple(out.shape)) or real(out, *a, **k))
    inputs = make_inputs(20, 12, 77, device=device)
    token_stats(inputs.hidden.requires_grad_(), inputs.weight, inputs.targets).logp.sum().backward()
    assert (77, 12) not in calls
    assert inputs.weight.grad is None
    calls.clear()
    token_stats(inputs.hidden.detach(), inputs.weight.requires_grad_(), inputs.targets).logp.sum().backward()
    assert (20, 12) not in calls


def test_rows_with_zero_cotangent_do_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    real = torch_backend.BACKEND

    def counting(out: Tensor, *args: Any) -> None:
        rows.append(out.shape[0])
        real.logit_gradient(out, *args)

    monkeypatch.setattr(torch_backend, "BACKEND", replace(real, logit_gradient=counting))
    inputs = make_inputs(20, 12, 77)
    hidden, weight = inputs.leaves()
    (token_stats(hidden, weight, inputs.targets).logp * (torch.arange(20) < 5)).sum().backward()
    assert rows == [5]
    assert (hidden.grad[5:] == 0).all()


def test_run_to_run_bitwise(device: str) -> None:
    inputs = make_inputs(130, 72, 1031, dtype=torch.bfloat16, device=device)
    first, second = (run(token_stats, inputs, cotangents(130, "all", device)) for _ in range(2))
    for a, b in zip((*first[0][:3], *first[1]), (*second[0][:3], *second[1]), strict=True):
        assert torch.equal(a, b)


def test_gradcheck() -> None:
    inputs = make_inputs(5, 4, 7, dtype=torch.float64, bias=True)
    leaves = inputs.leaves()
    rows = 0.5 + torch.rand(5, dtype=torch.float64)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        stats = token_stats(hidden, weight, inputs.targets, bias=bias, inv_temperature=rows, softcap=2.0, logit_scale=0.9)
        return stats.logp, stats.entropy, stats.lse

    assert torch.autograd.gradcheck(function, leaves)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.floats(-500, 500), st.integers(0, 10**6))
def test_properties(n: int, v: int, shift: float, seed: int) -> None:
    """0 <= H <= log V, logp <= 0, p2 in [1/V, 1], and nothing moves when every logit is shifted."""
    inputs = make_inputs(n, 8, v, seed=seed)
    bias = torch.zeros(v)
    stats = token_stats(inputs.hidden, inputs.weight, inputs.targets, bias=bias, second_moments=True)
    assert (stats.logp <= 0).all()
    assert (stats.entropy >= 0).all()
    assert (stats.entropy <= math.log(v) + 1e-5).all()
    assert (stats.p2 <= 1 + 1e-6).all()
    assert (stats.p2 >= 1 / v - 1e-6).all()
    moved = token_stats(inputs.hidden, inputs.weight, inputs.targets, bias=bias + shift)
    tolerance = 4e-6 * (1 + abs(shift))
    torch.testing.assert_close(moved.logp, stats.logp, rtol=1e-5, atol=tolerance)
    torch.testing.assert_close(moved.entropy, stats.entropy, rtol=1e-5, atol=tolerance)
    torch.testing.assert_close(moved.lse, stats.lse + shift, rtol=1e-5, atol=tolerance)
