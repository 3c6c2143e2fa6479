"""A head split unevenly over 2 and 3 gloo ranks: the numbers of one process, and the same bits on every rank."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparison import GRADIENT_FLOOR, STATISTICS_FLOOR, keep_fp16
from ranks import run_ranks
from split_vocabulary import CASES, SIZES, Case, V, counted, rows_of, run

from eapo_kernels import EapoError, VocabShard, reference, token_stats
from eapo_kernels.testing import assert_no_worse_than, make_inputs

ALL_ROWS = slice(0, V)
TRITON = {
    2: ("slabs", "chunks", "bfloat16_one_pass", "float16_saved", "support"),
    3: (
        "statistics", "saved", "nothing_saved", "bonus_softcap", "steep_statistics", "removed_statistics", "nothing_counts",
        "bfloat16_steep", "bfloat16_bad_guess", "bfloat16_removed_bad_guess", "float16_one_pass",
        "float16_steep", "float16_removed_bad_guess",
    ),
}  # fmt: skip
"""Interpreted, which takes its time: each is the only one of its kind."""

CALLS = {world: [(name, "torch") for name in CASES] + [(name, "triton") for name in TRITON[world]] for world in SIZES}


def _work(rank: int, world: int, directory: str) -> None:
    """Every case on one set of processes: starting them takes longer than all the rest."""
    os.environ["TRITON_INTERPRET"] = "1"
    shard = VocabShard.of(dist.group.WORLD, torch.empty(SIZES[world][rank], 1))
    assert (shard.start, shard.total, shard.max_shard_vocab) == (rows_of(rank, world).start, V, max(SIZES[world]))
    found = {}
    for name, backend in CALLS[world]:
        case = CASES[name]
        with counted() as counts, pytest.MonkeyPatch.context() as patch:
            if backend == "triton":
                keep_fp16(patch)
            results = run(case, case.inputs(), rows_of(rank, world), backend, shard)
        reductions = case.reductions
        if backend == "triton" and case.exponentials:
            reductions += case.gathers  # the targets' logits, once a chunk
            if case.dtype == torch.float16:
                reductions += case.gathers  # the sums of E by which rows are judged
        assert dict(counts) == {k: n for k, n in (("all_gather", case.gathers), ("all_reduce", reductions)) if n}, name
        assert all(value.isfinite().all() for value in results.values()), name
        if backend == "torch" or name == "bfloat16_bad_guess":
            again = run(case, case.inputs(), rows_of(rank, world), backend, shard)
            assert all(torch.equal(results[k], again[k]) for k in results), f"{name}: another run gives other bits"
        found[name, backend] = results
    torch.save(found, f"{directory}/{rank}.pt")


@pytest.mark.parametrize("world", CALLS)
def test_a_split_head_equals_the_full_one_up_to_rounding(world: int, tmp_path: Path) -> None:
    run_ranks(_work, world, str(tmp_path), world=world)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for name, backend in CALLS[world]:
        _check(name, backend, [found[name, backend] for found in results])


def _check(name: str, backend: str, found: list[dict[str, torch.Tensor]]) -> None:
    """found: results of each rank."""
    case = CASES[name]
    float64 = run(replace(case, dtype=torch.float64), _widened(case), ALL_ROWS, "torch", None)
    plain = run(case, case.inputs(), ALL_ROWS, "torch", None)
    assert found[0].keys() == float64.keys()
    for key, exact in float64.items():
        if key in ("d_weight", "d_bias"):
            actual = torch.cat([part[key] for part in found])
        else:
            actual = found[0][key]
            assert all(torch.equal(part[key], actual) for part in found), f"{name} {backend} {key}: ranks differ"
        if case.dtype == torch.float64:
            torch.testing.assert_close(
                actual, exact, rtol=1e-11, atol=1e-11, msg=lambda m, key=key: f"{name} {backend} {key}: {m}"
            )
        else:
            floor = GRADIENT_FLOOR[case.dtype] if key.startswith("d_") else 2 * STATISTICS_FLOOR
            assert_no_worse_than(actual, plain[key], exact, floor=floor, name=f"{name} {backend} {key}")


def _widened(case: Case) -> Any:
    """The numbers of the case's inputs in float64."""
    return case.inputs().to(torch.float64)


