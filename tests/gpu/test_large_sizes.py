"""Sizes whose products cross 2^31 elements, where a 32-bit address wraps around. On a CPU the same
code at tiny sizes.

All statistics are compared with float64, the gradients in a sample of rows: the first, those around
element 2^31, the last. Memory of a GPU, at most and with all logits in the budget:
"logits" 35 GB, "weight" 25 GB, "hidden" 35 GB.
"""

from __future__ import annotations

import pytest
import torch
from exact_rows import Exact, exact_d_hidden, exact_d_weight, exact_statistics, random_inputs
from jobs import BACKENDS
from torch import Tensor

from eapo_kernels import Options, TokenBatch, eapo_loss, token_stats
from eapo_kernels.testing import Inputs, assert_no_worse_than

LARGE = {
    "logits": (16448, 64, 131075),  # N * V
    "weight": (96, 8200, 262400),  # V * D
    "odd_weight": (96, 8201, 262400),  # V * D, rows that no tensor descriptor can describe
    "hidden": (262400, 8200, 515),  # N * D
}
TINY = {"logits": (66, 16, 517), "weight": (10, 72, 1040), "odd_weight": (10, 73, 1040), "hidden": (300, 72, 51)}

NEEDED_BYTES = 45 * 2**30

STATISTICS_FLOOR = 4e-6
"""Of the largest value: sums of up to 8201 fp32 products, and fp32's own rounding of logits."""

GRADIENT_FLOOR = 8e-3
"""bf16's rounding of the logit gradient and of the result."""

pytestmark = pytest.mark.parametrize("name", LARGE)


@pytest.fixture
def inputs(name: str, device: str) -> Inputs:
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < NEEDED_BYTES:
        pytest.skip(f"needs a GPU with {NEEDED_BYTES / 2**30:.0f} GiB")
    n, d, v = (LARGE if device == "cuda" else TINY)[name]
    assert device == "cpu" or max(n * v, v * d, n * d) > 2**31
    return random_inputs(n, d, v, device)


def budget(inputs: Inputs, which: str) -> int | None:
    """The default, in which a block of logits stays below 2^31 elements; or all logits at
    once, at 16 bytes a logit."""
    return None if which == "default" else 16 * inputs.hidden.shape[0] * inputs.weight.shape[0]


def around_the_border(length: int, width: int, device: torch.device) -> Tensor:
    """Rows of a [length, width] matrix: the first, two on each side of element 2^31 (or of the
    middle), the last."""
    border = 2**31 // width if length * width > 2**31 else length // 2
    return torch.tensor([0, 1, border - 1, border, border + 1, length - 2, length - 1], device=device).clamp(0, length - 1)


def check_gradients(inputs: Inputs, exact: Exact, cotangents: Tensor, d_hidden: Tensor, d_weight: Tensor) -> None:
    (n, d), v, device = inputs.hidden.shape, inputs.weight.shape[0], inputs.hidden.device
    rows = torch.cat([around_the_border(n, d, device), around_the_border(n, v, device)]).unique()
    columns = torch.cat([around_the_border(v, d, device), inputs.targets[:2]]).unique()
    for name, got, reference in (
        ("d_hidden", d_hidden[rows], exact_d_hidden(inputs, exact, cotangents, rows)),
        ("d_weight", d_weight[columns], exact_d_weight(inputs, exact, cotangents, columns)),
    ):
        assert got.dtype == torch.bfloat16
        assert_no_worse_than(got, reference, reference, floor=GRADIENT_FLOOR, name=name)


def refuse_what_it_cannot_describe(backend: str, inputs: Inputs) -> None:
    """The CUDA kernels load rows of 16-byte multiples only."""
    if backend == "cuda" and inputs.hidden.shape[1] % 8:
        pytest.skip("rows that no tensor descriptor can describe")


@pytest.mark.parametrize("workspace", ["default", "all_logits"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_op(inputs: Inputs, backend: str, workspace: str) -> None:
    refuse_what_it_cannot_describe(backend, inputs)
    leaves = inputs.leaves()
    options = Options(memory_budget=budget(inputs, workspace))
    stats = token_stats(*leaves, inputs.targets, backend=backend, options=options)
    exact = exact_statistics(Inputs(*(t.detach() for t in leaves), inputs.targets))
    for field in ("logp", "entropy", "lse"):
        reference = getattr(exact, field)
        assert_no_worse_than(getattr(stats, field), reference, reference, floor=STATISTICS_FLOOR, name=field)
    generator = torch.Generator(leaves[0].device).manual_seed(7)
    cotangents = torch.randn(3, inputs.targets.numel(), generator=generator, device=leaves[0].device)
    gradients = torch.autograd.grad(stats[:3], leaves, list(cotangents))
    plain = Inputs(*(t.detach() for t in leaves), inputs.targets)
    check_gradients(plain, exact, cotangents.double(), *gradients)


def make_batch(inputs: Inputs, exact: Exact) -> TokenBatch:
    """Eight responses in two groups; ratios near e^-0.4, e^-0.1, e^0.1 and e^0.4, so none is near a
    bound of the clip."""
    n, device = inputs.targets.numel(), inputs.targets.device
    row = torch.arange(n, device=device)
    gap = torch.tensor([-0.4, -0.1, 0.1, 0.4], device=device)[row % 4]
    rewards = torch.tensor([1.0, 0.0, 0.3, 0.5, 2.0, 1.0, -1.0, 0.25], device=device)
    groups = torch.arange(8, device=device) // 4
    return TokenBatch(inputs.targets, row * 8 // n, rewards, groups, old_logp=exact.logp.float() + gap)


def typed_again(batch: TokenBatch, logp: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, dL/dlogp [N]) of E9 and E10 in float64 with lambda = 0.7 and the clip of PPO (arXiv
    1707.06347)."""
    rewards = batch.rewards.double().view(2, 4)
    margin = rewards - rewards.mean(1, keepdim=True)
    advantage = margin / (rewards.std(1, keepdim=True) + 1e-6)
    weighted = torch.where(margin > 0, 0.7 * advantage, advantage).flatten()[batch.sequence_ids]
    logp = logp.detach().requires_grad_()
    ratio = (logp - batch.old_logp.double()).exp()
    loss = -torch.minimum(ratio * weighted, ratio.clamp(0.8, 1.2) * weighted).mean()
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


@pytest.mark.parametrize("workspace", ["default", "all_logits"])
@pytest.mark.parametrize("schedule", ["one_pass", "autograd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss(inputs: Inputs, backend: str, schedule: str, workspace: str) -> None:
    refuse_what_it_cannot_describe(backend, inputs)
    exact = exact_statistics(inputs)
    batch = make_batch(inputs, exact)
    leaves = inputs.leaves()
    options = Options(memory_budget=budget(inputs, workspace))
    loss = eapo_loss(*leaves, batch, positive_weight=0.7, schedule=schedule, backend=backend, options=options).loss
    gradients = torch.autograd.grad(loss, leaves)
    plain = Inputs(*(t.detach() for t in leaves), inputs.targets)
    expected, d_logp = typed_again(batch, exact.logp)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-6)
    cotangents = torch.stack([d_logp, torch.zeros_like(d_logp), torch.zeros_like(d_logp)])
    check_gradients(plain, exact, cotangents, *gradients)
