"""Two ranks, gloo: weights and summed gradients of a weighted step are those of one process, for any split of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from token_steps import SIZES, Step, make_step

from eapo_kernels import (
    EapoError,
    Method,
    TokenBatch,
    TokenStats,
    gather_step,
    get_method,
    loss_denominator,
    policy_loss,
    weight_tokens,
)

SPLIT = (5, 3)  # responses of the ranks: the second group (4 to 7) is on both
METHODS = {
    "steer": {},  # batch
    "clip_cov": {"ratio": 0.1, "low": 0.1, "high": 3.0},  # batch, drawn at random
    "canon": {"fixed_length": 9},  # group
    "aem": {},  # group
    "exchange_position": {},  # sequence
    "spine": {},  # narrows the mask, so the denominator too
}


def part_of(step: Step, rank: int) -> tuple[TokenBatch, TokenStats, dict[str, torch.Tensor], slice]:
    """The rank's responses as it would have sampled them: ids from 0, only its own rewards."""
    first = sum(SPLIT[:rank])
    own, sequences = (step.ids >= first) & (step.ids < first + SPLIT[rank]), slice(first, first + SPLIT[rank])
    batch = step.batch.select(own)
    assert batch.rewards is not None
    assert batch.group_ids is not None
    batch = replace(
        batch, sequence_ids=batch.sequence_ids - first, rewards=batch.rewards[sequences], group_ids=batch.group_ids[sequences],
        denominator=None,
    )  # fmt: skip
    place = own.nonzero()[:, 0]
    extras = {"answer": step.ids[own] % 2 == 0, "turn_ids": (torch.arange(len(step.ids)) // 4)[own] - place[0] // 4}
    return batch, TokenStats(*(t[own] for t in step.stats if t is not None)), extras, slice(int(place[0]), int(place[-1]) + 1)


def with_count(batch: TokenBatch, method: Method) -> TokenBatch:
    """The denominator and lengths of the full step, counted from the mask after the weights."""
    assert batch.mask is not None
    lengths = torch.zeros(len(SIZES)).index_add_(0, batch.sequence_ids, batch.mask.float())
    count = lengths.sum() if method.config.reduction == "token_mean" else (lengths > 0).sum()
    return replace(batch, denominator=count, sequence_lengths=lengths)


def gradients(step: Step, batch: TokenBatch, method: Method, cuts: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and d_weight added up over the cuts of the batch's tokens."""
    weight, total = step.weight.clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for cut in cuts:
        rows = torch.arange(len(step.ids))[cut]
        loss = policy_loss(step.hidden[rows], weight, batch.select(rows), method=method).loss
        loss.backward()
        total += loss.detach()
    assert weight.grad is not None
    return total, weight.grad


def check_methods(rank: int) -> None:
    step = make_step(4)
    for name, changes in METHODS.items():
        method = get_method(name, **changes)
        alone = with_count(weight_tokens(method, step.batch, step.stats, seed=3), method)
        loss, gradient = gradients(step, alone, method, [slice(None)])
        batch, stats, extras, place = part_of(step, rank)
        full = gather_step(batch, stats, extras)
        assert full.own == place
        weighted = with_count(weight_tokens(method, full.batch, full.stats, seed=3), method)
        for field in ("advantages", "entropy_coef", "mask", "sequence_ids", "group_ids"):
            ours, theirs = getattr(weighted, field), getattr(alone, field)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs), (name, field)
        middle = (place.start + place.stop) // 2
        for cuts in ([place], [slice(place.start, middle), slice(middle, place.stop)]):
            found = gradients(step, weighted, method, cuts)
            for value, expected in zip(found, (loss, gradient), strict=True):
                dist.all_reduce(value)
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def check_bits(rank: int) -> None:
    """Every field of every dtype is gathered unchanged; a rank may have no tokens."""
    step = make_step(5)
    batch, stats, extras, _ = part_of(step, rank)
    if rank == 1:
        batch = batch.select(slice(0, 0))
        batch = replace(batch, rewards=torch.empty(0), group_ids=torch.empty(0, dtype=torch.int64))
        stats = TokenStats(*(t[:0] for t in stats if t is not None))
        extras = {name: value[:0] for name, value in extras.items()}
    half = torch.linspace(-1, 1, batch.targets.numel()).to(torch.bfloat16)
    batch = replace(batch, rollout_logp=half, entropy_coef=half.double())
    full = gather_step(batch, stats, extras)
    first, first_stats, first_extras, place = part_of(step, 0)
    assert full.own == (place if rank == 0 else slice(place.stop, place.stop))
    assert full.own_sequences == (slice(0, 5) if rank == 0 else slice(5, 5))
    for field in ("targets", "sequence_ids", "rewards", "group_ids", "old_logp", "mask"):
        assert torch.equal(getattr(full.batch, field), getattr(first, field))
    assert full.batch.rollout_logp is not None
    assert full.batch.rollout_logp.dtype == torch.bfloat16
    assert full.batch.entropy_coef is not None
    assert torch.equal(full.batch.rollout_logp.double(), full.batch.entropy_coef)
    assert full.batch.ref_logp is None
    for ours, theirs in zip(full.stats, first_stats, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert all(torch.equal(full.extras[name], value) for name, value in first_extras.items())


def check_advantages(rank: int) -> None:
    """Advantages per response and per token both find their place."""
    step = make_step(6)
    batch, stats, _, place = part_of(step, rank)
    b, n = len(SIZES), len(step.ids)
    per_response, per_token = torch.arange(float(b)), torch.arange(float(n))
    first = sum(SPLIT[:rank])
    given = replace(batch, advantages=per_response[first : first + SPLIT[rank]], token_advantages=False)
    assert torch.equal(gather_step(given, stats).batch.advantages, per_response)
    given = replace(batch, advantages=per_token[place], token_advantages=True)
    full = gather_step(given, stats).batch
    assert torch.equal(full.advantages, per_token)
    assert full.token_advantages


def check_mismatch(rank: int) -> None:
    """Different fields on the ranks raise on every rank, without a deadlock."""
    batch, stats, extras, _ = part_of(make_step(), rank)
    with pytest.raises(EapoError, match=r"fields of rank 1: expected those of rank 0, .*extras.answer"):
        gather_step(batch, stats, extras if rank == 0 else {})


@pytest.mark.parametrize("check", [check_methods, check_bits, check_advantages, check_mismatch], ids=lambda f: f.__name__)
def test_two_ranks(check: Callable[[int], None]) -> None:
    run_ranks(check)


def test_one_process_gathers_nothing() -> None:
    step = make_step()
    full = gather_step(step.batch, step.stats, {"answer": step.valid})
    assert full.batch is step.batch
    assert full.stats is step.stats
    assert (full.own, full.own_sequences) == (slice(0, len(step.ids)), slice(0, len(SIZES)))


@pytest.mark.parametrize("name", ["grpo", "dapo", "psr", "nsr", "spine", "canon"])
def test_losses_of_parts_add_up_with_the_denominator_of_the_step(name: str) -> None:
    """Also where responses are dropped (psr, nsr) or tokens are masked by the weights (spine)."""
    step, method = make_step(7, binary=True), get_method(name, fixed_length=9)
    weighted = replace(weight_tokens(method, step.batch, step.stats), denominator=None)
    expected = gradients(step, weighted, method, [slice(None)])
    counted = replace(weighted, denominator=loss_denominator(weighted, method=method))
    found = gradients(step, counted, method, [step.ids < 3, (step.ids >= 3) & (step.ids < 4), step.ids >= 4])
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-8)


def test_a_batch_in_which_nothing_counts_has_a_denominator() -> None:
    step = make_step()
    nothing = replace(step.batch, mask=torch.zeros_like(step.valid))
    assert loss_denominator(nothing, method="grpo").item() == 1