def test_the_full_head_equals_the_oracle() -> None:
    """So that the comparison above is one with the dense reference."""
    case = CASES["exact_statistics"]
    inputs, options = case.inputs(), dict(case.arguments)
    options["inv_temperature"] = options["inv_temperature"].double()
    expected = reference.token_stats(inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, **options)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(run(case, inputs, ALL_ROWS, "torch", None)[name], value, rtol=1e-11, atol=1e-11)


def _groups(rank: int) -> None:
    _a_group_gives_the_same_as_its_shard(rank)
    _a_shard_compiles(rank)
    _even_parts_need_no_exchange(rank)
    _sequences_on_different_ranks_need_nothing(rank)


def test_groups() -> None:
    run_ranks(_groups)


def _a_group_gives_the_same_as_its_shard(rank: int) -> None:
    case = CASES["saved"]
    rows, group = rows_of(rank, 2), dist.group.WORLD
    with counted() as counts:
        found = run(case, case.inputs(), rows, "torch", group)
    assert counts["all_gather"] == case.gathers + 1  # the sizes, with the shard
    inputs = case.inputs()
    weight = inputs.weight[rows]
    for sizes in (1, 0):  # the shard of a weight is made at its first call
        with counted() as counts:
            token_stats(inputs.hidden, weight, inputs.targets, process_group=group)
        assert counts["all_gather"] == 1 + sizes
    shard = VocabShard.of(group, case.inputs().weight[rows])
    for key, value in run(case, case.inputs(), rows, "torch", shard).items():
        assert torch.equal(found[key], value)
    with torch.no_grad():
        weight.data = inputs.weight[rows][: 5 - rank].clone()  # another shape: another shard
    expected = token_stats(inputs.hidden, inputs.weight[rows][: 5 - rank], inputs.targets % 9, process_group=group)
    found_again = token_stats(inputs.hidden, weight, inputs.targets % 9, process_group=group)
    assert torch.equal(found_again.logp, expected.logp)
    alone = [dist.new_group([other]) for other in range(2)][rank]  # a group of one rank with the full weight
    with counted() as counts:
        found = run(case, case.inputs(), ALL_ROWS, "torch", alone)
    assert counts == {"all_gather": 1}
    for key, value in run(case, case.inputs(), ALL_ROWS, "torch", None).items():
        assert torch.equal(found[key], value)


def _a_shard_compiles(rank: int) -> None:
    case = CASES["saved"]
    inputs, rows = case.inputs(), rows_of(rank, 2)
    shard = VocabShard.of(dist.group.WORLD, inputs.weight[rows])
    weight = inputs.weight[rows].clone().requires_grad_()

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        stats = token_stats(hidden, weight, inputs.targets, process_group=shard)
        return stats.logp.sum() + stats.entropy.sum()

    loss = torch.compile(plain, fullgraph=True, backend="aot_eager")(inputs.hidden, weight)
    (found,) = torch.autograd.grad(loss, [weight])
    (expected,) = torch.autograd.grad(plain(inputs.hidden, weight), [weight])
    assert torch.equal(found, expected)


def _even_parts_need_no_exchange(rank: int) -> None:
    with counted() as counts:
        shard = VocabShard.chunked(dist.group.WORLD, 11)
    assert not counts
    assert shard == VocabShard(dist.group.WORLD.group_name, 6 * rank, 11, 6)
    assert shard == VocabShard.of(dist.group.WORLD, torch.empty(6 - rank, 1))
    with pytest.raises(EapoError, match=r"at least one row on every rank, got shards of \[1, 0\] rows"):
        VocabShard.chunked(dist.group.WORLD, 1)


def _sequences_on_different_ranks_need_nothing(rank: int) -> None:
    """Sequence and context parallelism: each rank has some of the positions and the full head."""
    inputs, mine = make_inputs(40, 8, 33), slice(20 * rank, 20 * rank + 20)
    leaves = inputs.leaves()
    expected = torch.autograd.grad(token_stats(*leaves[:2], inputs.targets).entropy.sum(), leaves)
    stats = token_stats(inputs.hidden[mine], inputs.weight, inputs.targets[mine])
    found = torch.autograd.grad(stats.entropy.sum(), leaves)
    for gradient, exact in zip(found, expected, strict=True):
        dist.all_reduce(gradient)
        torch.testing.assert_close(gradient, exact)


def test_without_processes() -> None:
    inputs = make_inputs(4, 8, 9)
    for group in (VocabShard("0", 0, 18, 9), 3):
        with pytest.raises(EapoError, match=r"process_group: expected torch.distributed initialised"):
            token_stats(inputs.hidden, inputs.weight, inputs.targets, process_group=group)
