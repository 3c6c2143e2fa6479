"""The op on the Triton backend: statistics and gradients against the float64 oracle and against
plain PyTorch."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import comparison
import pytest
import torch
from comparison import cotangents, projection, run

from eapo_kernels import Options, token_stats
from eapo_kernels.ops import torch_backend
from eapo_kernels.ops.lm_head import describable
from eapo_kernels.ops.triton import tiles
from eapo_kernels.ops.triton.backend import BACKEND
from eapo_kernels.ops.triton.online_softmax import finalize, stream_statistics
from eapo_kernels.ops.triton.tiles import Tile
from eapo_kernels.testing import Inputs, assert_no_worse_than, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 8, 1), (1, 72, 257), (63, 72, 1031), (200, 64, 257), (5, 72, 50257)]

compare = partial(comparison.compare, backend="triton")
triton_token_stats = partial(token_stats, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "peaked"), [*((shape, True) for shape in SHAPES), ((63, 72, 1031), False)], ids=str)
def test_matches_the_oracle(shape: tuple[int, int, int], dtype: torch.dtype, peaked: bool, device: str) -> None:
    inputs = make_inputs(*shape, dtype=dtype, peaked=peaked, device=device)
    compare(inputs, cotangents(shape[0], device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["logp", "entropy", "lse"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_each_cotangent_alone(which: str, bias: bool, dtype: torch.dtype, device: str) -> None:
    compare(make_inputs(63, 72, 1031, dtype=dtype, bias=bias, device=device), cotangents(63, which, device))


@pytest.mark.parametrize(
    ("transform", "bias"),
    [
        ({"softcap": 5.0}, True),
        ({"logit_scale": 0.3}, True),
        ({"inv_temperature": 1 / 0.7}, True),
        ({"inv_temperature": "rows"}, True),
        ({"softcap": 3.0, "logit_scale": 0.5, "inv_temperature": "rows"}, True),
        ({"softcap": 3.0, "logit_scale": 0.5, "inv_temperature": "rows"}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logit_transforms(transform: dict[str, Any], bias: bool, dtype: torch.dtype, device: str) -> None:
    rows = 0.5 + torch.rand(63, generator=torch.Generator().manual_seed(1)).to(device)
    transform = {k: rows if v == "rows" else v for k, v in transform.items()}
    compare(make_inputs(63, 72, 1031, dtype=dtype, bias=bias, device=device), cotangents(63, device=device), **transform)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("peaked", [True, False], ids=["peaked", "uniform"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_second_moments(dtype: torch.dtype, peaked: bool, softcap: float | None, device: str) -> None:
    inputs = make_inputs(63, 72, 1031, dtype=dtype, peaked=peaked, bias=True, device=device)
    compare(inputs, cotangents(63, device=device), second_moments=True, softcap=softcap)


def test_moments_without_entropy(device: str) -> None:
    inputs = make_inputs(20, 16, 99, device=device)
    p = projection(inputs)
    plain = BACKEND.statistics(p, inputs.targets, entropy=False, second_moments=True, budget=2**20)
    full = BACKEND.statistics(p, inputs.targets, entropy=True, second_moments=True, budget=2**20)
    assert plain.entropy is None
    assert plain.mean_shifted is None
    for name in ("logp", "lse", "p2", "p2_logp", "varentropy"):
        assert torch.equal(getattr(plain, name), getattr(full, name))


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_logits(scale: float, dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(32, 16, 200, dtype=dtype, device=device)
    compare(Inputs(inputs.hidden * scale, inputs.weight, inputs.targets), cotangents(32, device=device))


@pytest.mark.parametrize("height", [1e4, -1e4, 30.0, 0.0])
def test_one_hot_and_flat_rows(height: float, device: str) -> None:
    """One column is ``height`` nats above (or below) all others; it is the target of every second
    row."""
    hidden = torch.ones(6, 16, device=device)
    weight = torch.zeros(300, 16, device=device)
    weight[299, 0] = height
    targets = torch.tensor([299, 0, 299, 5, 299, 256], device=device)
    compare(Inputs(hidden, weight, targets), cotangents(6, device=device))


def test_confident_token_keeps_its_precision(device: str) -> None:
    """1 - p = e^-20: log(1 + 2e-9) is 0 in fp32, log1p is not; the gradient's coefficient keeps its
    relative precision."""
    hidden = torch.tensor([[1.0]], device=device).requires_grad_()
    weight = torch.tensor([[20.0], [0.0]], device=device)
    stats = triton_token_stats(hidden, weight, torch.tensor([0], device=device))
    torch.testing.assert_close(stats.logp.item(), -math.log1p(math.exp(-20)), rtol=1e-5, atol=0.0)
    (gradient,) = torch.autograd.grad(stats.logp.sum(), [hidden])
    torch.testing.assert_close(gradient.item(), 20 * math.exp(-20) / (1 + math.exp(-20)), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("height", [-1e-3, -20.0, -79.9, -85.0, -200.0])
def test_improbable_target_among_many(height: float, device: str) -> None:
    """Below 20,000 equal columns; the quotient of the sums would overflow from about -79 nats
    on."""
    weight = torch.zeros(20_000, 16, device=device)
    weight[7, 0] = height
    stats = triton_token_stats(torch.ones(1, 16, device=device), weight, torch.tensor([7], device=device))
    expected = weight[7, 0].item() - math.log(19_999 + math.exp(height))
    torch.testing.assert_close(stats.logp.item(), expected, rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_columns(dtype: torch.dtype, device: str) -> None:
    """Columns with a bias of -inf, the first tile wholly of them, do not change any result."""
    inputs = make_inputs(63, 16, 5000, dtype=dtype, bias=True, device=device)
    inputs.bias[:2100] = -math.inf
    inputs.bias[2101::2] = -math.inf
    keep = ((inputs.targets % 2 == 0) & (inputs.targets >= 2100)).nonzero().squeeze(1)
    inputs = Inputs(inputs.hidden[keep], inputs.weight, inputs.targets[keep], inputs.bias)
    assert len(keep) > 5
    weights = cotangents(len(keep), device=device)
    stats, grads = run(triton_token_stats, inputs, weights, second_moments=True)
    small = Inputs(
        inputs.hidden.detach(), inputs.weight.detach()[2100::2], (inputs.targets - 2100) // 2, inputs.bias.detach()[2100::2]
    )
    expected, expected_grads = run(triton_token_stats, small, weights, second_moments=True)
    for got, want in zip(stats, expected, strict=True):
        torch.testing.assert_close(got, want)
    tolerance = {"rtol": 0.0, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 2e-3, "atol": 1e-3}
    torch.testing.assert_close(grads[0], expected_grads[0], **tolerance)
    torch.testing.assert_close(grads[1][2100::2], expected_grads[1], **tolerance)
    for gradient in grads[1:]:
        assert (gradient[:2100] == 0).all()
        assert (gradient[2101::2] == 0).all()


def test_target_on_a_removed_column_is_minus_infinity(device: str) -> None:
    bias = torch.tensor([0.0, -math.inf, 0.0], device=device)
    hidden, weight = torch.ones(1, 4, device=device), torch.ones(3, 4, device=device)
    hidden.requires_grad_()
    stats = triton_token_stats(hidden, weight, torch.tensor([1], device=device), bias=bias)
    assert stats.logp.item() == -math.inf
    assert stats.entropy.item() == pytest.approx(math.log(2))
    stats.entropy.sum().backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, about the NaN itself
def test_a_row_without_columns_or_with_nan_is_nan(device: str) -> None:
    """A row without a distribution gives NaN: neither LOWEST nor a maximum that ignores NaN may
    hide it."""
    hidden, weight = torch.ones(2, 16, device=device), torch.ones(300, 16, device=device)
    targets = torch.tensor([3, 299], device=device)
    stats = triton_token_stats(hidden, weight, targets, bias=torch.full((300,), -math.inf, device=device))
    assert all(s.isnan().all() for s in stats[:3])
    hidden[0, 3] = math.nan
    stats = triton_token_stats(hidden, weight, targets, second_moments=True)
    assert all(s[0].isnan() and s[1].isfinite() for s in stats)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_in_the_ragged_last_tile(dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(40, 72, 2048 + 9, dtype=dtype, device=device)
    targets = 2048 + torch.arange(40, device=device) % 9
    compare(Inputs(inputs.hidden, inputs.weight, targets), cotangents(40, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_misaligned_inputs(dtype: torch.dtype, device: str) -> None:
    """The results do not depend on strides: padded rows, transposed, and an odd D that no
    descriptor can describe."""
    inputs = make_inputs(63, 40, 300, dtype=dtype, bias=True, device=device)
    rows = 0.5 + torch.rand(1, device=device)
    weights = cotangents(63, device=device)
    plain = run(triton_token_stats, inputs.to(dtype), weights, inv_temperature=rows.expand(63))
    apart = torch.cat([inputs.hidden, inputs.hidden], 1).detach()[:, :40]
    shifted = torch.zeros(63 * 40 + 1, dtype=dtype, device=device)[1:].view(63, 40)
    shifted.copy_(inputs.hidden.detach())
    transposed = inputs.weight.detach().t().contiguous().t()
    bias = inputs.bias.detach().repeat_interleave(3)[::3]
    assert not describable(transposed)
    assert not describable(shifted)
    for hidden in (apart, shifted):
        strided = Inputs(hidden, transposed, inputs.targets, bias)
        for got, want in zip(run(triton_token_stats, strided, weights, inv_temperature=rows.expand(63)), plain, strict=True):
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b) if a is not None else None
    odd = make_inputs(20, 7, 99, dtype=dtype, device=device)
    compare(odd, cotangents(20, device=device))


@pytest.mark.parametrize(("splits", "descriptors"), [(1, True), (3, True), (3, False), (1000, False)])
@pytest.mark.parametrize(("rows", "columns", "depth", "slices"), [(16, 32, 32, 1), (32, 128, 64, 4), (64, 64, 32, 2)])
def test_tiles_and_ranges_change_only_the_rounding(
    rows: int, columns: int, depth: int, slices: int, splits: int, descriptors: bool, device: str
) -> None:
    """Small tiles test the cases of large inputs: many row tiles in groups, many ranges, a last
    range of fewer tiles."""
    inputs = make_inputs(70, 72, 515, dtype=torch.float16, bias=True, device=device)
    p = projection(inputs, softcap=6.0, row_inv_temperature=0.5 + torch.rand(70, device=device))
    tile = Tile(rows, columns, depth, group_n=2, descriptors=descriptors, slices=slices)
    launch, sums = stream_statistics(p, inputs.targets, entropy=True, second_moments=True, tile=tile, splits=splits)
    launch()
    launch, final = finalize(sums)
    launch()
    expected = torch_backend.BACKEND.statistics(p, inputs.targets, entropy=True, second_moments=True, budget=2**20)
    for name, got in final.statistics()._asdict().items():
        torch.testing.assert_close(got, getattr(expected, name), rtol=3e-6, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_rows_in_parts_are_the_same_bits(device: str) -> None:
    """Sums of 3 ranges, 4 fields, counted twice: a budget of one byte computes 128 rows at a time."""
    inputs = make_inputs(300, 16, 6000, device=device)
    p = projection(inputs)
    whole, parts = (BACKEND.statistics(p, inputs.targets, entropy=True, second_moments=False, budget=b) for b in (2**30, 1))
    for name, value in whole._asdict().items():
        assert value is None or torch.equal(value, getattr(parts, name)), name
    assert tiles.rows_within(2**30, 300, 4, 6000) == 300
    assert tiles.rows_within(2 * 3 * 4 * 4 * 200, 300, 4, 6000) == 200


def test_small_budget_changes_nothing_but_rounding(device: str) -> None:
    inputs = make_inputs(130, 24, 5000, device=device)
    compare(inputs, cotangents(130, device=device), options=Options(memory_budget=5000 * 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_torch_backend(dtype: torch.dtype, device: str) -> None:
    """A tighter bound than against the oracle: both have the same inputs and differ only in the
    order of addition."""
    inputs = make_inputs(63, 72, 1031, dtype=dtype, bias=True, device=device)
    weights = cotangents(63, device=device)
    results = [run(token_stats, inputs.to(dtype), weights, backend=b, second_moments=True) for b in ("torch", "triton")]
    for a, b in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=4e-6)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert_no_worse_than(b, a, a.double(), floor={torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps), name="gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_run_to_run_bitwise(dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(130, 72, 1031, dtype=dtype, bias=True, device=device)
    weights = cotangents(130, device=device)
    first, second = (run(triton_token_stats, inputs, weights, second_moments=True) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


def test_left_out_rows_are_exact_zeros(device: str) -> None:
    inputs = make_inputs(40, 16, 99, device=device)
    hidden, weight = inputs.leaves()
    mask = torch.arange(40, device=device) % 3 != 0
    with torch.no_grad():
        hidden[~mask] = math.nan
    stats = triton_token_stats(hidden, weight, inputs.targets, mask=mask, second_moments=True)
    for values in stats:
        assert (values[~mask] == 0).all()
        assert values[mask].isfinite().all()
    (stats.logp.sum() + stats.entropy.sum()).backward()
    assert (hidden.grad[~mask] == 0).all()
    assert weight.grad.isfinite().all()


def test_properties(device: str) -> None:
    """0 <= H <= log V, logp <= 0, p2 in [1/V, 1], and a shift of all logits changes none of
    them."""
    for n, v, shift in ((1, 1, 0.0), (7, 33, -300.0), (33, 257, 41.0), (12, 1031, 500.0)):
        inputs = make_inputs(n, 8, v, seed=v, device=device)
        bias = torch.zeros(v, device=device)
        stats = triton_token_stats(inputs.hidden, inputs.weight, inputs.targets, bias=bias, second_moments=True)
        assert (stats.logp <= 0).all()
        assert ((stats.entropy >= 0) & (stats.entropy <= math.log(v) + 1e-5)).all()
        assert ((stats.p2 <= 1 + 1e-6) & (stats.p2 >= 1 / v - 1e-6)).all()
        moved = triton_token_stats(inputs.hidden, inputs.weight, inputs.targets, bias=bias + shift)
        tolerance = 4e-6 * (1 + abs(shift))
        torch.testing.assert_close(moved.logp, stats.logp, rtol=1e-5, atol=tolerance)
        torch.testing.assert_close(moved.entropy, stats.entropy, rtol=1e-5, atol=tolerance)
        torch.testing.assert_close(moved.lse, stats.lse + shift, rtol=1e-5, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_addresses_beyond_two_to_the_31(device: str) -> None:
    """V * D and N * V above 2^31: 32-bit offsets would overflow at the last columns."""
    n, d, v = 8192, 8192, 2**18 + 8
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, device=device, dtype=torch.bfloat16) / 50
    weight = torch.randn(v, d, generator=generator, device=device, dtype=torch.bfloat16)
    targets = torch.randint(v - 64, v, (n,), generator=generator, device=device)
    stats = token_stats(hidden, weight, targets, backend="triton")
    some = slice(n - 4, n)
    expected = token_stats(hidden[some].double(), weight.double(), targets[some], backend="torch")
    torch.testing.assert_close(stats.logp[some].double(), expected.logp, rtol=1e-4, atol=2e-4)
