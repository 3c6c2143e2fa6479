"""A policy loss under ``torch.compile(fullgraph=True)``: one graph, the eager numbers, no new graph for new values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loss_cases import CONFIGS, B, D, N, V, make_batch
from torch import Tensor

from eapo_kernels import METHODS, EapoError, EntropyRatio, Method, TokenBatch, policy_loss, token_stats
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


BATCH = make_batch(INPUTS)


def _batch(denominator: float | None = None) -> TokenBatch:
    b = BATCH
    return TokenBatch(b.targets, b.sequence_ids, b.rewards, b.group_ids, old_logp=b.old_logp, denominator=denominator)


NUMBERS = {
    "tokens": lambda h, v: policy_loss(h, INPUTS.weight, _batch(v), method="grpo").loss,
    "denominator": lambda h, v: policy_loss(h, INPUTS.weight, _batch(90.5 * v), method="grpo").loss,
    "positive_weight": lambda h, v: policy_loss(h, INPUTS.weight, _batch(), method="eapo", positive_weight=v).loss,
    "inv_temperature": lambda h, v: policy_loss(h, INPUTS.weight, _batch(), method="grpo", inv_temperature=v).loss,
    "logit_scale": lambda h, v: policy_loss(h, INPUTS.weight, _batch(), method="grpo", logit_scale=v).loss,
    "both": lambda h, v: token_stats(h, INPUTS.weight, INPUTS.targets, inv_temperature=v, logit_scale=2 * v).logp.sum(),
    "under a soft-cap": lambda h, v: token_stats(h, INPUTS.weight, INPUTS.targets, inv_temperature=v, softcap=9.0).logp.sum(),
}


@pytest.mark.parametrize(("name", "backend"), [*((name, "aot_eager") for name in NUMBERS), ("inv_temperature", "inductor")])
def test_a_number_that_changes_compiles_once_more(name: str, backend: str) -> None:
    """The second value makes the number an input of the graph; no later one is a stale constant, or compiles again."""
    torch.compiler.reset()
    loss = NUMBERS[name]
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for step, number in enumerate((1.0, 0.5, 0.25, 1.75, 0.8, 1.0)):
        value = int(100 * number) if name == "tokens" else number
        leaves = [INPUTS.hidden.clone().requires_grad_() for _ in range(2)]
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            found = compiled(leaves[0], value)
        expected = loss(leaves[1], value)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(*pair)[0] for pair in zip((found, expected), leaves, strict=True)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bad_number_is_refused_under_compile_too(value: float) -> None:
    torch.compiler.reset()
    compiled = torch.compile(NUMBERS["inv_temperature"], backend="eager")
    with pytest.raises(EapoError, match="inv_temperature: expected a positive finite number"):
        compiled(INPUTS.hidden, value)
