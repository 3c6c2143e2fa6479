"""No [N, V] is ever alive: measured by PyTorch's own accounting of what is allocated."""

from __future__ import annotations

import pytest
import torch

from eapo_kernels import Options, TokenBatch, eapo_loss, token_stats
from eapo_kernels.testing import Inputs, eager_token_stats, make_inputs, peak_memory

D, V = 32, 20_000
BUDGET = 8 * 2**20


def work(inputs: Inputs, schedule: str) -> list[torch.Tensor]:
    leaves = inputs.leaves()
    n = inputs.targets.numel()
    options = Options(memory_budget=BUDGET)
    if schedule == "op":
        stats = token_stats(*leaves, inputs.targets, options=options)
        return list(torch.autograd.grad(stats.logp.sum() + stats.entropy.sum(), leaves))
    batch = TokenBatch(
        targets=inputs.targets,
        sequence_ids=torch.arange(n, device=inputs.hidden.device) % 8,
        rewards=torch.linspace(0, 1, 8, device=inputs.hidden.device),
        group_ids=torch.arange(8, device=inputs.hidden.device) // 4,
    )
    out = eapo_loss(*leaves, batch, positive_weight=1.0, schedule=schedule, options=options)
    return list(torch.autograd.grad(out.loss, leaves))


@pytest.mark.parametrize("schedule", ["op", "autograd", "one_pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspace_is_bounded_whatever_the_number_of_tokens(schedule: str, dtype: torch.dtype, device: str) -> None:
    work(make_inputs(8, D, V, dtype=dtype, device=device), schedule)
    peaks = {}
    for n in (512, 2048):
        inputs = make_inputs(n, D, V, dtype=dtype, device=device)
        peaks[n] = peak_memory(lambda inputs=inputs: work(inputs, schedule), device)
    gradients = 2 * V * D * 4 + 3 * 2048 * D * 4  # d_weight with its accumulator, d_hidden with its
    widened = V * D * 4 if dtype == torch.bfloat16 else 0  # the CPU's fp32 operands
    vectors = 100 * 2048 * 8
    assert peaks[2048] <= BUDGET + gradients + widened + vectors
    assert peaks[2048] < 0.25 * 2048 * V * 4, "a quarter of one [N, V]"
    growth = peaks[2048] - peaks[512]
    assert growth <= 1536 * (3 * D * 4 + 800) + 2**20, "grows with N by rows of hidden and vectors, not by logits"


@pytest.mark.parametrize("schedule", ["autograd", "one_pass"])
def test_forward_alone_stays_within_the_budget(schedule: str, device: str) -> None:
    inputs = make_inputs(1024, 4, V, device=device)
    batch = TokenBatch(inputs.targets, torch.arange(1024) % 8, torch.linspace(0, 1, 8), torch.arange(8) // 4)
    batch = TokenBatch(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()})

    @torch.no_grad()
    def loss() -> object:
        return eapo_loss(
            inputs.hidden, inputs.weight, batch, positive_weight=1.0, schedule=schedule, options=Options(memory_budget=BUDGET)
        )

    loss()
    assert peak_memory(loss, device) <= BUDGET + 2**20


def test_eager_pytorch_exceeds_the_budget(device: str) -> None:
    """The memory accounting of this file sees logits where there are any."""
    inputs = make_inputs(512, D, V, device=device)
    leaves = inputs.leaves()

    def eager() -> object:
        return torch.autograd.grad(eager_token_stats(*leaves, inputs.targets).logp.sum(), leaves)

    assert peak_memory(eager, device) > 2 * 512 * V * 4


def test_statistics_alone_hold_no_more_than_the_cache_does() -> None:
    """On a CPU, whatever the budget: 160 MB of logits go through a buffer of 32 MiB."""
    inputs = make_inputs(2048, 4, V)
    with torch.no_grad():
        peak = peak_memory(lambda: token_stats(inputs.hidden, inputs.weight, inputs.targets), "cpu")
    vectors = 100 * 2048 * 8
    assert peak <= 32 * 2**20 + vectors
