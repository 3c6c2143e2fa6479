"""The op in torch: custom op, compile, autocast, entropy modes, error messages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparison import check_compiles_once, check_custom_op

from eapo_kernels import EapoError, Options, ShapeError, token_stats
from eapo_kernels.testing import make_inputs


def test_forward_mode_is_refused() -> None:
    inputs = make_inputs(5, 4, 7)
    with pytest.raises(EapoError, match=r"hidden: expected a tensor without forward-mode tangent"):
        torch.func.jvp(lambda h: token_stats(h, inputs.weight, inputs.targets).logp, (inputs.hidden,), (inputs.hidden,))


@pytest.mark.parametrize(("second_moments", "entropy"), [(False, True), (True, True), (False, False), (True, False)])
def test_custom_op_contract(second_moments: bool, entropy: bool) -> None:
    check_custom_op("torch", "cpu", entropy=entropy, second_moments=second_moments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entropy", [True, False])
def test_custom_op_contract_with_saved_rows(entropy: bool, dtype: torch.dtype) -> None:
    check_custom_op("torch", "cpu", entropy=entropy, second_moments=False, dtype=dtype, save=True)


def test_compiles_in_one_graph_without_recompiling_for_a_new_length() -> None:
    check_compiles_once("auto", "cpu")


def test_autocast_casts_as_linear_does(device: str) -> None:
    inputs = make_inputs(20, 16, 99, device=device)
    hidden, weight = inputs.leaves()
    with torch.autocast(device, torch.bfloat16):
        stats = token_stats(hidden, weight, inputs.targets)
    expected = token_stats(hidden.bfloat16(), weight.bfloat16(), inputs.targets)
    assert torch.equal(stats.logp, expected.logp)
    stats.logp.sum().backward()
    assert hidden.grad.dtype == torch.float32


def test_entropy_modes(device: str) -> None:
    inputs = make_inputs(20, 16, 99, device=device)
    hidden, weight = inputs.leaves()
    assert token_stats(hidden, weight, inputs.targets).entropy.requires_grad
    assert not token_stats(hidden, weight, inputs.targets, entropy="nograd").entropy.requires_grad
    stats = token_stats(hidden, weight, inputs.targets, entropy="none")
    assert stats.entropy is None
    stats.logp.sum().backward()


def _call(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(9, 8),
        "targets": torch.zeros(4, dtype=torch.int64),
    }
    arguments |= changes
    token_stats(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(4, 7)}, ShapeError, r"hidden: expected float32 \[4, 8\] cpu, got float32 \[4, 7\] cpu"),
        ({"hidden": torch.zeros(4, 8).half()}, ShapeError, r"hidden: expected float32 \[4, 8\] cpu, got float16 \[4, 8\]"),
        ({"weight": torch.zeros(9)}, ShapeError, r"weight: expected a floating-point \[V, D\]"),
        ({"weight": torch.zeros(9, 8, dtype=torch.int64)}, ShapeError, r"weight: expected a floating-point"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, ShapeError, r"targets: expected int64 \[4\] cpu, got int32 \[4\]"),
        ({"targets": [0, 1]}, ShapeError, r"targets: expected an int64 tensor"),
        ({"targets": torch.tensor([0, 9, 1, 1])}, EapoError, r"targets: expected values in \[0, 9\) or -100, got 9 in row 1"),
        ({"targets": torch.tensor([0, -1, 1, 1])}, EapoError, r"got -1 in row 1"),
        ({"mask": torch.ones(4)}, ShapeError, r"mask: expected bool \[4\] cpu, got float32 \[4\]"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ShapeError, r"mask: expected bool \[4\]"),
        ({"bias": torch.zeros(8)}, ShapeError, r"bias: expected float32 \[9\]"),
        ({"inv_temperature": 0.0}, EapoError, r"inv_temperature: expected a positive finite number, got 0.0"),
        ({"inv_temperature": math.nan}, EapoError, r"inv_temperature: expected a positive finite number, got nan"),
        ({"inv_temperature": torch.zeros(4)}, EapoError, r"inv_temperature: expected positive finite values"),
        ({"inv_temperature": torch.ones(3)}, ShapeError, r"inv_temperature: expected .* \[4\] cpu, got float32 \[3\]"),
        ({"inv_temperature": torch.ones(4, requires_grad=True)}, EapoError, r"a tensor without gradient"),
        ({"softcap": -1.0}, EapoError, r"softcap: expected a positive finite number, got -1.0"),
        ({"logit_scale": "2"}, EapoError, r"logit_scale: expected a positive finite number, got '2'"),
        ({"entropy": "yes"}, EapoError, r"entropy: expected one of grad, nograd, none, got 'yes'"),
        ({"backend": "cutlass"}, EapoError, r"backend: expected one of auto, cuda, triton, torch, got 'cutlass'"),
        ({"options": {"debug": True}}, EapoError, r"options: expected Options or None, got \{'debug': True\}"),
        ({"options": Options(memory_budget=5)}, EapoError, r"Options.memory_budget: expected at least 6 bytes, .*, got 5"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)  # fmt: skip
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _call(**changes)


def test_bad_memory_budget() -> None:
    with pytest.raises(EapoError, match="a positive number of bytes"):
        Options(memory_budget=0)
