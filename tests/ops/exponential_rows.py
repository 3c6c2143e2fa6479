"""A chunk of the scaled-exponential form beside the float64 oracle: what the tests of its kernels share."""

from __future__ import annotations

import math
from typing import Any

import torch
from comparison import dense
from torch import Tensor

from eapo_kernels import reference
from eapo_kernels.ops.dispatch import LogitCotangents
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.ops.triton.common import product_tile
from eapo_kernels.ops.triton.scaled_exp import ScaledExpChunk, window
from eapo_kernels.testing import assert_no_worse_than, eager_token_stats


def transform_of(p: Projection) -> dict[str, Any]:
    temperature = p.inv_temperature if p.row_inv_temperature is None else p.row_inv_temperature * p.inv_temperature
    return {"inv_temperature": temperature, "logit_scale": p.logit_scale}


def oracle(p: Projection, targets: Tensor) -> tuple[Any, Tensor]:
    """Statistics and d logp / d(raw logits) [N, V] in float64 (E2, E5)."""
    transform = {k: v.double() if isinstance(v, Tensor) else v for k, v in transform_of(p).items()}
    bias = None if p.bias is None else p.bias.double()
    hidden, weight = p.hidden.double(), p.weight.double()
    stats = reference.token_stats(hidden, weight, targets, bias=bias, **transform)
    raw = hidden @ weight.T
    raw = raw if bias is None else raw + bias
    scale = p.row_scale()
    scale = scale.double().unsqueeze(1) if isinstance(scale, Tensor) else scale
    one_hot = torch.nn.functional.one_hot(targets, p.vocab)
    return stats, (one_hot - torch.softmax(raw * scale, 1)) * scale


def run(p: Projection, targets: Tensor, logp_guess: Tensor | None, **options: Any) -> tuple[Any, Tensor, int]:
    """Statistics, d logp / d(raw logits), and the number of rows that were rescued."""
    chunk = ScaledExpChunk(p, targets, logp_guess, entropy=True, **options)
    stats = chunk.statistics()
    gradient = chunk.gradient(LogitCotangents(torch.ones_like(stats.logp)))
    assert gradient.matrix.dtype == p.operand_dtype
    assert (gradient.matrix.gather(1, targets.unsqueeze(1)) == 0).all()
    return stats, dense(gradient), int(chunk.sums.n_rescue)


def floor(p: Projection) -> float:
    return 1e-5 if p.operand_dtype == torch.float32 else torch.finfo(p.operand_dtype).eps


def check(p: Projection, targets: Tensor, logp_guess: Tensor | None) -> int:
    """No worse than twice eager PyTorch in the inputs' dtype, the gradient row by row. Returns the number of rescued rows."""
    exact, gradient = oracle(p, targets)
    eager = eager_token_stats(p.hidden, p.weight, targets, bias=p.bias, **transform_of(p))
    stats, got, rescued = run(p, targets, logp_guess)
    for name in ("logp", "entropy", "lse"):
        value = getattr(stats, name)
        assert value.dtype == torch.float32
        assert_no_worse_than(value, getattr(eager, name), getattr(exact, name), floor=2e-6, name=name)
        if p.hidden.dtype != torch.float32:
            assert float((value.double() - getattr(exact, name)).abs().max()) <= 1e-5, name
    assert (stats.logp <= 0).all()
    torch.testing.assert_close(stats.row_offset + stats.log_sum, stats.lse, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(stats.log_sum - stats.mean_shifted, stats.entropy, rtol=1e-6, atol=1e-6)
    error = (got - gradient).norm(dim=1)
    assert (error <= floor(p) * gradient.norm(dim=1) + 1e-30).all(), (error / gradient.norm(dim=1)).max()
    return rescued


def out_of_range(p: Projection, targets: Tensor, logp_guess: Tensor | None, block_v: int | None = None) -> Tensor:
    """[N] bool, the rows outside of their dtype's ``Window`` by float64. block_v: of the tiles, Triton's if None."""
    limits, block_v = window(p.operand_dtype), block_v or product_tile("scaled_exp_gemm", p).block_v
    raw = p.hidden.double() @ p.weight.double().T
    raw = raw if p.bias is None else raw + p.bias.double()
    scale = p.row_scale()
    bits = raw * (scale.double().unsqueeze(1) if isinstance(scale, Tensor) else scale) / math.log(2)
    at = targets.unsqueeze(1)
    below = torch.full_like(bits[:, 0], limits.without_guess)
    if logp_guess is not None:
        below = torch.where(logp_guess.isfinite(), logp_guess.double() / math.log(2) + limits.with_guess, below)
    e = torch.exp2(bits - (bits.gather(1, at).squeeze(1) - below).unsqueeze(1))
    total = e.sum(1)
    in_range = (total > limits.least) & (total < limits.most)
    if limits.largest is not None:
        e = torch.nn.functional.pad(e.scatter(1, at, 0.0), (0, -p.vocab % block_v))
        in_range &= e.view(len(e), -1, block_v).sum(2).amax(1) <= limits.largest
    return ~in_range
