"""``logit_gradient`` alone: tiles, slabs, dtypes, and elements that it must not write."""

from __future__ import annotations

import math

import pytest
import torch
from comparison import cotangents, projection
from torch import Tensor

from eapo_kernels.ops import torch_backend
from eapo_kernels.ops.dispatch import LogitCotangents, RowStatistics
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.ops.triton.backend import BACKEND
from eapo_kernels.ops.triton.logit_grad import logit_gradient
from eapo_kernels.ops.triton.tiles import Tile
from eapo_kernels.testing import Inputs, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned")

N, D, V = 70, 72, 515


def statistics(p: Projection, inputs: Inputs) -> RowStatistics:
    return torch_backend.BACKEND.statistics(p, inputs.targets, entropy=True, second_moments=False, budget=2**24)


def expected_slab(p: Projection, inputs: Inputs, columns: slice, given: LogitCotangents) -> Tensor:
    out = torch.zeros(p.n_rows, columns.stop - columns.start, dtype=p.operand_dtype, device=p.hidden.device)
    torch_backend.BACKEND.logit_gradient(out, p, inputs.targets, columns, statistics(p, inputs), given)
    return out


@pytest.mark.parametrize(("rows", "width", "depth", "slices"), [(16, 32, 32, 1), (32, 128, 64, 4), (64, 64, 32, 2)])
@pytest.mark.parametrize(
    ("columns", "descriptors"),
    [(slice(0, V), True), (slice(0, V), False), (slice(128, 400), True), (slice(512, V), False)],
    ids=str,
)
def test_tiles_and_slabs_change_only_the_rounding(
    columns: slice, rows: int, width: int, depth: int, slices: int, descriptors: bool, device: str
) -> None:
    inputs = make_inputs(N, D, V, bias=True, device=device)
    p = projection(inputs, softcap=6.0, row_inv_temperature=0.5 + torch.rand(N, device=device))
    given = LogitCotangents(*cotangents(N, device=device))
    out = torch.full((N, columns.stop - columns.start), math.nan, device=device)
    tile = Tile(rows, width, depth, group_n=2, descriptors=descriptors, slices=slices)
    logit_gradient(out, p, inputs.targets, columns, statistics(p, inputs), given, tile=tile)()
    torch.testing.assert_close(out, expected_slab(p, inputs, columns, given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("present", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)])
def test_missing_cotangents_are_zero(present: tuple[bool, bool, bool], device: str) -> None:
    inputs = make_inputs(N, D, V, device=device)
    p = projection(inputs)
    values = cotangents(N, device=device)
    given = LogitCotangents(*(v if there else None for v, there in zip(values, present, strict=True)))
    zeros = LogitCotangents(*(v if there else torch.zeros_like(v) for v, there in zip(values, present, strict=True)))
    out = torch.full((N, V), math.nan, device=device)
    BACKEND.logit_gradient(out, p, inputs.targets, slice(0, V), statistics(p, inputs), given)
    torch.testing.assert_close(out, expected_slab(p, inputs, slice(0, V), zeros), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [V, 528, 600])
def test_writes_its_columns_and_nothing_else(stride: int, device: str) -> None:
    inputs = make_inputs(N, D, V, device=device)
    p = projection(inputs)
    given = LogitCotangents(*cotangents(N, device=device))
    memory = torch.full((N + 2, stride), 7.0, device=device)
    out = memory[1 : N + 1, :V]
    BACKEND.logit_gradient(out, p, inputs.targets, slice(0, V), statistics(p, inputs), given)
    torch.testing.assert_close(out, expected_slab(p, inputs, slice(0, V), given), rtol=1e-5, atol=1e-6)
    assert (memory[0] == 7).all()
    assert (memory[N + 1] == 7).all()
    assert (memory[:, V:] == 7).all()


def test_a_row_scale_brings_small_fp16_gradients_into_range(device: str) -> None:
    inputs = make_inputs(N, D, V, dtype=torch.float16, device=device)
    p = projection(inputs)
    given = LogitCotangents(*(1e-7 * cotangents(N, device=device)))
    out = torch.full((N, V), math.nan, dtype=torch.float16, device=device)
    near_one, row_scale = given.split_pow2(torch.float16)
    BACKEND.logit_gradient(out, p, inputs.targets, slice(0, V), statistics(p, inputs), near_one)
    z = p.hidden.double() @ p.weight.double().T
    prob = torch.softmax(z, 1)
    x = z - z.amax(1, keepdim=True)
    mean = (prob * x).sum(1, keepdim=True)
    a, b, g = (c.double().unsqueeze(1) for c in given)
    one_hot = torch.nn.functional.one_hot(inputs.targets, V)
    exact = a * (one_hot - prob) - b * prob * (x - mean) + g * prob  # E6
    torch.testing.assert_close(out.double() * row_scale.double().unsqueeze(1), exact, rtol=2e-3, atol=1e-14)


def test_rows_sum_to_the_cotangent_of_lse(device: str) -> None:
    """Shift invariance: a shift of all logits changes lse, but not logp and entropy."""
    inputs = make_inputs(N, D, V, device=device)
    p = projection(inputs)
    given = LogitCotangents(*cotangents(N, device=device))
    out = torch.full((N, V), math.nan, device=device)
    BACKEND.logit_gradient(out, p, inputs.targets, slice(0, V), statistics(p, inputs), given)
    torch.testing.assert_close(out.double().sum(1), given.lse.double(), rtol=0.0, atol=3e-6)
