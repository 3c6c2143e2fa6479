"""Rows whose logit gradient the forward saves for the backward: all or none, and the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import compare_saved
from torch.utils.checkpoint import checkpoint

from eapo_kernels import EapoError, Options, token_stats
from eapo_kernels.ops import chunking, lm_head, torch_backend
from eapo_kernels.ops import token_stats as op
from eapo_kernels.ops.dispatch import Backend
from eapo_kernels.testing import make_inputs, peak_memory

N, D, V = 130, 24, 500
ROW = 6 * V  # bytes of a row of the workspace on the CPU: fp32 logits and half of that for a block's temporaries

BUDGETS = {"all": N * ROW, "none": N * ROW - 1}


def test_plan() -> None:
    assert chunking.autograd(100, 10, 1000) == chunking.Plan("one_chunk", 100, 3)
    assert chunking.autograd(1000, 10, 9999) == chunking.Plan("recompute", 0, 4)
    assert chunking.autograd(0, 10, 9999) == chunking.Plan("recompute", 0, 4)
    assert chunking.autograd(100, 10, 1000, "recompute") == chunking.Plan("recompute", 0, 4)
    with pytest.raises(EapoError, match=r"Options.memory_budget: expected at least 1010 bytes for plan 'one_chunk', got 1000"):
        chunking.autograd(101, 10, 1000, "one_chunk")


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients(budget: str, dtype: torch.dtype, device: str, poisoned: None) -> None:
    compare_saved(make_inputs(N, D, V, dtype=dtype, bias=True, device=device), BUDGETS[budget])


@pytest.mark.parametrize("transform", [{"softcap": 5.0}, {"logit_scale": 0.5, "inv_temperature": 1.3}], ids=str)
@pytest.mark.parametrize("budget", BUDGETS)
def test_transforms_and_masks(transform: dict[str, Any], budget: str, device: str, poisoned: None) -> None:
    mask = torch.rand(N, generator=torch.Generator().manual_seed(1)) > 0.3
    compare_saved(make_inputs(N, D, V, device=device), BUDGETS[budget], mask=mask.to(device), **transform)


def _spied(monkeypatch: pytest.MonkeyPatch, budget: int, entropy: str, *, save: bool = True, grad_entropy: bool = False) -> int:
    """Count the rows whose logits the backward recomputes."""
    rows = 0
    original = torch_backend.BACKEND.logit_gradient

    def spy(out: torch.Tensor, *args: Any) -> None:
        nonlocal rows
        rows += out.numel()
        original(out, *args)

    monkeypatch.setattr(Backend, "__setattr__", object.__setattr__)
    monkeypatch.setattr(torch_backend.BACKEND, "logit_gradient", spy)
    inputs = make_inputs(N, D, V)
    leaves = inputs.leaves()
    stats = token_stats(
        *leaves, inputs.targets, entropy=entropy, backend="torch", options=Options(budget, plan="auto" if save else "recompute")
    )
    loss = stats.logp.sum() + (stats.entropy.sum() if grad_entropy else 0)
    torch.autograd.grad(loss, leaves)
    return rows // V


def test_saved_rows_are_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _spied(monkeypatch, BUDGETS["all"], "nograd") == 0
    assert _spied(monkeypatch, BUDGETS["none"], "nograd") == N
    assert _spied(monkeypatch, BUDGETS["all"], "nograd", save=False) == N
    assert _spied(monkeypatch, BUDGETS["all"], "grad", grad_entropy=True) == N


def test_a_gradient_of_lse_recomputes(device: str) -> None:
    inputs = make_inputs(N, D, V, device=device)
    leaves = inputs.leaves()

    def gradients(save: bool) -> tuple[torch.Tensor, ...]:
        stats = token_stats(*leaves, inputs.targets, entropy="nograd", options=Options(plan="auto" if save else "recompute"))
        return torch.autograd.grad(stats.logp.sum() + 0.3 * stats.lse.sum(), leaves)

    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_nothing_is_saved_without_gradients(device: str) -> None:
    inputs = make_inputs(1024, 4, 20_000, device=device)
    options = Options(memory_budget=2**27)
    alive = []

    def statistics() -> None:
        alive.append(token_stats(inputs.hidden, inputs.weight, inputs.targets, entropy="nograd", options=options))

    statistics()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    statistics()
    if device == "cuda":
        assert torch.cuda.memory_allocated() - before < 2**20
    assert peak_memory(statistics, device) <= 2**27


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_parts(frozen: str, device: str) -> None:
    inputs = make_inputs(N, D, V, device=device)
    leaf = (inputs.weight if frozen == "hidden" else inputs.hidden).requires_grad_()

    def gradient(save: bool) -> torch.Tensor:
        stats = token_stats(
            inputs.hidden, inputs.weight, inputs.targets, entropy="none", options=Options(plan="auto" if save else "recompute")
        )
        return torch.autograd.grad(stats.logp.square().sum(), leaf)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-5, atol=1e-5)


def test_backward_twice(device: str) -> None:
    """The saved matrix is read, never written."""
    inputs = make_inputs(N, D, V, device=device)
    leaves = inputs.leaves()
    logp = token_stats(*leaves, inputs.targets, entropy="none").logp
    first = torch.autograd.grad(logp.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(logp.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_with_zero_cotangents_are_skipped(budget: str, device: str) -> None:
    """They cost no product, and a NaN in such a row reaches no gradient."""
    inputs = make_inputs(N, D, V, device=device)
    targets = inputs.targets.clone()
    targets[5:9] = -100
    wanted = torch.arange(N, device=device) % 3 > 0
    inputs.hidden[3] = float("nan")
    wanted[3] = False
    leaves = inputs.leaves()

    def gradients(options: Options) -> tuple[torch.Tensor, ...]:
        logp = token_stats(*leaves, targets, entropy="none", options=options).logp
        return torch.autograd.grad(torch.where(wanted, logp, 0).sum(), leaves)

    expected = gradients(Options(plan="recompute"))
    for ours, plain in zip(gradients(Options(BUDGETS[budget])), expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("forward_compacts", [True, False])
def test_compaction_may_differ_between_forward_and_backward(
    budget: str, forward_compacts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when only one of the two passes is captured into a CUDA graph."""
    inputs = make_inputs(N, D, V)
    targets = inputs.targets.clone()
    targets[::4] = -100
    leaves = inputs.leaves()
    expected = torch.autograd.grad(token_stats(*leaves, targets, entropy="none").logp.sum(), leaves)
    for module in (lm_head, op):
        monkeypatch.setattr(module, "may_compact", lambda tensor, compact: forward_compacts)
    logp = token_stats(*leaves, targets, entropy="none", options=Options(BUDGETS[budget])).logp
    for module in (lm_head, op):
        monkeypatch.setattr(module, "may_compact", lambda tensor, compact: not forward_compacts)
    for ours, plain in zip(torch.autograd.grad(logp.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_the_weight_gradient_is_rounded_a_slab_at_a_time(device: str) -> None:
    v, d = 60_000, 1024
    inputs = make_inputs(16, d, v, dtype=torch.bfloat16, device=device)
    leaves = inputs.leaves()

    def work() -> object:
        stats = token_stats(*leaves, inputs.targets, options=Options(2**25))
        return torch.autograd.grad(stats.logp.sum() + stats.entropy.sum(), leaves)

    work()
    widened = 8192 * d * 4 * 2 if device == "cpu" else 0  # pieces of the weight in fp32
    assert peak_memory(work, device) < 2 * v * d + 2**26 + 2**25 + widened + 2**23


@pytest.mark.parametrize("entropy", ["grad", "none"])
def test_activation_checkpointing(entropy: str) -> None:
    """Saved tensors are unpacked once, as non-reentrant checkpointing demands."""
    inputs = make_inputs(N, D, V)
    leaves = inputs.leaves()

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        return token_stats(*leaves, inputs.targets, entropy=entropy).logp.sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
