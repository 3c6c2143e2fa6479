"""Cross-entropy with everything that packages offer beside it, against dense float64 results and eager PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from comparison import keep_fp16
from ranks import WORLD, run_ranks
from torch import Tensor

from eapo_kernels import EapoError, Options, ShapeError
from eapo_kernels.integrations import linear_cross_entropy
from eapo_kernels.integrations.cross_entropy import REDUCTIONS, cross_entropy
from eapo_kernels.ops import logit_sums
from eapo_kernels.testing import Inputs, assert_no_worse_than, make_inputs, peak_memory

N, D, V = 37, 24, 301
SMALL = Options(memory_budget=2**13)  # several blocks of rows and of columns
FLOORS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
CLASS_WEIGHTS = torch.rand(V, generator=torch.Generator().manual_seed(3)) + 0.5

EXTRAS: dict[str, dict[str, Any]] = {
    "z": {"z_loss": 1e-2},
    "smoothing": {"label_smoothing": 0.2},
    "weights": {"class_weights": CLASS_WEIGHTS},
    "weights and smoothing": {"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.3},
    "scaling": {"token_scaling": True},
    "all": {"z_loss": 1e-2, "label_smoothing": 0.1, "class_weights": CLASS_WEIGHTS, "token_scaling": True},
}


def _inputs(dtype: torch.dtype = torch.float32) -> Inputs:
    inputs = make_inputs(N, D, V, dtype=dtype, bias=True)
    inputs.targets[::5] = -100
    return inputs


def _dense(
    inputs: Inputs, *, reduction: str = "mean", softcap: float | None = None, scale: float = 1.0, z_loss: float = 0.0,
    label_smoothing: float = 0.0, class_weights: Tensor | None = None, token_scaling: bool = False,
) -> Tensor:  # fmt: skip
    """The loss from all logits, by PyTorch's cross_entropy."""
    z = F.linear(inputs.hidden, inputs.weight, inputs.bias)
    z = z.float() if z.dtype != torch.float64 else z
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) * scale
    valid, weights = inputs.targets != -100, None if class_weights is None else class_weights.to(z.dtype)
    rows = F.cross_entropy(z, inputs.targets, weight=weights, label_smoothing=label_smoothing, reduction="none")
    penalty = torch.where(valid, z.logsumexp(-1).square() * z_loss, 0.0)
    if token_scaling:
        p = z.detach().softmax(-1).gather(1, inputs.targets.clamp_min(0)[:, None])[:, 0]
        rows, penalty = rows * p, penalty * p
    if reduction == "mean":
        total = valid.sum() if weights is None else weights[inputs.targets[valid]].sum()
        return rows.sum() / total + penalty.sum() / valid.sum()
    return rows + penalty if reduction == "none" else (rows + penalty).sum()


