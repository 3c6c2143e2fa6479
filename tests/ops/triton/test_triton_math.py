"""The device functions alone, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from eapo_kernels.ops.triton import common as device_math


@triton.jit
def _apply(out, x, n, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0.0)
    if WHICH == "log1p":
        result = device_math.log1p(value)
    elif WHICH == "expm1":
        result = device_math.expm1(value)
    elif WHICH == "tanh":
        result, _ = device_math.tanh_and_slope(value)
    else:
        _, result = device_math.tanh_and_slope(value)
    tl.store(out + at, result, mask=at < n)


def _run(which: str, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _apply[(1,)](out, x, x.numel(), WHICH=which, BLOCK=triton.next_power_of_2(x.numel()))
    return out


def _magnitudes(device: str) -> Tensor:
    return torch.logspace(-30, 1.9, 1500, dtype=torch.float64).float().to(device)


@pytest.mark.parametrize(
    ("which", "sign", "ulps"),
    [
        ("log1p", 1, 4),
        ("expm1", -1, 8),
        ("expm1", 1, 64),  # e^x itself carries |x| ulp / 2 there
        ("tanh", 1, 4),
        ("tanh", -1, 4),
    ],
)
def test_relative_precision(which: str, sign: int, ulps: int, device: str) -> None:
    x = sign * _magnitudes(device)
    exact = getattr(torch, which)(x.double())
    error = ((_run(which, x).double() - exact) / exact).abs().max()
    assert error <= ulps * 2**-23, f"{float(error) * 2**23:.1f} ulp"


def test_slope_keeps_its_precision_where_tanh_is_one(device: str) -> None:
    x = torch.linspace(-40, 40, 2001, device=device)
    exact = 1 / torch.cosh(x.double()).square()
    torch.testing.assert_close(_run("slope", x).double(), exact, rtol=1e-5, atol=0.0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about the infinities themselves
def test_limits(device: str) -> None:
    x = torch.tensor([-math.inf, math.inf, 0.0, -0.0, 3e38, -3e38, math.nan], device=device)
    assert _run("tanh", x)[:6].tolist() == [-1, 1, 0, 0, 1, -1]
    assert _run("slope", x)[:6].tolist() == [0, 0, 1, 1, 0, 0]
    assert _run("log1p", x[1:5]).tolist() == [math.inf, 0, 0, pytest.approx(math.log(3e38))]
    assert _run("expm1", x[[0, 2, 3, 5]]).tolist() == [-1, 0, 0, -1]
    for which in ("tanh", "slope", "log1p", "expm1"):
        assert _run(which, x)[6].isnan()
