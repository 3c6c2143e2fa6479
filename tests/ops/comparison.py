"""What the tests of every backend compare with: the float64 oracle and eager PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_kernels import Options, TokenBatch, reference, token_stats
from eapo_kernels.ops.dispatch import LogitGradient
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.testing import Inputs, assert_no_worse_than, eager_token_stats, make_inputs
from eapo_kernels.types import TokenStats

GRADIENT_FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""The last rounding to the dtype (statistics are fp32 for every dtype)."""

STATISTICS_FLOOR = 1e-6


def keep_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 operands stay fp16, as on CUDA, where the products multiply them: the CPU would widen them."""
    plain = Projection.operand_dtype.fget
    assert plain is not None
    kept = property(lambda p: torch.float16 if p.hidden.dtype == torch.float16 else plain(p))
    monkeypatch.setattr(Projection, "operand_dtype", kept)


def cotangents(n: int, which: str = "all", device: str = "cpu") -> Tensor:
    """[3, n] random cotangents of logp, entropy and lse, zero for all but ``which``."""
    values = torch.randn(3, n, generator=torch.Generator().manual_seed(7))
    keep = torch.tensor([which in (name, "all") for name in ("logp", "entropy", "lse")])
    return (values * keep[:, None]).to(device)


def run(function: Any, inputs: Inputs, weights: Tensor, **options: Any) -> tuple[TokenStats, tuple[Tensor, ...]]:
    """Statistics, and gradients of their sum weighted by ``weights`` [3, N]."""
    leaves = inputs.leaves()
    stats = function(inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, **options)
    pairs = zip((stats.logp, stats.entropy, stats.lse), weights.to(stats.logp.dtype), strict=True)
    loss = sum((s * c).sum() for s, c in pairs if bool((c != 0).any()))
    return stats, torch.autograd.grad(loss, leaves)


def compare(
    inputs: Inputs, weights: Tensor, options: Options | None = None, *, backend: str = "auto", **transform: Any
) -> None:
    """A backend is no worse than twice eager PyTorch in statistics and gradients, plus the floors."""
    dtype = inputs.hidden.dtype
    doubled = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in transform.items()}
    reference_stats, exact_grads = run(reference.token_stats, inputs.to(torch.float64), weights, **doubled)
    eager, eager_grads = run(eager_token_stats, inputs.to(dtype), weights, **transform)
    actual, grads = run(token_stats, inputs.to(dtype), weights, options=options, backend=backend, **transform)
    for name in TokenStats._fields:
        got, plain, exact = (getattr(s, name) for s in (actual, eager, reference_stats))
        if exact is not None:
            assert got.dtype == torch.float32
            assert_no_worse_than(got, plain, exact, floor=STATISTICS_FLOOR, name=name)
    for name, got, plain, exact in zip(("hidden", "weight", "bias"), grads, eager_grads, exact_grads, strict=False):
        assert got.dtype == dtype
        assert_no_worse_than(got, plain, exact, floor=GRADIENT_FLOOR[dtype], name=f"d_{name}")


def dense(gradient: LogitGradient) -> Tensor:
    """[C, V] float64, a chunk's gradient written out."""
    assert gradient.matrix is not None
    assert gradient.row_scale is not None
    full = gradient.matrix.double() * gradient.row_scale.double().unsqueeze(1)
    if gradient.entries is not None:
        rows, ids, values, _ = gradient.entries
        full.index_put_((rows, ids), values.double(), accumulate=True)
    return full


def projection(inputs: Inputs, **transform: Any) -> Projection:
    """The record that backends take, without gradient."""
    bias = None if inputs.bias is None else inputs.bias.detach()
    return Projection(inputs.hidden.detach(), inputs.weight.detach(), bias, **transform)


