"""With ``debug`` an argument that one rank of a split head refuses, or that differs, is one error on all ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from eapo_kernels import EAPOConfig, EapoError, Method, Options, TokenBatch, VocabShard, policy_loss, token_stats
from eapo_kernels.integrations.cross_entropy import linear_cross_entropy
from eapo_kernels.testing import make_inputs

N, D, ROWS = 6, 8, 5
NUCLEUS = Method("nucleus", EAPOConfig(entropy_top_p=0.9, entropy_coef=0.1))
ZEROS, HALF = torch.zeros(ROWS), torch.full((N,), 0.5)


@dataclass(frozen=True)
class Odd:
    """Arguments that differ on the last rank, and the message that all ranks raise.

    Attributes:
        message: a pattern of the message on every rank.
        change: the last process's arguments.
        common: arguments of all the others and, but for ``change``, its own.
        call: "stats", "loss" or "cross_entropy".
    """

    message: str
    change: dict[str, Any]
    common: dict[str, Any]
    call: str = "stats"


def _stats(message: str, change: dict[str, Any], **common: Any) -> Odd:
    return Odd(message, change, common)


def _loss(message: str, change: dict[str, Any], **common: Any) -> Odd:
    return Odd(message, change, common, "loss")


def _differs(name: str, others: str, odd: str) -> str:
    return rf"{name}: expected the same on all ranks \({others} on rank 0\), got {odd}"


INPUTS = make_inputs(N, D, 3 * ROWS)
BATCH = TokenBatch(
    targets=INPUTS.targets % (2 * ROWS), sequence_ids=torch.arange(N) // 3, rewards=torch.tensor([0.0, 1.0]),
    group_ids=torch.zeros(2, dtype=torch.int64), old_logp=torch.full((N,), -2.0),
)  # fmt: skip
OTHERS = (BATCH.targets + 1) % (2 * ROWS)
DROPPED = EAPOConfig(drop_zero_weight=True)

REFUSED = [
    _stats(r"weight: expected a floating-point \[V, D\] with V, D >= 1, got float32 \[0, 8\]", {"weight": torch.empty(0, D)}),
    _stats(r"weight: expected a floating-point .*, got 'head'", {"weight": "head"}),
    _stats(r"hidden: expected float32 \[6, 8\] cpu, got float32 \[6, 7\]", {"hidden": torch.zeros(N, D - 1)}),
    _stats(r"bias: expected float32 \[5\] cpu, got float32 \[4\]", {"bias": torch.zeros(ROWS - 1)}, bias=ZEROS),
    _stats(r"targets: expected int64 \[6\] cpu, got int32 \[6\]", {"targets": BATCH.targets.int()}),
    _stats(r"targets: expected an int64 tensor .*, got None", {"targets": None}),
    _stats(r"mask: expected bool \[6\] cpu, got float32 \[6\]", {"mask": HALF}),
    _stats(r"softcap: expected a positive finite number, got -1.0", {"softcap": -1.0}, softcap=9.0),
    _stats(r"inv_temperature: expected .* \[6\] cpu, got float32 \[5\]", {"inv_temperature": HALF[:5]}, inv_temperature=HALF),
    _stats(r"entropy: expected one of grad, nograd, none, got 'no'", {"entropy": "no"}),
    _stats(r"Options.plan: expected auto, one_chunk or recompute .*, got 'chunks'", {"options": Options(plan="chunks")}),
    _stats(r"backend: expected one of auto, .*, got 'cutlass'", {"backend": "cutlass"}),
    _stats(r"backend 'cuda': cpu tensors, where it needs an NVIDIA GPU", {"backend": "cuda"}),
    _loss(r"batch: expected a TokenBatch, got None", {"batch": None}),
    _loss(r"batch.rewards: expected finite numbers, got nan",
          {"batch": replace(BATCH, rewards=torch.tensor([0.0, torch.nan]))}),
    _loss(r"positive_weight: expected a finite number >= 0, got -1", {"positive_weight": -1}),
    _loss(r"method: expected one of .*", {"method": "nothing"}),
    _loss(r"config: expected an EAPOConfig or None, got \{\}", {"method": replace(NUCLEUS, config={})}),
    _loss(r"process_group: expected None with entropy_top_p", {"method": NUCLEUS, "positive_weight": None}),
    _loss(r"schedule: expected 'one_pass' or 'auto' with main_grad, got 'autograd'",
          {"schedule": "autograd", "main_grad": torch.zeros(ROWS, D)}),
    _loss(r"main_grad: expected float32 \[5, 8\] cpu, got float32 \[4, 8\]", {"main_grad": torch.zeros(ROWS - 1, D)}),
    Odd(r"reduction: expected one of mean, sum, none, got 'all'", {"reduction": "all"}, {}, "cross_entropy"),
    Odd(r"hidden: expected \[6, D\] like targets, got float32 \[4, 8\]", {"hidden": torch.zeros(4, D)}, {}, "cross_entropy"),
]  # fmt: skip

DIFFERENT = [
    _stats(_differs("rows of hidden", "6", "4"), {"hidden": torch.zeros(4, D), "targets": BATCH.targets[:4]}),
    _stats(_differs("columns of the weight", "8", "7"), {"hidden": torch.zeros(N, 7), "weight": torch.zeros(ROWS, 7)}),
    _stats(_differs("dtype of the weight", "torch.float32", "torch.float64"),
           {"hidden": torch.zeros(N, D).double(), "weight": torch.zeros(ROWS, D).double()}),
    _stats(_differs("gradients wanted", "hidden", "none"), {"hidden": INPUTS.hidden},
           hidden=INPUTS.hidden.clone().requires_grad_()),
    _stats(_differs("bias", "one", "none"), {"bias": None}, bias=ZEROS),
    _stats(_differs("inv_temperature", "0.5", "0.25"), {"inv_temperature": 0.25}, inv_temperature=0.5),
    _stats(_differs("inv_temperature", "0.5", "a tensor"), {"inv_temperature": HALF}, inv_temperature=0.5),
    _stats(_differs("softcap", "None", "9.0"), {"softcap": 9}),
    _stats(_differs("logit_scale", "1.0", "2.0"), {"logit_scale": 2}),
    _stats(_differs("entropy", "grad", "none"), {"entropy": "none"}),
    _stats(_differs("second_moments", "False", "True"), {"second_moments": True}),
    _stats(_differs("memory budget", "536870912", "4096"), {"options": Options(memory_budget=4096)}),
    _stats(_differs("Options.plan", "auto", "recompute"), {"options": Options(memory_budget=2**20, plan="recompute")},
           options=Options(memory_budget=2**20)),
    _stats(_differs("Options.compact", "True", "False"), {"options": Options(compact=False)}),
    _stats(r"targets: expected the same values on all ranks, got others than rank 0", {"targets": OTHERS}),
    _stats(r"targets: expected the same values on all ranks", {"mask": torch.arange(N) > 0}),
    _stats(r"inv_temperature: expected the same values on all ranks",
           {"inv_temperature": HALF + torch.eye(N)[0]}, inv_temperature=HALF),
    _loss(_differs("schedule", "one_pass", "autograd"), {"schedule": "autograd"}),
    _loss(_differs("method", "eapo", "grpo"), {"method": "grpo", "positive_weight": None}),
    _loss(_differs("metrics", "True", "False"), {"metrics": False}),
    _loss(_differs("main_grad", "False", "True"), {"main_grad": torch.zeros(ROWS, D)}),
    _loss(_differs("old_logp", "True", "False"), {"batch": replace(BATCH, old_logp=None)}),
    _loss(r"targets: expected the same values on all ranks", {"batch": replace(BATCH, rewards=torch.tensor([1.0, 0.0]))},
          method=Method("nsr", DROPPED, positive_weight=0.0), positive_weight=None),
    Odd(_differs("call", "policy_loss", "token_stats"), {"reduction": "none"}, {}, "cross_entropy"),
]  # fmt: skip

CALLS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "stats": (token_stats, {"hidden": INPUTS.hidden, "targets": BATCH.targets}),
    "loss": (policy_loss, {"hidden": INPUTS.hidden, "batch": BATCH, "method": "eapo", "positive_weight": 0.7}),
    "cross_entropy": (linear_cross_entropy, {"hidden": INPUTS.hidden, "targets": BATCH.targets}),
}


def _message(rank: int, world: int, odd: Odd, *, group: bool = False) -> str:
    """group: pass the group itself, whose shard each call makes: the weight is a new tensor."""
    function, given = CALLS[odd.call]
    shard = dist.group.WORLD if group else VocabShard.chunked(dist.group.WORLD, ROWS * world)
    given = given | {"weight": INPUTS.weight[ROWS * rank : ROWS * (rank + 1)], "process_group": shard} | odd.common
    if rank == world - 1:
        given |= odd.change
    given["options"] = replace(given.get("options", Options()), debug=True)
    with pytest.raises(EapoError) as caught:
        function(**given)
    return str(caught.value)


def _odd_calls(rank: int, world: int) -> None:
    last = f" on rank {world - 1}"
    grouped = [(odd, True) for odd in REFUSED if "weight" not in odd.change]
    for odd, group in [*((odd, False) for odd in REFUSED + DIFFERENT), *grouped]:
        messages = [None] * world
        dist.all_gather_object(messages, _message(rank, world, odd, group=group))
        said = {str(message).removesuffix(last) for message in messages}
        assert len(said) == 1, messages
        assert re.match(odd.message, said.pop()), messages
        assert str(messages[0]).endswith(last), messages
        assert odd in REFUSED or len(set(messages)) == 1, messages
    _bad_groups(rank)
    _what_all_refuse(rank, world)
    stats = token_stats(
        INPUTS.hidden, INPUTS.weight[ROWS * rank : ROWS * (rank + 1)], BATCH.targets, process_group=dist.group.WORLD
    )
    assert stats.logp.isfinite().all()  # and the group works on


def _what_all_refuse(rank: int, world: int) -> None:
    """A budget below one row, and a target out of range on every rank."""
    weight = INPUTS.weight[ROWS * rank : ROWS * (rank + 1)]
    tokens, beyond = ROWS * world, BATCH.targets.clone()
    beyond[1] = tokens
    for message, changes in (
        (rf"targets: expected values in \[0, {tokens}\) or -100, got {tokens} in row 1", {"targets": beyond}),
        (r"Options.memory_budget: expected at least .* got 3", {"options": Options(memory_budget=3)}),
    ):
        with pytest.raises(EapoError, match=message):
            token_stats(INPUTS.hidden, weight, **{"targets": BATCH.targets, "process_group": dist.group.WORLD} | changes)


def _bad_groups(rank: int) -> None:
    """Arguments that are not a group of this process: the error is raised without a collective."""
    weight = INPUTS.weight[ROWS * rank : ROWS * (rank + 1)]
    other = dist.new_group([0])
    groups = [
        (r"process_group: expected a ProcessGroup .* got 'tp'", "tp"),
        (r"weight: expected at most 3 rows from row 0 of 6", VocabShard("0", 0, 6, 3)),
        (r"process_group: expected the name of a process group, got 'other'", VocabShard("other", ROWS * rank, 3 * ROWS, ROWS)),
    ]
    if rank:
        groups.append((r"process_group: expected a ProcessGroup of this process", other))
    for message, group in groups:
        with pytest.raises(EapoError, match=message):
            token_stats(INPUTS.hidden, weight, BATCH.targets, process_group=group)


@pytest.mark.parametrize("world", [2, 3])
def test_odd_calls_raise_on_every_rank(world: int) -> None:
    run_ranks(_odd_calls, world, world=world)