def _gradients(loss: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    cotangent = torch.linspace(0.5, 1.5, loss.numel()).to(loss.dtype).reshape(loss.shape)
    return torch.autograd.grad(loss, inputs.leaves(), cotangent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(("extras", "reduction"), [*((name, r) for name in EXTRAS for r in ("mean", "none")), ("all", "sum")])
def test_every_extra_is_that_of_the_logits(
    extras: str, softcap: float | None, reduction: str, dtype: torch.dtype, poisoned: None
) -> None:
    given = {**EXTRAS[extras], "reduction": reduction, "softcap": softcap}
    losses, gradients = [], []
    for numbers, function in ((_inputs(dtype).to(torch.float64), _dense), (_inputs(dtype), _dense)):
        numbers.leaves()
        losses.append(function(numbers, **given, scale=0.7))
        gradients.append(_gradients(losses[-1], numbers))
    inputs = _inputs(dtype)
    inputs.leaves()
    found = linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.targets, inputs.bias, inv_temperature=0.7, options=SMALL, **given
    )
    assert isinstance(found, Tensor)
    assert found.dtype == torch.float32
    assert_no_worse_than(found, losses[1], losses[0], floor=1e-6)
    for name, ours, eager, exact in zip(
        ["hidden", "weight", "bias"], _gradients(found, inputs), *reversed(gradients), strict=True
    ):
        assert ours.dtype == dtype
        assert_no_worse_than(ours, eager, exact, floor=FLOORS[dtype], name=f"d_{name}")


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_fp16_operands_keep_small_gradients(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where the products multiply fp16: the share of a class and the cotangents are below its range."""
    keep_fp16(monkeypatch)
    found = []
    for dtype in (torch.float16, torch.float64):
        inputs = _inputs(torch.float16).to(dtype)
        inputs.leaves()
        given: dict[str, Any] = {"label_smoothing": 1.0, "softcap": softcap, "options": SMALL}
        loss = linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, inputs.bias, **given)
        assert isinstance(loss, Tensor)
        found.append([g / 1e4 for g in torch.autograd.grad(loss * 1e4, inputs.leaves())])
    for name, ours, exact in zip(("hidden", "weight", "bias"), *found, strict=True):
        error = (ours.double() - exact).norm() / exact.norm()
        assert error < 3e-3, f"d_{name}: {error:.1e}"


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [False, True])
def test_float64_is_exact(softcap: float | None, temperature: bool) -> None:
    inputs = _inputs().to(torch.float64)
    rows = torch.linspace(0.5, 2, N, dtype=torch.float64)
    inputs.leaves()
    given = {**EXTRAS["all"], "softcap": softcap}
    exact = _dense(inputs, scale=rows[:, None] if temperature else 1.0, **given)  # type: ignore[arg-type]
    found = linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.targets, inputs.bias, inv_temperature=rows if temperature else 1.0, options=SMALL,
        **given,
    )  # fmt: skip
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(_gradients(found, inputs), _gradients(exact, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shift", [0, 1, 3, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shift_predicts_a_later_target(shift: int, reduction: str) -> None:
    inputs = make_inputs(24, D, V)
    targets, hidden = inputs.targets.reshape(2, 3, 4).clone(), inputs.hidden.reshape(2, 3, 4, D).requires_grad_()
    targets[0, 1, 2] = -7
    call: dict[str, Any] = {"ignore_index": -7, "reduction": reduction, "z_loss": 0.01}
    first, last = hidden[..., : 4 - shift, :], targets[..., int(shift) :]
    plain, lse = linear_cross_entropy(first, inputs.weight, last, return_lse=True, **call)
    found, shifted = linear_cross_entropy(hidden, inputs.weight, targets, return_lse=True, shift=shift, **call)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(shifted, lse)
    assert shifted.shape == last.shape
    z = torch.where(last == -7, 0, (first @ inputs.weight.T).logsumexp(-1))
    torch.testing.assert_close(lse, z)
    gradients = [torch.autograd.grad(value.sin().sum(), hidden, retain_graph=True)[0] for value in (shifted, z)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"shift: expected an integer in \[0, 4\)"):
        linear_cross_entropy(hidden, inputs.weight, targets, shift=4)


@pytest.mark.parametrize("softcap", [None, 0.01])
@pytest.mark.parametrize("compact", [True, False])
def test_the_predicted_class_is_the_first_of_the_largest(softcap: float | None, compact: bool, poisoned: None) -> None:
    inputs = _inputs()
    inputs.weight[200:] = inputs.weight[: V - 200]  # ties; a soft-cap of 0.01 makes many more
    assert inputs.bias is not None
    inputs.bias[200:] = inputs.bias[: V - 200]
    inputs.hidden[inputs.targets == -100] = torch.nan
    z = F.linear(inputs.hidden, inputs.weight, inputs.bias).double()
    z = z if softcap is None else (z / softcap).float().tanh().double()
    options = Options(memory_budget=2**13, compact=compact)
    found = cross_entropy(
        inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, softcap=softcap, predicted=True, options=options
    )
    assert found.predicted is not None
    expected = torch.where(found.valid, z.argmax(-1), -1)
    same_value = z.gather(1, found.predicted.clamp_min(0)[:, None])[:, 0] >= z.amax(-1) - 1e-6
    assert torch.equal(found.predicted == -1, expected == -1)
    assert (same_value | ~found.valid).all()
    if softcap is None:
        assert torch.equal(found.predicted, expected)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_nan_in_masked_rows_has_no_effect(softcap: float | None, compact: bool) -> None:
    results = []
    for filler in (0.0, torch.nan):
        inputs = _inputs()
        inputs.hidden[inputs.targets == -100] = filler
        inputs.leaves()
        loss = linear_cross_entropy(
            inputs.hidden, inputs.weight, inputs.targets, inputs.bias, softcap=softcap,
            options=Options(memory_budget=2**13, compact=compact), **EXTRAS["all"],
        )  # fmt: skip
        assert isinstance(loss, Tensor)
        results.append((loss, *_gradients(loss, inputs)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows_give_zero(reduction: str) -> None:
    inputs = _inputs()
    inputs.leaves()
    for targets in (torch.full_like(inputs.targets, -100), inputs.targets[:0]):
        loss = linear_cross_entropy(
            inputs.hidden[: len(targets)], inputs.weight, targets, inputs.bias, reduction=reduction, **EXTRAS["all"]
        )
        assert isinstance(loss, Tensor)
        assert torch.equal(loss, torch.zeros_like(loss))
        assert all((g == 0).all() for g in _gradients(loss, inputs))


@pytest.mark.parametrize("softcap", [None, 10.0])
def test_extras_store_no_logits(softcap: float | None) -> None:
    n, d, v = 512, 64, 8192
    inputs = make_inputs(n, d, v)
    inputs.leaves()
    weights = torch.rand(v)

    def step() -> None:
        found = cross_entropy(
            inputs.hidden, inputs.weight, inputs.targets, softcap=softcap, z_loss=1e-3, label_smoothing=0.1,
            class_weights=weights, token_scaling=True, predicted=True, lse=True, options=Options(memory_budget=2**20),
        )  # fmt: skip
        torch.autograd.grad(found.loss, [inputs.hidden, inputs.weight])

    gradients = 2 * 4 * (n * d + v * d)  # those of the statistics and of the mean logit
    assert peak_memory(step) < gradients + 3 * 2**20 < n * v * 4


@pytest.mark.parametrize(("extras", "softcap"), [("z", None), ("all", 4.0)])
def test_extras_compile_in_one_graph(extras: str, softcap: float | None) -> None:
    torch.compiler.reset()
    inputs = _inputs()
    inputs.leaves()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, smoothing: float, z: float) -> Tensor:
        given = {**EXTRAS[extras], "label_smoothing": smoothing, "z_loss": z}
        found = cross_entropy(hidden, weight, inputs.targets, bias=bias, softcap=softcap, predicted=True, lse=True, **given)
        assert found.predicted is not None
        assert found.lse is not None
        return found.loss + found.lse.mean() + (found.predicted == inputs.targets).float().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step, (smoothing, z) in enumerate([(0.1, 0.01), (0.2, 0.02), (0.3, 0.04)]):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            found = compiled(*inputs.leaves(), smoothing, z)
        expected = loss(*inputs.leaves(), smoothing, z)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected)
        for a, b in zip(_gradients(found, inputs), _gradients(expected, inputs), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_the_ops_keep_the_contract_of_torch_library(softcap: float | None) -> None:
    inputs = make_inputs(9, 8, 33, bias=True)
    hidden, weight, bias = inputs.leaves()
    valid = torch.arange(9) != 4
    how = (None, 1.0, 1.0, softcap, "", (), 2**20, True)
    factors = torch.rand(33)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"]
    torch.library.opcheck(logit_sums._sums_op, (hidden, weight, bias, factors, valid, *how), test_utils=checks)
    torch.library.opcheck(
        logit_sums._largest_op,
        (hidden.detach(), weight.detach(), bias.detach(), valid, *how),
        test_utils=["test_schema", "test_faketensor"],
    )


def _split(rank: int, directory: str) -> None:
    whole = _inputs()
    rows = [slice(0, 170), slice(170, V)][rank]
    results: list[Any] = []
    for softcap in (None, 4.0):
        part = Inputs(whole.hidden.clone(), whole.weight[rows].clone(), whole.targets, whole.bias[rows].clone())  # type: ignore[index]
        part.leaves()
        found = cross_entropy(
            part.hidden, part.weight, part.targets, bias=part.bias, softcap=softcap, predicted=True, lse=True,
            process_group=dist.group.WORLD, options=Options(memory_budget=2**13, debug=True), **EXTRAS["all"],
        )  # fmt: skip
        results.append((found.loss.detach(), found.predicted, *_gradients(found.loss, part)))
    torch.save(results, f"{directory}/{rank}.pt")
    with pytest.raises(EapoError, match="label_smoothing: expected the same on all ranks"):
        linear_cross_entropy(
            part.hidden, part.weight, part.targets, part.bias, label_smoothing=0.1 * (rank + 1), process_group=dist.group.WORLD,
            options=Options(debug=True),
        )  # fmt: skip


def test_a_split_head_has_the_same_extras(tmp_path: Path) -> None:
    run_ranks(_split, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for case, softcap in enumerate((None, 4.0)):
        inputs = _inputs()
        inputs.leaves()
        found = cross_entropy(
            inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, softcap=softcap, predicted=True, **EXTRAS["all"]
        )
        d_hidden, d_weight, d_bias = _gradients(found.loss, inputs)
        for loss, predicted, part, _, _ in (rank[case] for rank in ranks):
            torch.testing.assert_close(loss, found.loss)
            assert torch.equal(predicted, found.predicted)
            torch.testing.assert_close(part, d_hidden, rtol=1e-4, atol=1e-6)
        for place, expected in ((3, d_weight), (4, d_bias)):
            torch.testing.assert_close(torch.cat([rank[case][place] for rank in ranks]), expected, rtol=1e-4, atol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(ranks[0][case][:3], ranks[1][case][:3], strict=True))


def test_mistakes_say_what_was_expected() -> None:
    inputs = _inputs()
    for given, message in (
        ({"z_loss": -1.0}, "z_loss: expected a finite number >= 0"),
        ({"label_smoothing": 1.5}, r"label_smoothing: expected a finite number in \[0, 1\]"),
        ({"class_weights": torch.ones(V - 1)}, r"class_weights: expected float \[301\]"),
        ({"class_weights": torch.ones(V, dtype=torch.int64)}, "class_weights: expected float"),
        ({"shift": -1}, "shift: expected an integer"),
        ({"shift": 1.0}, "shift: expected an integer"),
    ):
        with pytest.raises(EapoError, match=message):
            linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, **given)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="hidden"):
        linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets[1:])
    bad = inputs.targets.clone()
    bad[3] = V
    with pytest.raises(EapoError, match="targets: expected values in"):
        linear_cross_entropy(inputs.hidden, inputs.weight, bad, class_weights=CLASS_WEIGHTS)


def test_a_single_row_and_factors_of_zero() -> None:
    """Targets [] have a loss too. A factor of zero leaves nothing of a row, also where the bias removed its target."""
    hidden, weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]], requires_grad=True), torch.tensor([[0.5, -1.0], [1.0, 0.0]])
    targets, expected = torch.tensor([0, 1]), F.cross_entropy(hidden @ weight.T, torch.tensor([0, 1]), reduction="none")
    for extra in ({}, {"class_weights": torch.ones(2)}, {"z_loss": 0.0, "return_lse": True}):
        for i in range(2):
            found = linear_cross_entropy(hidden[i], weight, targets[i], **extra)
            torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, expected[i])
    removed = torch.tensor([-torch.inf, 0.0])
    for extra in ({"token_scaling": True}, {"class_weights": torch.tensor([0.0, 3.0])}):
        found = linear_cross_entropy(hidden, weight, targets, removed, reduction="none", **extra)
        assert found.tolist() == [0, 0]
        (gradient,) = torch.autograd.grad(found.sum(), hidden)
        assert gradient.tolist() == [[0, 0], [0, 0]]
    assert linear_cross_entropy(hidden, weight, targets, class_weights=torch.zeros(2)) == 0
