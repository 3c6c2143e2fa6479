"""Strategies for output heads: hidden states, weights, targets and masks of any shape, dtype and layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((), (0,), (1,), (2,), (7,), (33,), (2, 3), (3, 0), (0, 2, 2), (2, 1, 3))
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "every other": lambda t: torch.stack([t, torch.zeros_like(t)], -1)[..., 0],
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
}


@dataclass(frozen=True)
class Head:
    """Arguments of a call. ``options``: bias, inv_temperature, softcap, logit_scale. valid: [...] bool."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    mask: Tensor | None
    valid: Tensor
    options: dict[str, Any]

    def leaves(self) -> list[Tensor]:
        """hidden, weight and the bias, which require gradients."""
        found = [self.hidden, self.weight, self.options.get("bias")]
        return [t.requires_grad_() for t in found if t is not None]

    def logits(self) -> Tensor:
        """[..., V] fp64, by the definition, with hidden 0 where nothing counts; differentiable."""
        hidden = torch.where(self.valid[..., None], self.hidden.double(), 0.0)
        z = hidden @ self.weight.double().T
        if self.options["bias"] is not None:
            z = z + self.options["bias"].double()
        z = z * (self.options["logit_scale"] or 1)
        if (cap := self.options["softcap"]) is not None:
            z = cap * torch.tanh(z / cap)
        temperature = self.options["inv_temperature"]
        if isinstance(temperature, Tensor):
            temperature = torch.where(self.valid, temperature.double(), 1.0)[..., None]
        return z * temperature

    def tolerance(self) -> float:
        """Of log-probs and entropies (nats): rounding errors of the products and of the sums over the vocabulary."""
        hidden = torch.where(self.valid[..., None], self.hidden.detach().double(), 0.0)
        size = hidden.abs() @ self.weight.detach().double().abs().T
        if (bias := self.options["bias"]) is not None:
            size = size + torch.where(bias.isfinite(), bias.detach().double(), 0.0).abs()
        size = size * (self.options["logit_scale"] or 1)
        temperature = self.options["inv_temperature"]
        if isinstance(temperature, Tensor):
            temperature = torch.where(self.valid, temperature.double(), 1.0)[..., None]
        size = size * temperature
        eps = torch.finfo(torch.float64 if self.hidden.dtype == torch.float64 else torch.float32).eps
        return 16 * eps * (1 + float(size.max() if size.numel() else 0)) * (1 + math.log(len(self.weight)))

    def floor(self, *, cancels: bool = False) -> float:
        """Size that a gradient's error is relative to at least. Where a soft-cap saturates, 1 - tanh^2 loses its digits.

        cancels: the gradient is a sum of larger ones, each rounded.
        """
        if self.options["softcap"] is None and not cancels:
            return 1e-3
        hidden = torch.where(self.valid[..., None], self.hidden.detach().double(), 0.0)
        return 1 + float(hidden.norm() + self.weight.detach().double().norm())


@st.composite
def heads(draw: st.DrawFn, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Head:
    """Rows that do not count hold NaN and temperatures of any value, so that a result shows that it read one."""
    shape, dtype = draw(st.sampled_from(shapes)), draw(st.sampled_from(DTYPES))
    D, V = draw(st.sampled_from([1, 2, 3, 8, 17])), draw(st.sampled_from([1, 2, 3, 7, 64, 129, 257]))
    layout = st.sampled_from(sorted(LAYOUTS))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    targets = torch.randint(V, shape, generator=g)
    targets[torch.rand(shape, generator=g) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    share = draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
    mask = None if share is None else torch.rand(shape, generator=g) < share
    valid = targets != -100 if mask is None else mask & (targets != -100)

    hidden = draw(st.sampled_from([0.0, 0.1, 3.0, 60.0])) * torch.randn(*shape, D, generator=g)
    if shape and shape[0] and draw(st.integers(0, 4)) == 4:
        hidden = hidden[:1].to(dtype).expand(*shape, D)  # stride 0
    else:
        hidden = LAYOUTS[draw(layout)](torch.where(valid[..., None], hidden, math.nan).to(dtype))
    weight = LAYOUTS[draw(layout)](torch.randn(V, D, generator=g).to(dtype))
    softcap = draw(st.sampled_from([None, None, 1e-2, 5.0, 1e4]))
    bias = None
    if draw(st.booleans()):
        bias = torch.randn(V, generator=g).to(dtype)
        if softcap is None and draw(st.booleans()):
            bias[1:][torch.rand(V - 1, generator=g) < 0.3] = -math.inf
        bias = LAYOUTS[draw(layout)](bias)
    temperature: Any = draw(st.sampled_from([1, 1.0, 0.3, 7.5, "scalar", "rows"]))
    if temperature == "scalar":
        temperature = torch.tensor(0.7, dtype=draw(st.sampled_from(DTYPES)))
    elif temperature == "rows":
        rows = 0.2 + torch.rand(shape, generator=g)
        rows = torch.where(valid, rows, draw(st.sampled_from([0.0, -1.0, math.nan])))
        temperature = rows.to(draw(st.sampled_from(DTYPES)))
    options = {
        "bias": bias, "inv_temperature": temperature, "softcap": softcap,
        "logit_scale": draw(st.sampled_from([None, 0.25, 2])),
    }  # fmt: skip
    if shape:
        targets = LAYOUTS[draw(layout)](targets)
        mask = None if mask is None else LAYOUTS["transposed"](mask)
    return Head(hidden, weight, targets, mask, valid, options)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert equal shapes and values; infinities at the same places."""
    torch.testing.assert_close(found.detach().double(), expected.detach().double(), rtol=tolerance, atol=tolerance)


def close_gradients(found: list[Tensor], expected: list[Tensor], tolerance: float, floor: float) -> None:
    """Assert that every gradient differs by at most this share of its norm (or of ``floor``), and by what its dtype rounds."""
    for own, exact in zip(found, expected, strict=True):
        assert own.shape == exact.shape
        eps = torch.finfo(own.dtype).eps
        rounded = eps * exact.abs() + (6e-8 if own.dtype == torch.float16 else 1e-37)
        error = (own.double() - exact.double()).abs() - rounded
        scale = float(exact.norm()) + floor
        assert not error.isnan().any()
        assert (error <= tolerance * scale).all(), f"off by {float(error.max())} of {scale}"
