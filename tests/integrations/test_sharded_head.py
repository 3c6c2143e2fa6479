"""A patched model under FSDP2 and DDP on two gloo processes: the gradients of the whole batch on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import WORLD, run_ranks
from tiny_models import tiny_batch, tiny_model

from eapo_kernels import EapoError
from eapo_kernels.integrations.hf import next_token_targets, patch_causal_lm

CASES = ["fsdp2_untied", "fsdp2_tied", "fsdp2_head_apart", "fsdp2_lora_head", "ddp"]


def _model(case: str) -> Any:
    model = tiny_model("llama_tied" if case == "fsdp2_tied" else "llama")
    if case == "fsdp2_lora_head":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return patch_causal_lm(model).train()


def _backward(model: Any, rows: slice) -> None:
    ids, attention, response = (t[rows] for t in tiny_batch(rows=4))
    stats = model(input_ids=ids, attention_mask=attention, targets=next_token_targets(ids, response))
    (stats.logp.sum() + 0.3 * stats.entropy.sum()).backward()


def _rank(rank: int, directory: str) -> None:
    """Every case on one pair of processes: starting them takes longer than all the rest."""
    for case in CASES:
        found = _sharded_gradients(case, rank)
        if rank == 0:
            torch.save(found, f"{directory}/{case}.pt")
    _assert_the_head_alone_is_refused()


def _sharded_gradients(case: str, rank: int) -> dict[str, torch.Tensor]:
    model: Any = _model(case)
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
    for _ in range(2):  # twice: what is unsharded in one backward must be there again in the next
        model.zero_grad()
        _backward(model, slice(2 * rank, 2 * rank + 2))
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    run_ranks(_rank, str(directory))
    return directory


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case: str, gradients: Path) -> None:
    found = torch.load(gradients / f"{case}.pt")
    model = _model(case)
    _backward(model, slice(0, 4))
    expected = {name: p.grad / WORLD for name, p in model.named_parameters() if p.grad is not None}  # both average
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def _assert_the_head_alone_is_refused() -> None:
    from torch.distributed.fsdp import fully_shard

    model = _model("fsdp2_untied")
    fully_shard(model)
    with pytest.raises(EapoError, match="expected a whole tensor"):
        model.lm_head(torch.zeros(2, 32), torch.zeros(2, dtype=torch.int64))
