"""The benchmark's cases and their float64 results, against dense autograd written here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import case as case_module
from benchmarks.case import (
    CLIP,
    INPUTS,
    MASK_SIZE,
    MODES,
    N_RESPONSES,
    OBJECTIVES,
    POSITIVE_WEIGHT,
    TOLERANCE,
    Case,
    make_case,
    reference_of,
)

N, D, V = 80, 24, 300
LENGTH = N // N_RESPONSES


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(N, D, V, torch.float32)


def _dense(case: Case, objective: str) -> dict[str, Tensor]:
    """logp, entropy, loss and both gradients from full float64 logits; masked rows are cut out
    before anything is computed."""
    kept = torch.arange(N)[case.valid]
    hidden = case.hidden.double().requires_grad_()
    weight = case.weight.double().requires_grad_()
    z = hidden[kept] @ weight.T
    if case.support is not None:
        z = z.masked_fill(torch.ones_like(z, dtype=torch.bool).scatter(1, case.support[kept], False), -1e4)
    p = torch.softmax(z, -1)
    logp = p[torch.arange(len(kept)), case.targets[kept]].log()
    if objective == "cross_entropy":
        loss = -logp.mean()
    else:
        responses = kept // LENGTH
        rewards = case.batch.rewards.double()
        groups = rewards.view(-1, 4)
        scores = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).flatten()
        advantages = torch.where(scores > 0, POSITIVE_WEIGHT * scores, scores)[responses]
        ratio = (logp - case.old_logp[kept].double()).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
    d_hidden, d_weight = torch.autograd.grad(loss, [hidden, weight])
    entropy = torch.special.entr(p).sum(-1)
    results = {"logp": logp, "entropy": entropy, "loss": loss, "d_hidden": d_hidden, "d_weight": d_weight}
    return {name: value.detach() for name, value in results.items()}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("mode", ["fwd_bwd", "half_zero_rows", "sampling_mask"])
def test_the_reference_equals_dense_autograd(case: Case, mode: str, objective: str) -> None:
    this = case.for_mode(mode)
    reference, dense = reference_of(this), _dense(this, objective)
    # The case holds its advantages in fp32, the lines above in float64.
    close = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(reference.logp[this.valid], dense["logp"], **close)
    torch.testing.assert_close(reference.entropy[this.valid], dense["entropy"], **close)
    for name in ("loss", "d_hidden", "d_weight"):
        torch.testing.assert_close(getattr(reference, name)[objective], dense[name], **close)


def test_half_zero_rows_masks_the_second_half_of_every_response(case: Case) -> None:
    half = case.for_mode("half_zero_rows")
    first = torch.tensor([True, True, True, False, False]).repeat(N_RESPONSES)  # LENGTH is odd: the middle token stays
    assert torch.equal(half.valid, first)
    assert torch.equal(half.targets, torch.where(first, case.targets, -100))
    assert torch.equal(half.batch.targets, half.targets)
    assert half.n_valid == 3 * N_RESPONSES
    assert half.useful_flops("half_zero_rows") == 6 * half.n_valid * D * V
    assert reference_of(half).d_hidden["policy"][~first].abs().max() == 0
    assert case.for_mode("fwd_bwd") is case
    assert case.n_valid == N


def test_a_sampling_mask_has_the_likeliest_ids_and_the_target(case: Case) -> None:
    masked = case.for_mode("sampling_mask")
    assert masked.support is not None
    assert masked.support.shape == (N, MASK_SIZE)
    likeliest = (case.hidden @ case.weight.T).argsort(1, descending=True)
    assert torch.equal(masked.support[:, : MASK_SIZE - 1].sort(1).values, likeliest[:, : MASK_SIZE - 1].sort(1).values)
    assert (masked.support == case.targets[:, None]).any(1).all()
    torch.testing.assert_close(masked.old_logp - masked.logp, case.old_logp - case.logp, rtol=0, atol=1e-5)
    assert masked.useful_flops("sampling_mask") == 6 * N * MASK_SIZE * D
    tolerant = case.for_mode("sparse_gradient")
    assert tolerant.options.gradient_tolerance == TOLERANCE
    assert tolerant.useful_flops("sparse_gradient") == 6 * N * D * V


@pytest.mark.parametrize("mode", ["fwd_bwd", "half_zero_rows", "sampling_mask"])
def test_a_sample_is_rows_of_the_full_reference(case: Case, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    this = case.for_mode(mode)
    full = reference_of(this)
    monkeypatch.setattr(case_module, "_EVERYTHING", 1)
    monkeypatch.setattr(case_module, "_SAMPLED_ROWS", 10)
    monkeypatch.setattr(case_module, "_SAMPLED_COLUMNS", 40)
    sample = reference_of(this)
    assert len(sample.rows) == 10
    assert 20 < len(sample.columns) <= 40
    assert torch.isin(this.targets[this.valid][:20], sample.columns).all()
    for objective in OBJECTIVES:
        close = {"rtol": 1e-12, "atol": 1e-15}
        torch.testing.assert_close(sample.loss[objective], full.loss[objective], **close)
        torch.testing.assert_close(sample.d_hidden[objective], full.d_hidden[objective][sample.rows], **close)
        torch.testing.assert_close(sample.d_weight[objective], full.d_weight[objective][sample.columns], **close)
        results = {"d_hidden": full.d_hidden[objective], "d_weight": full.d_weight[objective]}
        assert max(sample.errors(results, objective).values()) < 1e-12


def test_errors_are_relative_norms_over_the_valid_rows(case: Case) -> None:
    half = case.for_mode("half_zero_rows")
    reference = reference_of(half)
    results = {
        "logp": torch.where(half.valid, reference.logp * 1.01, 1e3),  # masked rows do not count
        "loss": reference.loss["cross_entropy"] * 0.5,
        "d_hidden": reference.d_hidden["cross_entropy"] * 3,
    }
    errors = reference.errors(results, "cross_entropy")
    assert errors == pytest.approx({"logp": 0.01, "loss": 0.5, "d_hidden": 2.0})
    largest = reference.largest_errors(results, "cross_entropy")
    expected = {"logp": 0.01 * reference.logp[half.valid].abs().max(), "loss": 0.5 * results["loss"] * 2, "d_hidden": 2.0}
    assert largest == pytest.approx({name: float(value) for name, value in expected.items()})


def test_inputs_differ_as_they_say() -> None:
    peaked, steep, uniform = (make_case(32, 64, 500, torch.float32, inputs=name) for name in ("peaked", "steep", "uniform"))
    assert torch.equal(steep.hidden, 2 * peaked.hidden)
    assert steep.largest_logit == pytest.approx(2 * peaked.largest_logit, rel=1e-6)
    assert uniform.entropy.min() > 0.99 * torch.tensor(500.0).log()
    assert peaked.entropy.mean() < 0.9 * uniform.entropy.mean()
    for case in (peaked, steep, uniform):
        z = case.hidden.double() @ case.weight.double().T
        assert case.largest_logit == pytest.approx(float(z.abs().max()))
        torch.testing.assert_close(case.lse, torch.logsumexp(z, -1))


def test_unknown_inputs_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="n: expected a multiple of 16, got 20"):
        make_case(20, 8, 50, torch.float32)
    with pytest.raises(ValueError, match=f"inputs: expected one of {', '.join(INPUTS)}, got 'flat'"):
        make_case(32, 8, 50, torch.float32, inputs="flat")


def test_bytes_and_flops_count_what_the_mode_needs(case: Case) -> None:
    assert {mode: case.useful_flops(mode) // (2 * N * D * V) for mode in MODES} == {
        "fwd": 1,
        "fwd_bwd": 3,
        "frozen_head": 2,
        "half_zero_rows": 3,
    }
    rows, head = N * D, V * D
    assert [case.least_bytes(mode) // 4 for mode in MODES] == [
        rows + head,
        2 * (rows + head),
        2 * rows + head,
        2 * (rows + head),
    ]
