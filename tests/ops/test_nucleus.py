"""The nucleus entropy against dense logits in float64: values, gradients, ties, and rows with nothing in them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_kernels import EapoError, Options, ShapeError, reference
from eapo_kernels.ops import chunking
from eapo_kernels.ops.nucleus import nucleus_entropy
from eapo_kernels.testing import assert_no_worse_than, make_inputs, peak_memory


def dense(hidden: Tensor, weight: Tensor, *, top_p: float, **transform: Any) -> Tensor:
    """arXiv 2509.25133, typed out on all of [N, V]: sort, cut where the mass before reaches top_p, renormalise."""
    p = torch.softmax(reference.logits(hidden, weight, **transform), -1)
    ordered, order = torch.sort(p.detach(), dim=-1, descending=True, stable=True)
    inside = (ordered.cumsum(-1) - ordered) < top_p * p.detach().sum(-1, keepdim=True)
    members = torch.zeros_like(inside).scatter(-1, order, inside)
    q = torch.where(members, p, 0.0)
    q = q / q.sum(-1, keepdim=True)
    return -(q * torch.where(q > 0, q, 1.0).log()).sum(-1)


def gradients(function: Any, leaves: list[Tensor], cotangent: Tensor, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    names = dict(zip(("hidden", "weight", "bias"), leaves, strict=False))
    values = function(**names, **options)
    return values.detach(), torch.autograd.grad((values * cotangent.to(values.dtype)).sum(), leaves)


TRANSFORMS = [
    {},
    {"softcap": 3.0},
    {"logit_scale": 0.3},
    {"inv_temperature": 1 / 0.7},
    {"softcap": 5.0, "logit_scale": 0.8, "inv_temperature": "rows"},
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.99])
def test_values_and_gradients_in_float64(
    transform: dict[str, Any], bias: bool, top_p: float, device: str, poisoned: None
) -> None:
    inputs = make_inputs(63, 24, 1031, bias=bias, device=device).to(torch.float64)
    rows = 0.5 + torch.rand(63, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    transform = {k: rows if v == "rows" else v for k, v in transform.items()}
    cotangent = torch.randn(63, generator=torch.Generator().manual_seed(2)).to(device)
    leaves = inputs.leaves()
    values, found = gradients(nucleus_entropy, leaves, cotangent, top_p=top_p, **transform)
    exact_values, exact = gradients(dense, leaves, cotangent, top_p=top_p, **transform)
    torch.testing.assert_close(values, exact_values, rtol=1e-9, atol=1e-9)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 72, 257), (63, 72, 1031), (5, 72, 50257)], ids=str)
@pytest.mark.parametrize("peaked", [True, False], ids=["peaked", "uniform"])
def test_narrow_dtypes_are_no_worse_than_eager(
    shape: tuple[int, int, int], dtype: torch.dtype, peaked: bool, device: str, poisoned: None
) -> None:
    """Which token is the last of a nucleus may turn on a rounding, so the mass is put between two of them."""
    inputs = make_inputs(*shape, dtype=dtype, peaked=peaked, device=device)
    p = torch.softmax(reference.logits(inputs.hidden.double(), inputs.weight.double()), -1)
    mass = p.sort(-1, descending=True).values.cumsum(-1)
    top_p = min((0.55 + 0.001 * i for i in range(300)), key=lambda t: -float((mass - t).abs().min()))
    cotangent = 1024 * torch.randn(shape[0], generator=torch.Generator().manual_seed(2)).to(device)  # above fp16's subnormals
    exact, exact_grads = gradients(dense, inputs.to(torch.float64).leaves(), cotangent, top_p=top_p)
    eager, eager_grads = gradients(dense, inputs.to(torch.float32).leaves(), cotangent, top_p=top_p)
    values, grads = gradients(nucleus_entropy, inputs.to(dtype).leaves(), cotangent, top_p=top_p)
    assert values.dtype == torch.float32
    assert_no_worse_than(values, eager, exact, floor=2e-6)
    floor = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for name, got, plain, true in zip(("hidden", "weight"), grads, eager_grads, exact_grads, strict=True):
        assert got.dtype == dtype
        assert_no_worse_than(got, plain, true, floor=floor, name=name)


def test_ties_are_broken_by_index(device: str) -> None:
    """Eight equal probabilities, half of the mass: the first four, with a gradient on them alone."""
    weight = torch.zeros(8, 2, dtype=torch.float64, device=device).requires_grad_()
    hidden = torch.ones(1, 2, dtype=torch.float64, device=device)
    bias = torch.zeros(8, dtype=torch.float64, device=device).requires_grad_()
    values = nucleus_entropy(hidden, weight, top_p=0.5, bias=bias)
    assert values.item() == pytest.approx(math.log(4))
    assert nucleus_entropy(hidden, weight, top_p=0.51).item() == pytest.approx(math.log(5))
    with torch.no_grad():
        bias[7] = 1.0  # e of 7 + e: first the last token, then the first two of the others
    values = nucleus_entropy(hidden, weight, top_p=0.45, bias=bias)
    (found,) = torch.autograd.grad(values.sum(), bias)
    assert (found != 0).tolist() == [True, True, False, False, False, False, False, True]


def test_a_nucleus_of_one_token_has_neither_entropy_nor_gradient(device: str) -> None:
    weight = torch.tensor([[9.0], [0.0], [-3.0]], device=device, requires_grad=True)
    hidden = torch.tensor([[1.0], [1e4], [1e-3]], device=device, requires_grad=True)
    values = nucleus_entropy(hidden, weight, top_p=0.9)
    assert values[:2].detach().tolist() == [0.0, 0.0]
    assert values[2].item() == pytest.approx(math.log(3), abs=1e-2)
    d_hidden, d_weight = torch.autograd.grad(values[:2].sum(), [hidden, weight])
    assert not d_hidden.any()
    assert not d_weight.any()


def test_removed_columns_are_never_in_it(device: str) -> None:
    bias = torch.zeros(50, device=device)
    bias[10:] = -math.inf
    weight = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    found = nucleus_entropy(hidden, weight, top_p=0.999999, bias=bias)
    expected = dense(hidden[:, :].double(), weight[:10].double(), top_p=0.999999)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    d_hidden, d_weight = torch.autograd.grad(found.sum(), [hidden, weight])
    assert d_hidden.isfinite().all()
    assert not d_weight[10:].any()


def test_masked_rows_are_exact_zeros_and_may_hold_anything(device: str) -> None:
    inputs = make_inputs(40, 8, 300, device=device)
    mask = torch.arange(40, device=device) % 3 != 0
    clean = nucleus_entropy(inputs.hidden, inputs.weight, top_p=0.7)
    hidden = torch.where(mask[:, None], inputs.hidden, torch.nan).requires_grad_()
    for options in (Options(), Options(compact=False)):
        found = nucleus_entropy(hidden, inputs.weight, top_p=0.7, mask=mask, options=options)
        torch.testing.assert_close(found, torch.where(mask, clean, 0.0))
        (gradient,) = torch.autograd.grad(found.sum(), hidden)
        assert gradient.isfinite().all()
        assert not gradient[~mask].any()
    assert not nucleus_entropy(hidden, inputs.weight, top_p=0.7, mask=torch.zeros_like(mask)).any()


def test_shapes_chunks_and_large_nuclei(device: str) -> None:
    """The number of tokens sorted at first is doubled as needed; the cut into chunks changes nothing but rounding."""
    inputs = make_inputs(70, 8, 5000, peaked=False, device=device).to(torch.float64)
    uncut = nucleus_entropy(inputs.hidden, inputs.weight, top_p=0.9)
    assert float(uncut.mean().exp()) > 2000
    cut = nucleus_entropy(inputs.hidden, inputs.weight, top_p=0.9, options=Options(memory_budget=5000 * 48 * 8))
    torch.testing.assert_close(uncut, cut, rtol=1e-10, atol=0)
    folded = nucleus_entropy(inputs.hidden.view(7, 10, 8), inputs.weight, top_p=0.9)
    assert torch.equal(folded, uncut.view(7, 10))
    assert nucleus_entropy(inputs.hidden[:0], inputs.weight, top_p=0.9).shape == (0,)


def test_workspace_stays_within_the_budget(device: str) -> None:
    budget = 8 * 2**20

    def work(n: int) -> int:
        inputs = make_inputs(n, 16, 20_000, device=device)
        leaves, options = inputs.leaves(), Options(memory_budget=budget)

        def both() -> object:
            return torch.autograd.grad(nucleus_entropy(*leaves, top_p=0.8, options=options).sum(), leaves)

        return peak_memory(both, device)

    gradients = 2 * 20_000 * 16 * 4
    peaks = {n: work(n) for n in (48, 192)}
    assert peaks[192] <= budget + gradients + 192 * (2 * 16 * 4 + 200) + 2**20
    assert peaks[192] - peaks[48] <= 2**20, "a quarter of the [N, V] that is not alive is 4 MB"


def test_bounds() -> None:
    """0 <= Hk <= H, and Hk -> H as top_p -> 1."""
    inputs = make_inputs(50, 8, 300).to(torch.float64)
    full = reference.token_stats(inputs.hidden, inputs.weight, inputs.targets).entropy
    assert full is not None
    previous = torch.zeros_like(full)
    for top_p in (1e-6, 0.2, 0.5, 0.9, 0.999):
        values = nucleus_entropy(inputs.hidden, inputs.weight, top_p=top_p)
        assert bool((values >= 0).all())
        assert bool((values >= previous - 1e-12).all())
        previous = values
    nearly = nucleus_entropy(inputs.hidden, inputs.weight, top_p=1 - 1e-12)
    torch.testing.assert_close(nearly, full, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("top_p", [0, 1, 1.5, -0.1, math.nan, "0.8", True])
def test_a_mass_outside_the_open_interval_is_refused(top_p: Any) -> None:
    with pytest.raises(EapoError, match=r"top_p: expected"):
        nucleus_entropy(torch.zeros(2, 3), torch.zeros(5, 3), top_p=top_p)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"hidden: expected float32 \[2, 3\] cpu, got float32 \[2, 4\] cpu"):
        nucleus_entropy(torch.zeros(2, 4), torch.zeros(5, 3), top_p=0.5)
    with pytest.raises(ShapeError, match=r"mask: expected bool \[2\] cpu"):
        nucleus_entropy(torch.zeros(2, 3), torch.zeros(5, 3), top_p=0.5, mask=torch.ones(3, dtype=torch.bool))


def test_the_plan_of_least_memory_bounds_its_workspace_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "RECOMPUTE_BUDGET", 100)
    inputs = make_inputs(6, 8, 64)
    with pytest.raises(EapoError, match=r"Options.memory_budget: expected at least \d+ bytes, .*, got 100"):
        nucleus_entropy(inputs.hidden, inputs.weight, top_p=0.9, options=Options(plan="recompute"))


def test_every_input_has_a_gradient_where_nothing_counts() -> None:
    leaves = make_inputs(5, 4, 9, bias=True).leaves()
    values = nucleus_entropy(leaves[0], leaves[1], bias=leaves[2], top_p=0.9, mask=torch.zeros(5, dtype=torch.bool))
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(values.sum(), leaves))