def compare_saved(inputs: Inputs, budget: int, *, backend: str = "auto", mask: Tensor | None = None, **transform: Any) -> None:
    """``compare`` for log-probs alone, whose gradient matrix the forward keeps as far as ``budget`` bytes go."""
    dtype = inputs.hidden.dtype
    weights = cotangents(inputs.targets.numel(), "logp", str(inputs.targets.device))
    options = Options(memory_budget=budget)
    masked = {} if mask is None else {"mask": mask}
    reference_stats, exact_grads = run(reference.token_stats, inputs.to(torch.float64), weights, **transform, **masked)
    _, eager_grads = run(eager_token_stats, inputs.to(dtype), weights, **transform, **masked)
    more = {"backend": backend, "options": options, "entropy": "nograd", **transform, **masked}
    actual, grads = run(token_stats, inputs.to(dtype), weights, **more)
    plain, _ = run(
        token_stats, inputs.to(dtype), weights, **more | {"options": Options(memory_budget=budget, plan="recompute")}
    )
    for name in ("logp", "entropy", "lse"):
        torch.testing.assert_close(getattr(actual, name), getattr(plain, name), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(getattr(actual, name).double(), getattr(reference_stats, name), rtol=2e-4, atol=2e-4)
    for name, got, eager, exact in zip(("hidden", "weight", "bias"), grads, eager_grads, exact_grads, strict=False):
        assert got.dtype == dtype
        assert_no_worse_than(got, eager, exact, floor=GRADIENT_FLOOR[dtype], name=f"d_{name}")


def check_custom_op(
    backend: str, device: str, *, entropy: bool, second_moments: bool, dtype: torch.dtype = torch.float32, save: bool = False,
    softcap: float | None = None,
) -> None:  # fmt: skip
    """The forward op keeps the contract of ``torch.library``: with saved rows, or where a row is left out.

    No trace saves rows. So their V is one that needs no padding, which the fake op leaves out, and their N is no symbol.
    """
    inputs = make_inputs(9, 8, 48 if save else 33, dtype=dtype, device=device)
    hidden, weight = inputs.leaves()
    targets, rows = inputs.targets.clone(), torch.ones(9, device=device)
    if not save:
        targets[2] = -100
    transform = (rows, 1.0, 1.0, softcap, "", ())
    how = (backend, 2**20, True, "one_chunk" if save else "recompute", None, False)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(
        torch.ops.eapo_kernels.token_stats.default,
        (hidden, weight, None, targets, *transform, *how, entropy, second_moments, save),
        test_utils=checks if save else [*checks, "test_aot_dispatch_dynamic"],
    )


def check_compiles_once(backend: str, device: str, dtype: torch.dtype = torch.float32) -> None:
    """One graph whatever N is, with the gradients of the plain call."""
    inputs = make_inputs(64, 16, 99, dtype=dtype, device=device)
    weight = inputs.weight.requires_grad_()

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        stats = token_stats(hidden, weight, targets, inv_temperature=0.9, backend=backend)
        return stats.logp.sum() + 0.1 * stats.entropy.sum()

    loss = torch.compile(plain, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.reset()
    for n in (64, 40, 23):
        hidden, targets = inputs.hidden[:n].clone(), inputs.targets[:n].clone()
        with torch._dynamo.config.patch(error_on_recompile=n != 64):
            value = loss(hidden, weight, targets)
        (gradient,) = torch.autograd.grad(value, [weight])
        (expected,) = torch.autograd.grad(plain(hidden, weight, targets), [weight])
        torch.testing.assert_close(gradient, expected)


def policy_batch(inputs: Inputs, device: str) -> TokenBatch:
    """Eight responses in two groups, a fifth of the tokens masked, old log-probs near the policy's."""
    g = torch.Generator().manual_seed(3)
    n = inputs.targets.numel()
    wide = inputs.to(torch.float64)
    logp = reference.token_stats(wide.hidden, wide.weight, wide.targets, bias=wide.bias).logp.float().cpu()
    batch = TokenBatch(
        targets=inputs.targets,
        sequence_ids=torch.randint(8, (n,), generator=g).sort().values,
        rewards=torch.rand(8, generator=g),
        group_ids=torch.tensor([0, 0, 0, 0, 5, 5, 5, 5]),
        old_logp=logp + 0.3 * torch.randn(n, generator=g),
        mask=torch.rand(n, generator=g) > 0.2,
    )
    return replace(batch, **{k: v.to(device) for k, v in vars(batch).items() if isinstance(v, Tensor)})
