"""A row's log-prob, entropy and lse have the same bits alone, in any batch and at any place in it."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from eapo_kernels import Options, TokenBatch, eapo_loss, token_stats
from eapo_kernels.testing import Inputs, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about overflow before rows are rescued


@pytest.fixture(autouse=True)
def products_do_not_depend_on_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor core adds all elements of a tile in one order. The interpreter's BLAS does not: here it adds in float64."""
    real = numpy.matmul
    monkeypatch.setattr(numpy, "matmul", lambda a, b, dtype=None: real(a.astype("f8"), b.astype("f8")).astype(dtype or a.dtype))


N, D, V = 300, 40, 5003
"""Three ranges of the vocabulary, and five row tiles."""


def terms(form: str, inputs: Inputs) -> dict[str, Any]:
    """Keyword arguments of a form, of which ``inv_temperature`` may be [N]."""
    device = inputs.hidden.device
    temperature = (0.5 + torch.rand(N, generator=torch.Generator().manual_seed(2))).to(device)
    return {
        "plain": {},
        "bias": {"bias": inputs.bias, "inv_temperature": temperature},
        "softcap": {"softcap": 20.0},
    }[form]


def rows_of(given: dict[str, Any], index: Tensor) -> dict[str, Any]:
    return {name: v[index] if name == "inv_temperature" and isinstance(v, Tensor) else v for name, v in given.items()}


@pytest.mark.parametrize("second_moments", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["plain", "bias", "softcap"])
def test_statistics(form: str, dtype: torch.dtype, second_moments: bool, device: str) -> None:
    """Alone, in 63 and in 300 rows, in another order, beside masked rows, and in parts that fit a small budget."""
    inputs = make_inputs(N, D, V, dtype=dtype, bias=True, device=device)
    given = terms(form, inputs)

    def statistics(index: Tensor, *, mask: Tensor | None = None, budget: int | None = None) -> list[Tensor]:
        with torch.no_grad():
            s = token_stats(
                inputs.hidden[index], inputs.weight, inputs.targets[index], backend="triton", second_moments=second_moments,
                mask=mask, options=Options(memory_budget=budget), **rows_of(given, index),
            )  # fmt: skip
        return [value for value in s if value is not None]

    everything = torch.arange(N, device=device)
    whole = statistics(everything)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.rand(N, generator=torch.Generator().manual_seed(4)).to(device) < 0.7
    for index, found in (
        *((everything[i : i + 1], statistics(everything[i : i + 1])) for i in (0, 62, 63, 299)),
        (everything[40:103], statistics(everything[40:103])),
        (order, statistics(order)),
        (everything, statistics(everything, budget=1)),
    ):
        for full, part in zip(whole, found, strict=True):
            assert torch.equal(full[index], part)
    for full, part in zip(whole, statistics(everything, mask=mask), strict=True):
        assert torch.equal(full[mask], part[mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_saved_rows_and_the_one_pass_loss(dtype: torch.dtype, device: str) -> None:
    """The scaled-exponential form: its own bits, the same for a row in any batch, also if it is rescued."""
    inputs = make_inputs(N, D, V, dtype=dtype, device=device)

    def saved(index: Tensor) -> list[Tensor]:
        hidden = inputs.hidden[index].detach().requires_grad_()
        s = token_stats(hidden, inputs.weight, inputs.targets[index], entropy="nograd", backend="triton")
        (gradient,) = torch.autograd.grad(s.logp.sum(), hidden)
        return [s.logp.detach(), s.entropy, s.lse.detach(), gradient]

    def loss(index: Tensor, plan: str) -> Tensor:
        hidden = inputs.hidden[index].detach().requires_grad_()
        old = torch.linspace(-50.0, 0.0, N, device=device)[index]  # rows beyond 33 nats are rescued
        batch = TokenBatch(
            inputs.targets[index],
            torch.zeros_like(index),
            old_logp=old,
            advantages=torch.ones(1, device=device),
            denominator=1.0,
        )
        out = eapo_loss(hidden, inputs.weight, batch, positive_weight=1.0, backend="triton", options=Options(plan=plan))
        return torch.autograd.grad(out.loss, hidden)[0]

    everything = torch.arange(N, device=device)
    whole = saved(everything)
    for index in (everything[7:8], everything[100:163]):
        for full, part in zip(whole[:3], saved(index)[:3], strict=True):
            assert torch.equal(full[index], part)
    reference = loss(everything, "one_chunk")
    for index in (everything, everything[:63]):
        torch.testing.assert_close(loss(index, "chunks"), reference[index], rtol=1e-2, atol=1e-5)
