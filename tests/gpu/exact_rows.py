"""Statistics and single rows of the gradients in float64, a block of the logits at a time: the
reference for inputs of any size.

All tensors on the inputs' device. docs/math.md E1-E6, typed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eapo_kernels.testing import Inputs

_BLOCK = 2**27
"""Elements of a float64 temporary: 1 GiB."""


@dataclass(frozen=True)
class Exact:
    """logp, entropy, lse: [N] float64 (nats)."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor


def random_inputs(n: int, d: int, v: int, device: str, seed: int = 0) -> Inputs:
    """bf16 hidden [N, D] and weight [V, D] with logits of standard deviation 3, made on the device.

    The targets of the first, the middle and the last row are the last, the last and the first
    column.
    """
    g = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, device=device, dtype=torch.bfloat16).mul_(3)
    weight = torch.randn(v, d, generator=g, device=device, dtype=torch.bfloat16).mul_(d**-0.5)
    targets = torch.randint(v, (n,), generator=g, device=device)
    targets[torch.tensor([0, n // 2, n - 1], device=device)] = torch.tensor([v - 1, v - 1, 0], device=device)
    return Inputs(hidden, weight, targets)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, max(step, 1)))


def exact_statistics(inputs: Inputs) -> Exact:
    """Of every row: the online softmax over blocks of columns, in float64."""
    (n, d), v = inputs.hidden.shape, inputs.weight.shape[0]
    kind = {"dtype": torch.float64, "device": inputs.hidden.device}
    lse, mean = torch.full((n,), -torch.inf, **kind), torch.zeros(n, **kind)
    z_target = (inputs.hidden.double() * inputs.weight[inputs.targets].double()).sum(1) if n * d <= _BLOCK else None
    if z_target is None:
        z_target = torch.cat([_row_dot(inputs, rows) for rows in _slices(n, _BLOCK // d)])
    for columns in _slices(v, max(1, min(v, _BLOCK // d))):
        weight = inputs.weight[columns].double()
        for rows in _slices(n, _BLOCK // max(d, weight.shape[0])):
            z = inputs.hidden[rows].double() @ weight.T
            part = torch.logsumexp(z, 1)
            part_mean = torch.softmax(z, 1).mul_(z).sum(1)
            new = torch.logaddexp(lse[rows], part)
            mean[rows] = mean[rows] * (lse[rows] - new).exp() + part_mean * (part - new).exp()
            lse[rows] = new
    return Exact(z_target - lse, lse - mean, lse)


def _row_dot(inputs: Inputs, rows: slice) -> Tensor:
    return (inputs.hidden[rows].double() * inputs.weight[inputs.targets[rows]].double()).sum(1)


def _logit_gradient(
    inputs: Inputs,
    exact: Exact,
    cotangents: Tensor,
    rows: Tensor | slice,
    columns: Tensor | slice,
    hidden: Tensor,
    weight: Tensor,
) -> Tensor:
    """dL/dz at some rows and columns (E6): a (1[v = y] - p) - b p (log p + H) + g p."""
    log_p = hidden @ weight.T - exact.lse[rows].unsqueeze(1)
    a, b, g = (c[rows].unsqueeze(1) for c in cotangents)
    p = log_p.exp()
    numbers = torch.arange(inputs.weight.shape[0], device=p.device)[columns]
    is_target = inputs.targets[rows].unsqueeze(1) == numbers
    return a * (is_target.double() - p) - b * p * (log_p + exact.entropy[rows].unsqueeze(1)) + g * p


def exact_d_hidden(inputs: Inputs, exact: Exact, cotangents: Tensor, rows: Tensor) -> Tensor:
    """[R, D] float64, some rows of the gradient. cotangents: [3, N] float64 of logp, entropy, lse.
    rows: [R] int64."""
    hidden = inputs.hidden[rows].double()
    out = torch.zeros_like(hidden)
    for columns in _slices(inputs.weight.shape[0], _BLOCK // inputs.weight.shape[1]):
        weight = inputs.weight[columns].double()
        out += _logit_gradient(inputs, exact, cotangents, rows, columns, hidden, weight) @ weight
    return out


def exact_d_weight(inputs: Inputs, exact: Exact, cotangents: Tensor, columns: Tensor) -> Tensor:
    """[C, D] float64, some rows of the gradient (columns of the logits). columns: [C] int64."""
    weight = inputs.weight[columns].double()
    out = torch.zeros_like(weight)
    for rows in _slices(inputs.hidden.shape[0], _BLOCK // inputs.hidden.shape[1]):
        hidden = inputs.hidden[rows].double()
        out += _logit_gradient(inputs, exact, cotangents, rows, columns, hidden, weight).T @ hidden
    return out
