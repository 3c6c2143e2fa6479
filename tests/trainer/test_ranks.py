"""Two processes give the run of one up to rounding, resume, and end when one of them ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_on_ranks import train
from safetensors.torch import load_file
from test_checkpoints import assert_same_run, names, path_of
from test_loop import rows, without_times
from tiny import PAPER, WORDS, make_model, make_tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from trainer import ranks
from trainer.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, RewardsConfig, RolloutConfig
from trainer.config.settings import to_toml
from trainer.errors import RemoteRankError
from trainer.learning.batching import plan_shares
from trainer.models.policy import load_policy
from trainer.records import Rollouts
from trainer.runs.saved import export

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

CASES: dict[str, dict[str, Any]] = {
    "full": {
        "rollout": {"top_p": 0.9}, "model": {"packing": "always"}, "optim": {"minibatches": 2, "epochs": 2},
        "eval": {"every": 2},
    },
    # Weights over the whole step (quantiles of all tokens); minibatches of two or three completions, unevenly shared.
    "batch_scope": {"loss": {"method": "clip_cov"}, "optim": {"minibatches": 5, "micro_batch_tokens": 30}},
    "adapters": {
        "lora": {"rank": 2}, "model": {"gradient_checkpointing": True}, "loss": {"kl_coef": 0.1},
        "optim": {"minibatches": 2},
    },
    "following_reference": {
        "loss": {"method": "spear", "reference_ema": 0.8, "kl_coef": 0.1},
        "model": {"gradient_checkpointing": True},
    },
    "aepo": {"loss": {"method": "aepo"}},
    "dapo": {"loss": {"method": "dapo"}, "rewards": {"functions": ("reward_functions:has_a_low_number",)}},
    "compared": {"rewards": {"functions": ("reward_functions:share_of_the_longest",)}, "loss": {"method": "grpo"}},
    "bfloat16": {"steps": 3, "model": {"dtype": "bfloat16"}, "lora": {"rank": 2}, "optim": {"lr": 1e-3}},
}  # fmt: skip


# What fails in the fourth step of rank 1 alone: the function and the number of its call (the first is an evaluation's).
FAILURES = {
    "no_reward": ("reward_functions.low_numbers", 5),
    "no_memory_in_a_rollout": ("trainer.rollouts.transformers_engine.TransformersEngine._complete", 5),
    "no_memory_in_an_update": ("trainer.learning.learner.policy_loss", 4),
}

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
}  # fmt: skip
LOADS: dict[str, dict[str, Any]] = {
    "plain": {}, "tied": {}, "lora": {"lora": {"rank": 2}},
    "tied-lora-bfloat16": {"lora": {"rank": 2}, "model": {"dtype": "bfloat16", "gradient_checkpointing": True}},
}  # fmt: skip

Weights = dict[str, torch.Tensor]


@dataclass
class Pair:
    """What the launches left: recipes by case, and the exit statuses and the output of each
    launch's ranks.
    """

    one: dict[str, Config]
    two: dict[str, Config]
    straight: Config
    killed: Config
    narrowed: Config
    failed: dict[str, Config]
    loads: dict[str, Config]
    statuses: dict[str, list[int]]
    out: dict[str, list[str]]
    err: dict[str, list[str]]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}


def base_config(directory: Path, **sizes: Any) -> Config:
    """Two steps on a tiny model of these ``sizes``, with its files in ``directory``."""
    make_model(**sizes).save_pretrained(directory / "tiny")
    make_tokenizer().save_pretrained(directory / "tiny")
    prompts = [{"prompt": f"what is after n{i} ?" + " is" * (i % 3), "answer": f"n{i + 1}"} for i in range(9)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    data = str(directory / "prompts.jsonl")
    return Config(
        out=str(directory / "runs"), steps=2, diagnose_every=2, model=ModelConfig(path=str(directory / "tiny"), device="cpu"),
        data=DataConfig(train=data, eval=data, eval_limit=3), rollout=RolloutConfig(prompts=3, responses=4, max_new_tokens=6),
        rewards=RewardsConfig(functions=("reward_functions:low_numbers",)), optim=OptimConfig(lr=1e-2),
        eapo=PAPER, eval=EvalConfig(responses=3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return base_config(tmp_path_factory.mktemp("ranks"))


def recipe(config: Config, name: str = "") -> str:
    path = Path(config.out).parent / f"{name or config.name}.toml"
    path.write_text(to_toml(config))
    return str(path)


Statuses, Texts = dict[str, list[int]], dict[str, list[str]]


def run_launches(directory: Path, launches: list[dict[str, Any]]) -> tuple[Statuses, Texts, Texts]:
    """Name of each launch -> exit status, output and errors of its two ranks."""
    (directory / "launches.json").write_text(json.dumps(launches))
    command = [sys.executable, str(HERE / "runs_on_ranks.py"), str(directory / "launches.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment())
    assert done.returncode == 0, done.stderr
    statuses = {name: [int(a), int(b)] for name, a, b in (line.split() for line in done.stdout.splitlines())}
    out, err = (
        {name: [(directory / f"{name}-{rank}.{kind}").read_text() for rank in range(2)] for name in statuses}
        for kind in ("out", "err")
    )
    return statuses, out, err


@pytest.fixture(scope="module")
def pair(base: Config) -> Pair:
    two = {name: base.replace(name=f"two-{name}", **sections) for name, sections in CASES.items()}
    tied = base_config(Path(base.out).parent / "with_a_tied_head", tie_word_embeddings=True).model
    two["tied"] = base.replace(name="two-tied", model=tied.model_dump())
    straight = base.replace(name="straight", steps=5, checkpoint={"every": 1, "keep": 5}, loss={"method": "spear"})
    killed, half = straight.replace(name="killed", resume="auto"), straight.replace(name="narrowed", checkpoint={"every": 2})
    broken = base.replace(name="broken", rewards={"functions": ("reward_functions:raises_on_the_second_rank",)})
    failed = {name: straight.replace(name=name, resume="auto", checkpoint={"every": 2}) for name in FAILURES}
    loads = {f"{family}-{kind}": load_config(base, family, kind) for family in FAMILIES for kind in LOADS}
    launches = [
        # A rank's third save: before, in or after the write of its shards.
        {"name": "killed", "kill": 6, "recipes": [recipe(killed)]},
        *(
            {"name": name, "command": ["train", "--config", recipe(failed[name])], "fail": where}
            for name, where in FAILURES.items()
        ),
        {"name": "all", "recipes": [recipe(config) for config in (*two.values(), straight, killed, half, *failed.values())]},
        {"name": "load", "load": [recipe(config) for config in loads.values()]},
        {"name": "broken", "command": ["train", "--config", recipe(broken)]},
    ]
    statuses, out, err = run_launches(Path(base.out).parent, launches)
    assert statuses["all"] == [0, 0], err["all"]
    one = {name: config.replace(name=f"one-{name}") for name, config in two.items()}
    for config in one.values():
        assert train(config)
    (path_of(half) / "finished.json").unlink()
    for later in ("step-000004", "step-000005"):
        shutil.rmtree(path_of(half) / "checkpoints" / later)
    narrowed = half.replace(resume="auto")
    assert train(narrowed)
    assert json.loads((path_of(half) / "environment.json").read_text())["processes"] == 1
    return Pair(one, two, straight, killed, narrowed, failed, loads, statuses, out, err)


def load_config(base: Config, family: str, kind: str) -> Config:
    """A tiny model of a family, with a head that is tied or not; adapters or all weights."""
    directory = Path(base.out).parent / f"{family}-{kind}"
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
             "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
    settings, model = FAMILIES[family]
    torch.manual_seed(0)
    model(settings(**sizes, tie_word_embeddings="tied" in kind)).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return base.replace(name=f"{family}-{kind}", lora=LOADS[kind].get("lora", {}),
                        model={"path": str(directory), "attention": "eager", **LOADS[kind].get("model", {})})  # fmt: skip


def assert_close_runs(one: Config, two: Config, rel: float, at: float) -> tuple[Weights, Weights]:
    """The same completions, and logged numbers within the bounds. Returns the saved weights of
    both.
    """
    assert rows(one, "samples") == rows(two, "samples")
    logged = zip(without_times(rows(one)), without_times(rows(two)), strict=True)
    for a, b in logged:
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert value == (b[name] if value is None else pytest.approx(b[name], rel=rel, abs=at)), f"step {a['step']}: {name}"
    for a, b in zip(rows(one, "evaluations"), rows(two, "evaluations"), strict=True):
        assert a["values"] == {name: pytest.approx(values, rel=rel, abs=at) for name, values in b["values"].items()}
    file = "adapter_model.safetensors" if one.lora.rank else "model.safetensors"
    ours, theirs = (load_file(path_of(config) / "model" / file) for config in (one, two))
    assert ours.keys() == theirs.keys()
    return ours, theirs


def assert_equal_in_fp32(one: Config, two: Config) -> None:
    """Numbers within 1e-4 of their size or 2e-5: fp32 sums in another order, through the steps of
    Adam.
    """
    ours, theirs = assert_close_runs(one, two, rel=1e-4, at=2e-5)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=4e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", ["tied", *(name for name in CASES if name != "bfloat16")])
def test_two_processes_are_one(pair: Pair, case: str) -> None:
    assert_equal_in_fp32(pair.one[case], pair.two[case])


def test_two_processes_are_one_in_bfloat16(pair: Pair) -> None:
    """Given completions (``GivenCompletions``), so that every number is a continuous function of
    the weights.

    u = 2^-8 is the unit roundoff of bfloat16. A logit of size 4 passes through a handful of
    roundings, so two runs that round differently agree within 4 u of a number's size, or 4 u nats.
    Adam divides a gradient by its own size: the share 4 u of the entries, whose gradient is no
    larger than its error, may move in the other direction. Each such entry differs by twice its
    update, and the adapters' B, which starts from zero, by 2 sqrt(4 u) of its norm.
    """
    bound = 4 * 2**-8
    ours, theirs = assert_close_runs(pair.one["bfloat16"], pair.two["bfloat16"], rel=bound, at=bound)
    a, b = (torch.cat([w.flatten() for name, w in sorted(side.items()) if "lora_B" in name]) for side in (ours, theirs))
    assert (a - b).norm() <= 2 * bound**0.5 * b.norm()


def test_a_killed_pair_ends_and_resumes_bitwise(pair: Pair) -> None:
    """The rank that is left ends with an error, and the next launch continues from the last
    checkpoint.
    """
    assert pair.statuses["killed"] == [1, -signal.SIGKILL]
    assert "step 3/5" in pair.out["killed"][0]
    assert "step 4/5" not in pair.out["killed"][0]
    assert "resuming from step-000002: 2 of 5 steps are done" in pair.out["all"][0]
    assert_same_run(pair.straight, pair.killed)


def test_an_error_is_printed_once_by_the_rank_that_raised_it(pair: Pair) -> None:
    assert pair.statuses["broken"] == [1, 1]
    assert "error: " not in pair.err["broken"][0]
    assert pair.err["broken"][1].count("error: ") == 1
    assert "error: reward reward_functions:raises_on_the_second_rank: expected" in pair.err["broken"][1]
    assert "(rank 1 of 2)" in pair.err["broken"][1]


@pytest.mark.parametrize("name", FAILURES)
def test_a_rank_that_fails_ends_all_and_the_run_resumes_bitwise(pair: Pair, name: str) -> None:
    """Where the ranks exchange results, the failure of one is known to all and the third step is
    saved. Within an update the others wait in a collective: they end without a checkpoint, and the
    run continues from its last one.
    """
    assert pair.statuses[name] == [1, 1]
    saved = 2 if "update" in name else 3
    out, err = pair.out[name], pair.err[name]
    assert "step 3/5" in out[0], out[0] + err[0]
    how = "nothing was saved: the ranks did not fail together" if "update" in name else f"saved {path_of(pair.failed[name])}"
    assert how in err[1]
    assert f"to continue from step-00000{saved}: torchrun --standalone --nproc-per-node 2 -m trainer train --config" in err[1]
    assert "CUDA out of memory" in err[1]
    assert "to continue from" not in err[0], "one rank reports it"
    assert f"resuming from step-00000{saved}: {saved} of 5 steps are done" in pair.out["all"][0]
    assert_same_run(pair.straight, pair.failed[name])


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_reads_the_model_and_the_others_get_their_shards(pair: Pair, family: str, kind: str) -> None:
    """Weights and buffers on both ranks equal those of one process. Rank 1 starts without weights
    and never has more than a few full matrices of its 15 or more: the received one, its copy, and those that
    the transport has not let go yet.
    """
    assert pair.statuses["load"] == [0, 0], pair.err["load"]
    config = pair.loads[f"{family}-{kind}"]
    plain = load_policy(config.model, config.lora, seed=1)
    for rank in range(2):
        found = torch.load(f"{recipe(config)}-{rank}.pt")
        assert found["meta"]
        assert found["full"] <= 4 or rank == 0, "rank 0 has the whole model"
        assert sum(value.dim() == 2 for value in plain.state_dict().values()) >= 15
        assert found["tied"] == ("tied" in kind)
        assert found["eos"] == plain.eos_ids
        for theirs, ours in ((found["weights"], plain.state_dict()), (found["buffers"], dict(plain.named_buffers()))):
            assert theirs.keys() == ours.keys()
            for name, value in ours.items():
                assert torch.equal(theirs[name], value), name
                assert theirs[name].dtype == value.dtype, name


def test_one_process_resumes_from_two(pair: Pair) -> None:
    assert_equal_in_fp32(pair.straight, pair.narrowed)


def test_a_checkpoint_of_two_processes_is_exported_as_the_full_model(pair: Pair, tmp_path: Path) -> None:
    run = path_of(pair.straight)
    exported = load_file(export(run / "checkpoints" / "step-000005", tmp_path / "out", "float32") / "model.safetensors")
    saved = load_file(run / "model" / "model.safetensors")
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], weight) for name, weight in saved.items())


def test_sigint_leaves_a_checkpoint_under_torchrun(base: Config) -> None:
    config = base.replace(name="stopped", steps=100_000, data={"eval": ""})
    process = subprocess.Popen(
        [*TORCHRUN, "-m", "trainer", "train", "--config", recipe(config)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    while len(rows(config)) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    done_steps = len(rows(config))
    assert names(config) == [f"step-{done_steps:06d}"], out + err
    assert err.count("stopping at the next safe point") == 1


def test_one_process_needs_no_group() -> None:
    def fails() -> int:
        raise RemoteRankError("no")

    assert (ranks.rank(), ranks.size(), ranks.is_main()) == (0, 1, True)
    assert ranks.all_gather(lambda: 3) == [3]
    assert ranks.run_on_main(lambda: "x") == "x"
    assert ranks.any_rank(True)
    assert not ranks.any_rank(False)
    with pytest.raises(RemoteRankError):
        ranks.all_gather(fails)


def test_shares_are_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "size", lambda: 3)
    lengths = [5, 9, 2, 2, 7, 3, 2, 8]
    completions = Rollouts([[2]] * 8, [[3] * (length - 1) for length in lengths], [], [])
    found, one = [], []
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        (own,), repeated = plan_shares(completions, range(8), budget=1000)
        assert not repeated
        found.append(own)
        one.append(plan_shares(completions, [4], budget=1000))
    assert sorted(i for own in found for i in own) == list(range(8))
    assert [sum(lengths[i] for i in own) for own in found] == [13, 13, 12]
    assert one == [([[4]], []), ([], [[4]]), ([], [[4]])]
