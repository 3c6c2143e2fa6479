"""Targets out of range, which CUDA calls do not check: their rows are NaN, in every form, and the other rows do not change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import policy_batch

from eapo_kernels import Options, loss, policy_loss, token_stats
from eapo_kernels.ops import chunking, torch_backend
from eapo_kernels.ops import token_stats as op
from eapo_kernels.testing import make_inputs

N, D, V = 40, 16, 700
WRONG = {3: V, 4: V + 5, 20: -1, 21: -7, 39: 2**40}
BACKENDS = ("torch", "triton")


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (op, loss):
        monkeypatch.setattr(module, "check_values", lambda *arguments: None)


def problem(dtype: torch.dtype, device: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """(inputs, targets with the wrong ones, where they are [N])."""
    inputs = make_inputs(N, D, V, dtype=dtype, device=device)
    targets, wrong = inputs.targets.clone(), torch.zeros(N, dtype=torch.bool, device=device)
    for row, target in WRONG.items():
        targets[row], wrong[row] = target, True
    targets[7] = -100
    return inputs, targets, wrong


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [Options(), Options(plan="recompute")], ids=["saved", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slabs", [False, True], ids=["full", "slabs"])
def test_statistics(
    backend: str, options: Options, dtype: torch.dtype, slabs: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slabs:
        monkeypatch.setattr(chunking, "_MIN_SLAB", 256)
        monkeypatch.setattr(torch_backend, "_CACHE_BYTES", N * 256 * 8)
    inputs, targets, wrong = problem(dtype, device)
    hidden, weight = (t.detach().requires_grad_() for t in (inputs.hidden, inputs.weight))
    stats = token_stats(hidden, weight, targets, entropy="nograd", backend=backend, options=options)
    right = token_stats(hidden, weight, torch.where(wrong, 0, targets), entropy="nograd", backend=backend, options=options)
    assert torch.equal(stats.logp.isnan(), wrong)
    assert torch.equal(stats.logp[~wrong], right.logp[~wrong])
    assert torch.equal(stats.entropy[~wrong], right.entropy[~wrong])
    (d_hidden,) = torch.autograd.grad(stats.logp.sum(), [hidden])
    assert torch.equal(d_hidden.isnan().any(1), wrong)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["one_pass", "autograd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss(backend: str, schedule: str, dtype: torch.dtype, device: str) -> None:
    inputs, targets, _ = problem(dtype, device)
    batch = replace(policy_batch(inputs, device), targets=targets)
    out = policy_loss(inputs.hidden, inputs.weight, batch, method="grpo", schedule=schedule, backend=backend)
    assert out.loss.isnan()
