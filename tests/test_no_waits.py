"""Host synchronizations of the losses, counted on CPU tensors that report a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import CONFIGS, D, N, V, make_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eapo_kernels import EapoError, Options, TokenBatch, eapo_loss, token_stats
from eapo_kernels.ops import token_stats as op
from eapo_kernels.testing import Inputs, make_inputs

aten = torch.ops.aten
ASKING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.argwhere, aten.nonzero_numpy,
}  # fmt: skip
"""What waits for a CUDA device; so do boolean indices and ``repeat_interleave`` without a size."""


class Asked(TorchDispatchMode):
    """Counts the operations that would synchronize on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = function.overloadpacket
        indices = args[1] if packet in (aten.index, aten.index_put, aten.index_put_) else ()
        boolean = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
        repeated = packet is aten.repeat_interleave and (kwargs or {}).get("output_size") is None
        self.times += packet in ASKING or boolean or repeated
        return function(*args, **(kwargs or {}))


def pose(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on tensors report a CUDA device."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("EAPO_KERNELS_BACKEND", "torch")


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[int, int]]:
    """How often a function's forward and its backward would synchronize on CUDA."""
    pose(monkeypatch)
    mode = Asked()

    def inside(real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:  # a mode does not look into a custom op by itself
            with mode:
                return real(*args, **options)

        return watched

    for name in ("compute_statistics", "gradients_of_saved", "gradients_by_recomputing"):
        monkeypatch.setattr(op, name, inside(getattr(op, name)))

    def shown(tensor: Tensor, **_: Any) -> str:  # reads the values, out of sight of any mode
        mode.times += 1
        return "tensor"

    monkeypatch.setattr(torch.Tensor, "__repr__", shown)

    def run(function: Callable[[], Tensor]) -> tuple[int, int]:
        mode.times = 0
        with mode:
            loss = function()
        forward = mode.times
        loss.backward()
        return forward, mode.times - forward

    return run


def problem(masked: bool) -> tuple[Inputs, TokenBatch, list[Tensor]]:
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs, masked=masked)
    return inputs, batch, [t.detach().requires_grad_() for t in (inputs.hidden, inputs.weight)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("schedule", ["one_pass", "autograd"])
@pytest.mark.parametrize("budget", [None, V * 16 * 64], ids=["one_chunk", "chunks"])
def test_a_loss_without_a_mask_does_not_synchronize(name: str, schedule: str, budget: int | None, count: Any) -> None:
    config = CONFIGS[name]
    if config.scope == "sequence":
        schedule = "autograd"
    _, batch, leaves = problem(masked=False)
    options = Options(memory_budget=budget)
    times = count(
        lambda: eapo_loss(*leaves, batch, positive_weight=0.7, config=config, schedule=schedule, options=options).loss
    )
    assert times == (0, 0) or config.drop_zero_weight
    assert times <= ((1, 0) if schedule == "one_pass" else (1, 1))


@pytest.mark.parametrize("entropy", ["grad", "nograd"])
def test_the_op_without_a_mask_does_not_synchronize(entropy: str, count: Any) -> None:
    inputs, _, leaves = problem(masked=False)
    targets = torch.where(torch.arange(N) % 3 == 0, -100, inputs.targets)
    assert count(lambda: token_stats(*leaves, targets, entropy=entropy).logp.sum()) == (0, 0)


@pytest.mark.parametrize(("schedule", "times"), [("one_pass", (1, 0)), ("autograd", (1, 1))])
def test_a_mask_costs_one_wait_a_direction(schedule: str, times: tuple[int, int], count: Any) -> None:
    """Autograd: one in the forward, one in the backward."""
    _, batch, leaves = problem(masked=True)
    asked = count(lambda: eapo_loss(*leaves, batch, positive_weight=0.7, schedule=schedule).loss)
    assert asked == times
    asked = count(
        lambda: eapo_loss(*leaves, batch, positive_weight=0.7, schedule=schedule, options=Options(compact=False)).loss
    )
    assert asked == (0, 0)


@pytest.mark.parametrize("schedule", ["one_pass", "autograd"])
def test_rows_that_the_host_selects_cost_no_wait_and_no_work(schedule: str, count: Any) -> None:
    _, batch, leaves = problem(masked=True)
    masked = [t.detach().clone().requires_grad_() for t in leaves]
    expected = eapo_loss(*masked, batch, positive_weight=0.7, schedule=schedule).loss
    expected.backward()
    rows = batch.mask.nonzero().squeeze(1)  # the host's own knowledge: a CPU mask, or the lengths of the responses
    few = replace(batch.select(rows), mask=None)
    losses = []

    def selected() -> Tensor:
        losses.append(eapo_loss(leaves[0][rows], leaves[1], few, positive_weight=0.7, schedule=schedule).loss)
        return losses[0]

    assert count(selected) == (0, 0)
    torch.testing.assert_close(losses[0], expected)
    for got, plain in zip(leaves, masked, strict=True):
        torch.testing.assert_close(got.grad, plain.grad, rtol=1e-4, atol=1e-7)


def test_targets_of_minus_100_without_a_mask_are_left_out_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows are multiplied, and may hold anything."""
    inputs = make_inputs(N, D, V)
    out = torch.arange(N) % 3 == 0
    targets = torch.where(out, -100, inputs.targets)
    hidden = torch.where(out[:, None], torch.nan, inputs.hidden)
    expected, *gradients = _gradients(inputs.hidden, inputs.weight, targets)
    pose(monkeypatch)
    for got, plain in zip(_gradients(hidden, inputs.weight, targets), (expected, *gradients), strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-6)


def _gradients(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    logp = token_stats(*leaves, targets, entropy="nograd").logp
    return (logp.detach(), *torch.autograd.grad(logp.sum(), leaves))


def test_bad_compact() -> None:
    with pytest.raises(EapoError, match=r"Options.compact: expected 'auto', True or False, got 'device'"):
        Options(compact="device")
