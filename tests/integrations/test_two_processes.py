"""Two gloo processes: patched models under FSDP2 and DDP, a tensor-parallel head, the weight."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import WORLD, run_ranks
from sharded_model import assert_gradients_of_one_process, sharded_loss, sharded_model
from tiny_models import tiny_batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from eapo_kernels import EapoError, TokenBatch, TokenStats, policy_loss
from eapo_kernels.integrations import AdvantageWeight, FusedLMHead
from eapo_kernels.integrations.hf import next_token_targets

CASES = ["fsdp2_untied", "fsdp2_tied", "fsdp2_head_apart", "fsdp2_lora_head", "ddp"]


def _rank(rank: int, directory: str) -> None:
    """All cases on one pair of processes, because starting the processes takes most of the time."""
    for case in CASES:
        found = _sharded_gradients(case, rank)
        if rank == 0:
            torch.save(found, f"{directory}/{case}.pt")
    _assert_the_head_alone_is_refused()
    _assert_a_head_split_by_rows_is_not_gathered()
    _assert_tensor_parallel_head_under_fsdp2(rank)
    torch.save(_advantage_weight(rank), f"{directory}/weight{rank}.pt")


def _sharded_gradients(case: str, rank: int) -> dict[str, torch.Tensor]:
    model: Any = sharded_model(case)
    if case == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        base = model.get_base_model() if case == "fsdp2_lora_head" else model
        for layer in base.model.layers:
            fully_shard(layer)
        if case == "fsdp2_head_apart":
            fully_shard(base.lm_head)
        fully_shard(model)
    for _ in range(2):  # twice: the second forward must gather again what the first backward resharded
        model.zero_grad()
        sharded_loss(model, slice(2 * rank, 2 * rank + 2)).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    run_ranks(_rank, str(directory))
    return directory


@pytest.mark.parametrize("case", CASES)
def test_gradients_match_one_process(case: str, results: Path) -> None:
    assert_gradients_of_one_process(torch.load(results / f"{case}.pt"), case)


def _advantage_weight(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = AdvantageWeight()
    for step in range(2):
        entropies = torch.arange(1.0, 2.0 + 3 * rank) / (1 + step)  # 1 token on rank 0, 4 on rank 1
        weight.observe(entropies, torch.ones_like(entropies))
        weight.step()
    return weight.weight, weight.controller.initial_entropy


def test_advantage_weight_is_one_number_and_every_token_counts_the_same(results: Path) -> None:
    found = [torch.load(results / f"weight{rank}.pt") for rank in range(WORLD)]
    assert found[0] == found[1]
    assert float(found[0][1]) == (1 + 1 + 2 + 3 + 4) / 5
    assert float(found[0][0]) == 0.5


def _assert_the_head_alone_is_refused() -> None:
    from torch.distributed.fsdp import fully_shard

    model = sharded_model("untied")
    fully_shard(model)
    with pytest.raises(EapoError, match="expected a full tensor"):
        model.lm_head(torch.zeros(2, 32), torch.zeros(2, dtype=torch.int64))


def _assert_a_head_split_by_rows_is_not_gathered() -> None:
    """A DTensor head: statistics, gradients and a loss, with no collective of DTensor."""
    mesh = init_device_mesh("cpu", (WORLD,))
    group = mesh.get_group()
    torch.manual_seed(3)
    full = FusedLMHead(16, 33, bias=True, softcap=9.0)
    hidden, targets = torch.randn(2, 5, 16), torch.randint(33, (2, 5))
    head = copy.deepcopy(full)
    for name in ("weight", "bias"):
        setattr(head, name, torch.nn.Parameter(distribute_tensor(getattr(full, name).detach(), mesh, [Shard(0)])))
    with pytest.raises(EapoError, match="tensor-parallel group give process_group"):
        head(hidden, targets)
    with pytest.raises(EapoError, match=r"weight: expected a DTensor \[Shard\(0\)\] on the one-dimensional mesh"):
        head(hidden, targets, process_group=dist.new_group(list(range(WORLD))))
    with pytest.raises(EapoError, match="weight_delta: expected None"):
        head(hidden, targets, process_group=group, weight_delta=torch.zeros(33, 16))

    def gradients(head: FusedLMHead, hidden: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        head.zero_grad()
        leaf = hidden.detach().clone().requires_grad_()
        stats = head(leaf, targets, **options)
        assert isinstance(stats, TokenStats)
        (stats.logp + 0.5 * stats.entropy).sum().backward()
        return [t.grad.full_tensor() if isinstance(t.grad, DTensor) else t.grad for t in (leaf, head.weight, head.bias)]

    expected = gradients(full, hidden)
    with CommDebugMode() as communication:
        stats = head(hidden, targets, process_group=group)
        (stats.logp + 0.5 * stats.entropy).sum().backward()
    assert communication.get_total_counts() == 0  # of DTensor: the op's own are inside a custom op
    for given in (hidden, distribute_tensor(hidden, mesh, [Shard(1)])):
        for value, exact in zip(gradients(head, given, process_group=group), expected, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5)

    batch = TokenBatch(targets.reshape(-1), torch.arange(10) // 5, advantages=torch.tensor([1.0, -0.5]))

    def compute(hidden: torch.Tensor, weight: torch.Tensor, **given: Any) -> torch.Tensor:
        return policy_loss(hidden.reshape(-1, 16), weight, batch, method="grpo", **given).loss

    torch.testing.assert_close(head(hidden, compute=compute, process_group=group), full(hidden, compute=compute))


def _assert_tensor_parallel_head_under_fsdp2(rank: int) -> None:
    """A tensor-parallel head inside an FSDP2 model: in the forward it is on the tensor mesh."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "tensor"))
    model = sharded_model("untied")
    sharded_loss(model, slice(0, 4)).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    head = model.lm_head
    head.weight = torch.nn.Parameter(distribute_tensor(head.weight.detach(), mesh["tensor"], [Shard(0)]))
    fully_shard(model, mesh=mesh["data"])
    ids, attention, response = tiny_batch(rows=4)
    targets = next_token_targets(ids, response)
    stats = model(input_ids=ids, attention_mask=attention, targets=targets, process_group=mesh["tensor"].get_group())
    (stats.logp.sum() + 0.3 * stats.entropy.sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-5, msg=f"{name}, rank {rank}"
        )
