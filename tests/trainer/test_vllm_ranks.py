"""Two processes with a real vLLM each, on a CPU: the run of one process, resumed and broken ones."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("vllm", reason="vLLM pins other versions and has an environment of its own: make test-vllm")

from test_checkpoints import assert_same_run
from test_loop import rows
from test_ranks import Statuses, Texts, assert_equal_in_fp32, base_config, recipe, run_launches
from test_vllm_engine import EXACT, SIZES
from tiny import make_model, make_tokenizer

from trainer.config import Config
from trainer.loop import train

CASES: dict[str, dict[str, Any]] = {
    "full": {"optim": {"minibatches": 2, "epochs": 2, "lr": 0.02}, "eval": {"every": 2}, "steps": 3},
    "adapters": {"lora": {"rank": 2}, "model": {"gradient_checkpointing": True}, "optim": {"lr": 0.03}, "steps": 3},
    "tied": {"optim": {"lr": 0.02}},
    "parallel": {"lora": {"rank": 2}, "optim": {"lr": 0.03}},
}


class Pair(NamedTuple):
    two: dict[str, Config]
    straight: Config
    killed: Config
    failed: Config
    statuses: Statuses
    out: Texts
    err: Texts


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("vllm")
    base = base_config(directory, **SIZES).replace(rollout={"engine": "vllm", "vllm": {"kv_cache_gib": 0.1}})
    two = {name: base.replace(name=f"two-{name}", **sections) for name, sections in CASES.items()}
    make_model(**SIZES, tie_word_embeddings=True).save_pretrained(directory / "tied")
    make_tokenizer().save_pretrained(directory / "tied")
    two["tied"] = two["tied"].replace(model={"path": str(directory / "tied")})
    two["parallel"] = two["parallel"].replace(rollout={"vllm": {"tensor_parallel_size": 2}})
    straight = base.replace(name="straight", steps=4, checkpoint={"every": 1, "keep": 4}, optim={"lr": 0.03})
    killed, failed = (straight.replace(name=name, resume="auto") for name in ("killed", "failed"))
    third_step = ("trainer.rollouts.vllm_engine.VllmEngine._sample", 5)  # after the check at the start and an evaluation
    launches = [
        {"name": "killed", "kill": 6, "recipes": [recipe(killed)]},
        {"name": "failed", "command": ["train", "--config", recipe(failed)], "fail": third_step},
        {
            "name": "all",
            "recipes": [recipe(config) for config in (two["full"], two["adapters"], two["tied"], straight, killed, failed)],
        },
        {"name": "parallel", "recipes": [recipe(two["parallel"])]},
    ]
    drop_shared_memory()
    result = run_launches(directory, launches)
    drop_shared_memory()
    return Pair(two, straight, killed, failed, *result)


def drop_shared_memory() -> None:
    """On CPUs vLLM 0.32 gives the shared memory of a tensor-parallel group a constant name, and a
    process that ends without its destructors, as a killed one and these do, leaves it behind.
    """
    for left in Path("/dev/shm").glob("-tp:*-cpushm_*"):
        left.unlink()


@pytest.mark.parametrize("case", CASES)
def test_two_engines_are_one(pair: Pair, case: str) -> None:
    """The same completions and numbers. The log-probs of all completions, from both engines, are the
    trainer's after every update: with stale weights they would be off by more.
    """
    launch = "parallel" if case == "parallel" else "all"
    assert pair.statuses[launch] == [0, 0], pair.err[launch]
    two = pair.two[case]
    one = two.replace(name=f"one-{case}", rollout={"vllm": {"tensor_parallel_size": 1}})
    assert train(one)
    assert_equal_in_fp32(one, two)
    metrics = rows(two)
    assert len(metrics) == two.steps
    assert max(row["rollout/logp_gap_max"] for row in metrics) < EXACT
    assert metrics[0]["eapo/entropy"] != pytest.approx(metrics[-1]["eapo/entropy"], abs=1e-3), "the weights have changed"


def test_a_killed_pair_ends_and_resumes_bitwise(pair: Pair) -> None:
    assert pair.statuses["killed"] == [1, -signal.SIGKILL]
    assert "resuming from step-" in pair.out["all"][0]
    assert_same_run(pair.straight, pair.killed)


def test_an_engine_that_fails_ends_both_and_the_run_resumes_bitwise(pair: Pair) -> None:
    assert pair.statuses["failed"] == [1, 1]
    assert "step 2/4" in pair.out["failed"][0]
    assert "step 3/4" not in pair.out["failed"][0]
    assert "CUDA out of memory" in pair.err["failed"][1]
    assert_same_run(pair.straight, pair.failed)
