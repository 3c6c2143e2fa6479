"""A patched model under DeepSpeed ZeRO-3 on two gloo processes: `make test-zero3`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from sharded_model import assert_gradients_of_one_process, sharded_loss, sharded_model

from eapo_kernels import EapoError
from eapo_kernels.integrations.hf import unpatch_causal_lm

if importlib.util.find_spec("deepspeed") is None:  # not imported here: the import selects an accelerator
    pytest.skip("DeepSpeed is not installed: make test-zero3", allow_module_level=True)

CASES = ["untied", "zero3_tied", "lora_head"]


def _rank(rank: int, directory: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]  # gloo does without
    deepspeed.init_distributed(dist_backend="gloo")
    for case in CASES:
        found = _gradients(case, rank, deepspeed)
        if rank == 0:
            torch.save(found, f"{directory}/{case}.pt")


def _gradients(case: str, rank: int, deepspeed: Any) -> dict[str, torch.Tensor]:
    model = sharded_model(case)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trained, lr=0.0),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    assert all(p.numel() == 0 for p in model.parameters()), "every parameter is sharded"
    found = {}
    for _ in range(2):  # twice: the second forward must gather again
        engine.backward(sharded_loss(engine, slice(2 * rank, 2 * rank + 2)))
        found = {n: deepspeed.utils.safe_get_full_grad(p).clone() for n, p in model.named_parameters() if p.requires_grad}
        engine.step()
    if case == "untied":
        with pytest.raises(EapoError, match="unpatch before FSDP2 or DeepSpeed wraps"):
            unpatch_causal_lm(model)
    return found


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    run_ranks(_rank, str(directory))
    return directory


@pytest.mark.parametrize("case", CASES)
def test_gradients_match_one_process(case: str, gradients: Path) -> None:
    assert_gradients_of_one_process(torch.load(gradients / f"{case}.pt"), case)
