"""Our Liger drop-ins against Liger's losses: same calls, values, gradients and metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eapo_kernels import EapoError, ShapeError
from eapo_kernels.integrations import linear_cross_entropy
from eapo_kernels.integrations.cross_entropy import REDUCTIONS
from eapo_kernels.integrations.liger import (
    LOSS_TYPES,
    CrossEntropyOutput,
    FusedLinearGRPOLoss,
    LinearCrossEntropyLoss,
    liger_fused_linear_cross_entropy,
    liger_fused_linear_grpo,
)

B, T, D, V = 4, 7, 24, 131


def _inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(B, T, generator=g) < 0.8).long()
    mask[:, 0] = 1
    return {
        "hidden": torch.randn(B, T, D, generator=g),
        "weight": torch.randn(V, D, generator=g) * 0.4,
        "bias": torch.randn(V, generator=g),
        "ids": torch.randint(0, V, (B, T), generator=g),
        "mask": mask,
        "advantages": torch.randn(B, generator=g),
        "noise": torch.randn(B, T, generator=g) * 0.4,
        "ref_noise": torch.randn(B, T, generator=g) * 0.3,
        "is_ratio": torch.where(mask.bool(), torch.rand(B, T, generator=g) + 0.5, 1.0),  # Liger's vespo sums padding too
    }


def _run(loss_of: Any, given: dict[str, torch.Tensor], **call: Any) -> tuple[torch.Tensor, list[torch.Tensor], Any]:
    hidden, weight, bias = (given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias"))
    loss, metrics = loss_of(hidden, weight, given["ids"], given["mask"], given["advantages"], bias=bias, **call)
    return loss.detach(), list(torch.autograd.grad(loss, (hidden, weight, bias))), metrics


_CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    *((name, {"beta": 0.0}, ("old",)) for name in LOSS_TYPES),
    *((name, {"beta": 0.04}, ("old", "ref")) for name in LOSS_TYPES),
    *((name, {"beta": 0.1, "use_bias_correction_kl": True, "temperature": 0.7}, ("old", "ref", "is_ratio"))
      for name in ("grpo", "dapo", "vespo")),
    *((name, {"importance_sampling_level": "sequence"}, ("old", "ref")) for name in ("grpo", "bnpo", "dapo", "luspo")),
    *((name, {"beta": 0.0}, ("old", "is_sequence")) for name in ("dapo", "vespo")),
    *(("dapo", {"delta": delta, "epsilon_high": 0.3}, ("old", "ref")) for delta in (0.9, 1.1, 1.3, 1.5)),
    ("luspo", {"delta": 1.15, "importance_sampling_level": "sequence"}, ("old",)),
    ("grpo", {"beta": 0.0}, ()),
    ("dapo", {"beta": 0.0}, ("old", "items")),
    ("grpo", {}, ("old", "ref_input")),
]  # fmt: skip


@pytest.mark.parametrize(("loss_type", "settings", "extras"), _CASES)
def test_grpo_loss_matches_liger(loss_type: str, settings: dict[str, Any], extras: tuple[str, ...]) -> None:
    liger = pytest.importorskip(
        "liger_kernel.chunked_loss", reason="liger-kernel (and triton) not installed: pip install --no-deps liger-kernel==0.8.5"
    )
    given = _inputs()
    if loss_type == "luspo":
        given["mask"] = torch.ones_like(given["mask"])  # Liger averages over padding too; TRL and this package mask it
    common = {"loss_type": loss_type, "use_ref_model": "ref" in extras or "ref_input" in extras, **settings}
    if loss_type == "dr_grpo":
        common["max_completion_length"] = 9
    if loss_type == "cispo":
        common["epsilon_high"] = 1.2
    scale = 1 / settings.get("temperature", 1.0)
    logps = ((given["hidden"] @ given["weight"].T + given["bias"]) * scale).log_softmax(-1)
    logp = logps.gather(-1, given["ids"][..., None])[..., 0]
    available: dict[str, dict[str, Any]] = {
        "old": {"old_per_token_logps": logp + given["noise"]},
        "ref": {"ref_per_token_logps": logp + given["ref_noise"]},
        "is_ratio": {"vllm_is_ratio": given["is_ratio"]},
        "is_sequence": {"vllm_is_ratio": given["is_ratio"][:, 0]},
        "items": {"num_items_in_batch": torch.tensor(37)},
        "ref_input": {"ref_input": given["hidden"] + 0.1, "ref_weight": given["weight"] * 1.1, "ref_bias": given["bias"]},
    }
    call = {key: value for name in extras for key, value in available[name].items()}
    expected = _run(liger.LigerFusedLinearGRPOLoss(compiled=False, **common), given, **call)
    found = _run(FusedLinearGRPOLoss(compiled=False, **common), given, **call)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)  # a sum of terms of size 1
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert len(found[2]) == len(expected[2])
    for ours, theirs in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-5, atol=1e-6)


def test_the_weight_scales_the_positive_part() -> None:
    given, loss_of = _inputs(), FusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
    scaled, gradients, _ = _run(loss_of, given, positive_weight=0.3)
    positive = _run(loss_of, {**given, "advantages": given["advantages"].clamp_min(0)})
    negative = _run(loss_of, {**given, "advantages": given["advantages"].clamp_max(0)})
    torch.testing.assert_close(scaled, 0.3 * positive[0] + negative[0])
    for found, a, b in zip(gradients, positive[1], negative[1], strict=True):
        torch.testing.assert_close(found, 0.3 * a + b, rtol=1e-4, atol=1e-6)


def test_nan_in_padding_has_no_effect() -> None:
    given, loss_of = _inputs(), FusedLinearGRPOLoss(use_ref_model=True)
    out = given["mask"] == 0
    nan = torch.where(out, float("nan"), -4.0)
    found = _run(loss_of, given, old_per_token_logps=nan, ref_per_token_logps=nan)
    clean = torch.full((B, T), -4.0)
    expected = _run(loss_of, given, old_per_token_logps=clean, ref_per_token_logps=clean)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("schedule", ["one_pass", "autograd"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_cross_entropy_is_that_of_the_logits(reduction: str, schedule: str, softcap: float | None) -> None:
    given = _inputs(1)
    targets = torch.where(given["mask"].bool(), given["ids"], -1)
    leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    z = F.linear(*leaves)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = F.cross_entropy(z.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)
    found = linear_cross_entropy(
        leaves[0], leaves[1], targets, bias=leaves[2], ignore_index=-1, reduction=reduction, softcap=softcap, schedule=schedule
    )
    torch.testing.assert_close(found.flatten(), expected.flatten(), rtol=1e-5, atol=1e-5)
    assert found.shape == (targets.shape if reduction == "none" else ())
    cotangent = torch.randn_like(found)
    ours = torch.autograd.grad(found, leaves, cotangent)
    theirs = torch.autograd.grad(expected, leaves, cotangent.view_as(expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_is_torchs_own(reduction: str) -> None:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch.nn.functional.linear_cross_entropy came with torch 2.13")
    given = _inputs(2)
    hidden, targets = given["hidden"].flatten(0, 1), torch.where(given["mask"].bool(), given["ids"], -100).flatten()
    expected = F.linear_cross_entropy(
        hidden, given["weight"], targets, linear_bias=given["bias"], reduction=reduction, ignore_index=-100
    )
    module = LinearCrossEntropyLoss(reduction=reduction)
    torch.testing.assert_close(module(given["weight"], hidden, targets, given["bias"]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", [("z_loss",), ("token_accuracy",), ("z_loss", "token_accuracy", "predicted_tokens")])
@pytest.mark.parametrize("module", [True, False])
def test_cross_entropy_returns_ligers_fields(module: bool, wanted: tuple[str, ...], reduction: str) -> None:
    given = _inputs(2)
    hidden, weight, bias = given["hidden"].flatten(0, 1), given["weight"], given["bias"]
    target = torch.where(given["mask"].bool(), given["ids"], -1).flatten()
    hidden = (hidden + 6 * weight[target.clamp_min(0)]).requires_grad_()  # some are predicted
    settings: dict[str, Any] = {
        "ignore_index": -1, "reduction": reduction, "lse_square_scale": 0.01, "label_smoothing": 0.1,
        **{f"return_{name}": True for name in wanted},
    }  # fmt: skip
    if module:
        found = LinearCrossEntropyLoss(**settings)(weight, hidden, target, bias)
    else:
        found = liger_fused_linear_cross_entropy(hidden, weight, target, bias, **settings)
    assert isinstance(found, CrossEntropyOutput)
    z, valid = F.linear(hidden, weight, bias), target != -1
    rows = F.cross_entropy(z, target, ignore_index=-1, label_smoothing=0.1, reduction="none")
    reduced = {"none": lambda x: x, "sum": torch.sum, "mean": lambda x: x.sum() / valid.sum()}[reduction]
    penalty = torch.where(valid, 0.01 * z.logsumexp(-1) ** 2, 0.0)
    right = ((z.argmax(-1) == target) & valid).float()
    assert 0 < right.sum() < valid.sum()
    torch.testing.assert_close(found.loss, reduced(rows) + reduced(penalty))
    expected = {
        "z_loss": reduced(penalty), "token_accuracy": right if reduction == "none" else right.sum() / valid.sum(),
        "predicted_tokens": torch.where(valid, z.argmax(-1), -1),
    }  # fmt: skip
    for name, value in expected.items():
        got = getattr(found, name)
        if name in wanted:
            torch.testing.assert_close(got, value.detach())
            assert not got.requires_grad
        else:
            assert got is None
    assert found.loss.requires_grad


def test_ligers_function_takes_its_positions() -> None:
    given = _inputs()
    head = [given["hidden"], given["weight"], given["ids"], given["mask"], given["advantages"], given["bias"]]
    old, ref = given["noise"] - 4, given["ref_noise"] - 4
    ratio, items = given["is_ratio"], torch.tensor(37)
    settings: dict[str, Any] = {
        "beta": 0.1, "epsilon_low": 0.3, "epsilon_high": 0.4, "loss_type": "vespo", "max_completion_length": 9,
        "importance_sampling_level": "token", "sapo_temperature_pos": 1.1, "sapo_temperature_neg": 1.2, "temperature": 0.7,
        "compiled": False, "use_ref_model": True, "chunk_size": 2,
    }  # fmt: skip
    more: dict[str, Any] = {
        "delta": 1.5, "use_bias_correction_kl": True, "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 2.6,
        "vespo_lambda_neg": 1.7,
    }  # fmt: skip
    for loss_type in ("vespo", "dapo", "sapo"):
        settings["loss_type"] = loss_type
        found, metrics = liger_fused_linear_grpo(
            *head, ref, old, None, None, None, *settings.values(), ratio, *more.values(), items, positive_weight=0.5
        )
        expected, expected_metrics = FusedLinearGRPOLoss(**settings, **more)(
            *head, ref, old, vllm_is_ratio=ratio, num_items_in_batch=items, positive_weight=0.5
        )
        assert torch.equal(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(metrics, expected_metrics, strict=True))


def test_mistakes_say_what_was_expected() -> None:
    given = _inputs()
    for settings, message in [
        ({"loss_type": "ppo"}, "loss_type"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 0.7, "epsilon_low": 0.3}, "delta: expected a number > 1 - epsilon_low"),
    ]:
        with pytest.raises(EapoError, match=message):
            _run(FusedLinearGRPOLoss(**settings), given)  # type: ignore[arg-type]
    with pytest.raises(EapoError, match="ref_per_token_logps"):
        _run(FusedLinearGRPOLoss(), given)
    with pytest.raises(ShapeError, match="advantages"):
        _run(FusedLinearGRPOLoss(), {**given, "advantages": torch.ones(B, T)})
    with pytest.raises(ShapeError, match="vllm_is_ratio"):
        _run(FusedLinearGRPOLoss(use_ref_model=False), given, vllm_is_ratio=torch.ones(B, 3))
    for settings in ({"label_smoothing": 1.1}, {"reduction": "max"}, {"softcap": 0.0}, {"return_z_loss": 1},
                     {"ce_weight": torch.ones(V - 1)}, {"ce_weight": torch.ones(V, dtype=torch.int64)}):  # fmt: skip
        for error in (EapoError, AssertionError):  # Liger asserts
            with pytest.raises(error, match=next(iter(settings))):
                LinearCrossEntropyLoss(**settings)(given["weight"], given["hidden"].flatten(0, 1), given["ids"].flatten())
    with pytest.raises(ShapeError, match="hidden"):
        linear_cross_entropy(given["hidden"], given["weight"], given["ids"][:, 1:])
    with pytest.raises(EapoError, match="targets"):
        linear_cross_entropy(given["hidden"], given["weight"], torch.full((B, T), -100), ignore_index=-1)
