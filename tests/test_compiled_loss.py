"""A policy loss under ``torch.compile(fullgraph=True)``: one graph, the eager numbers, no new graph for new values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loss_cases import CONFIGS, B, D, N, V, make_batch
from torch import Tensor

from eapo_kernels import METHODS, EntropyRatio, Method, TokenBatch, policy_loss
from eapo_kernels.testing import make_inputs

INPUTS = make_inputs(N, D, V)


def _ratio() -> EntropyRatio:
    controller = EntropyRatio()
    for total in (90.0, 60.0):
        controller.update(torch.tensor(total), torch.tensor(100))
    return controller


WEIGHTS = {"number": 0.7, "tensor": torch.tensor(0.7), "controller": _ratio()}
CASES = [
    *((name, "number") for name in ("entropy_bonus", "kl_k3", "importance", "gspo", "sign_fixed", "batch", "dropped")),
    ("default", "tensor"),
    ("default", "controller"),
]


@pytest.mark.parametrize(("name", "weight"), CASES)
def test_a_loss_compiles_in_one_graph(name: str, weight: str) -> None:
    torch.compiler.reset()
    how = {"schedule": "autograd", "backend": "torch"} if weight == "number" else {}
    method: Method = replace(METHODS["eapo"], config=CONFIGS[name])

    def loss(hidden: Tensor, head: Tensor, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        out = policy_loss(hidden, head, batch, method=method, positive_weight=WEIGHTS[weight], **how)
        return out.loss, out.metrics

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    batch = make_batch(INPUTS)
    again = replace(batch, rewards=torch.rand(B), old_logp=batch.old_logp + 0.1)
    for step, part in enumerate((batch, again)):
        leaves = [t.clone().requires_grad_() for t in (INPUTS.hidden, INPUTS.weight)]
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            found, metrics = compiled(*leaves, part)
        expected, plain = loss(*leaves, part)
        assert metrics.keys() == plain.keys()
        for key, value in plain.items():
            torch.testing.assert_close(metrics[key], value, msg=lambda m, key=key: f"{key}: {m}")
        torch.testing.assert_close(found, expected)
        gradients = torch.autograd.grad(expected, leaves)
        for got, gradient in zip(torch.autograd.grad(found, leaves), gradients, strict=True):
            torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-7)
