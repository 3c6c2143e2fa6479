"""Checkpoints: an interrupted run resumes bitwise, damage is detected and named, settings are
compared.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reward_functions
from test_loop import rows, without_times
from tiny import make_model, make_tokenizer, raised_by, tiny_config

from trainer.__main__ import main
from trainer.config import Config
from trainer.config.settings import parse_config, to_toml
from trainer.errors import CheckpointError, ConfigError, DivergenceError
from trainer.loop import train
from trainer.runs.locate import checkpoints
from trainer.runs.resume import changes, settings_of

Change = Callable[..., Config]
HERE = Path(__file__).parent


def path_of(config: Config) -> Path:
    return Path(config.out) / config.name


def names(config: Config) -> list[str]:
    return [path.name for path in checkpoints(path_of(config) / "checkpoints")]


def assert_same_run(one: Config, other: Config) -> None:
    """Everything equal except durations."""
    for a, b in zip(without_times(rows(one)), without_times(rows(other)), strict=True):
        assert {name: (a[name], b[name]) for name in a if a[name] != b[name]} == {}, f"step {a['step']}"
        assert a.keys() == b.keys()
    for stream in ("samples", "evaluations"):
        assert rows(one, stream) == rows(other, stream)
    weights = "adapter_model.safetensors" if one.lora.rank else "model.safetensors"
    assert (path_of(one) / "model" / weights).read_bytes() == (path_of(other) / "model" / weights).read_bytes()


CASES: dict[str, dict[str, Any]] = {
    # Groups that were drawn again, supports, a reference that follows, two updates a step, evaluations in between.
    "full": {
        "rollout": {"top_p": 0.9},
        "loss": {"method": "dapo", "reference_ema": 0.9, "kl_coef": 0.01},
        "optim": {"minibatches": 2, "schedule": "cosine", "lr": 1e-2},
        "eval": {"every": 3},
    },
    "adapters": {"lora": {"rank": 2}, "checkpoint": {"every": 2, "keep": 1}},
}


@pytest.fixture(scope="module")
def killed_runs(model_dir: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Config, Config]]:
    """Case -> the configurations of an uninterrupted run and of one that was killed and resumed,
    all from one process.
    """
    directory = tmp_path_factory.mktemp("killed")
    runs, cases = {}, []
    for name, sections in CASES.items():
        config = tiny_config(model_dir, prompts, directory / name)
        sections = {"checkpoint": {"every": 1}, "rewards": {"functions": ("reward_functions:noisy",)}, **sections}
        through = config.replace(name="through", steps=8, **sections)
        killed = through.replace(name="killed")
        case = {"metrics": str(path_of(killed) / "metrics.jsonl"), "seed": 11, "by_time": 2, "in_save": 2}
        for run in (through, killed):
            case[run.name] = str(directory / f"{name}-{run.name}.toml")
            Path(case[run.name]).write_text(to_toml(run))
        runs[name] = through, killed
        cases.append(case)
    (directory / "cases.json").write_text(json.dumps(cases))
    paths = os.pathsep.join([str(HERE), *sys.path])
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_run.py"), str(directory / "cases.json")], capture_output=True, text=True,
        timeout=240, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("resuming from step-") >= 3, done.stdout
    return runs


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_resumes_bitwise(killed_runs: dict[str, tuple[Config, Config]], case: str) -> None:
    """SIGKILL at random moments and at random points of a save, with global generators in use."""
    through, killed = killed_runs[case]
    assert_same_run(through, killed)
    assert not list((path_of(killed) / "checkpoints").glob("*.tmp"))
    assert len(names(killed)) == killed.checkpoint.keep


def damage(file: Path, how: str) -> None:
    if how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()


@pytest.fixture
def short(changed: Change) -> Config:
    return changed(name="short", steps=3, data={"eval": ""}, checkpoint={"every": 1, "keep": 2})


@pytest.mark.parametrize(
    ("file", "how", "message"),
    [
        ("__0_0.distcp", "truncated", r"__0_0\.distcp: expected \d+ bytes, got \d+ \(truncated\?\)"),
        ("__0_0.distcp", "missing", r"__0_0\.distcp: expected \d+ bytes, got no file"),
        (".metadata", "truncated", r"\.metadata: expected \d+ bytes, got \d+ \(truncated\?\)"),
        ("state.pt", "missing", r"state\.pt: expected \d+ bytes, got no file"),
        ("manifest.json", "truncated", r"expected a readable manifest\.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(
    short: Config, file: str, how: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, longer = short.replace(name="straight", steps=5), short.replace(steps=5, resume="auto")
    train(short)
    assert names(short) == ["step-000002", "step-000003"]
    latest = path_of(short) / "checkpoints" / "step-000003"
    damage(latest / file, how)
    capsys.readouterr()
    assert train(longer)
    output = capsys.readouterr().out
    assert re.search(f"refused: checkpoint {latest}: {message}", output)
    assert "resuming from step-000002: 2 of 5 steps are done" in output
    assert train(straight)
    assert_same_run(straight, longer)
    assert names(longer) == ["step-000004", "step-000005"]


def test_auto_raises_where_all_checkpoints_are_damaged(short: Config) -> None:
    train(short)
    for path in (path_of(short) / "checkpoints").iterdir():
        damage(path / "__0_0.distcp", "truncated")
    logged = rows(short)
    with pytest.raises(CheckpointError, match=r"step-000003: __0_0.*step-000002: __0_0.*checkpoints a new run starts"):
        train(short.replace(steps=4, resume="auto"))
    assert rows(short) == logged


def test_resume_auto_starts_where_there_is_nothing(short: Config, capsys: pytest.CaptureFixture[str]) -> None:
    train(short)
    again = short.replace(name="again", resume="auto")
    assert train(again)
    assert_same_run(short, again)
    capsys.readouterr()
    metrics = (path_of(short) / "metrics.jsonl").read_bytes()
    assert train(again), "nothing is left to do"
    assert "is finished (3 steps): nothing to resume" in capsys.readouterr().out
    assert (path_of(short) / "metrics.jsonl").read_bytes() == metrics
    (path_of(short) / "finished.json").unlink()  # killed before its first checkpoint: results, but nothing to go on from
    for path in (path_of(short) / "checkpoints").iterdir():
        path.rename(path.with_suffix(".tmp"))
    assert train(short.replace(resume="auto"))
    assert_same_run(short, again)


def test_what_cannot_be_resumed_is_refused(short: Config, prompts: Path) -> None:
    train(short)
    longer = short.replace(steps=4, resume="auto")
    other = longer.replace(seed=5, optim={"lr": 0.5, "minibatches": 2}, loss={"kl_coef": 0.1})
    expected = r"kl_coef: expected None, got 0\.1; optim\.minibatches: expected 1, got 2; seed: expected 0, got 5$"
    with pytest.raises(ConfigError, match=expected):
        train(other)
    (path_of(short) / "finished.json").unlink()
    with pytest.raises(ConfigError, match="steps: expected at least the 3 that are done"):
        train(longer.replace(steps=2))
    with pytest.raises(ConfigError, match="overwrite: expected False together with resume"):
        train(longer.replace(overwrite=True))
    changed_rows = prompts.read_text().replace("n3 ?", "n33 ?")
    kept = prompts.read_text()
    try:
        prompts.write_text(changed_rows)
        with pytest.raises(CheckpointError, match=r"data\.train: expected the prompts"):
            train(longer)
    finally:
        prompts.write_text(kept)
    with (path_of(short) / "metrics.jsonl").open("r+") as file:
        file.truncate(10)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: expected at least the \d+ bytes of the checkpoint, got 10"):
        train(longer)
    assert names(short) == ["step-000002", "step-000003"]


RESULTS = """
seed model.path model.dtype lora.rank lora.alpha lora.layers lora.targets data.train data.train_limit
data.columns.prompt data.columns.answer data.answer_after data.prompt_template data.system_prompt data.answer_marker
data.teacher_prompt rollout.prompts rollout.responses rollout.max_new_tokens rollout.temperature rollout.top_p
rollout.top_k rollout.min_p rollout.record_support rollout.resample_rounds rewards.functions rewards.weights
rewards.on_failure rewards.overlong rewards.overlong_window rewards.embedding_model rewards.embedding_share
rewards.judge.model rewards.judge.template
rewards.judge.max_tokens rewards.reward_model.path rewards.reward_model.max_tokens
rewards.reward_model.dtype loss.method loss.surrogate loss.advantage loss.reduction loss.clip_low loss.clip_high
loss.entropy_coef loss.importance_cap loss.reference_ema loss.gradient_tolerance eapo.kappa eapo.scale eapo.low
eapo.high eapo.ema eapo.anchor_steps optim.optimizer optim.betas optim.weight_decay optim.max_grad_norm
optim.minibatches optim.epochs
"""
"""Settings that change the results, so that a resume refuses them."""
ELSEWHERE = """
name out overwrite resume steps samples_per_step diagnose_every model.attention model.packing model.device
model.gradient_checkpointing model.cache data.eval data.eval_limit data.max_prompt_tokens rollout.engine rollout.batch
rollout.vllm.dtype rollout.vllm.gpu_memory_utilization rollout.vllm.kv_cache_gib rollout.vllm.max_num_seqs
rollout.vllm.tensor_parallel_size rollout.vllm.max_model_len rollout.vllm.enforce_eager rollout.vllm.sleep_level
rewards.concurrency rewards.timeout rewards.judge.url rewards.judge.api_key_env
rewards.judge.retries rewards.reward_model.batch optim.lr
optim.schedule optim.warmup_steps optim.old_logp optim.micro_batch_tokens eval.responses eval.greedy
eval.train_prompts eval.first eval.every log.heartbeat log.tensorboard log.wandb log.wandb_project
checkpoint.every checkpoint.keep
"""
"""Those that move time, memory, what is seen of a run or its learning rate."""


def test_every_setting_may_change_at_a_resume_or_is_refused(config: Config, tmp_path: Path) -> None:
    settings = settings_of(config)
    refused, free = RESULTS.split(), ELSEWHERE.split()
    assert sorted(settings) == sorted([*refused, *free]), "a new setting belongs to one of the lists"
    for key in settings:
        before = {**settings, key: "another"}
        if key in free:
            changes(tmp_path, before, config)
        else:
            with pytest.raises(ConfigError, match=f"; {re.escape(key)}: expected 'another'"):
                changes(tmp_path, before, config)


def test_settings_of_time_memory_and_evaluation_may_change(
    short: Config, capsys: pytest.CaptureFixture[str], prompts: Path
) -> None:
    """The run stays the same up to rounding."""
    train(short)
    data = {"eval": str(prompts), "max_prompt_tokens": 99}
    seen = {"samples_per_step": 1, "diagnose_every": 2, "data": data, "eval": {"responses": 2, "every": 4}}
    moved = {
        "model": {"attention": "eager", "gradient_checkpointing": True}, "rollout": {"batch": 5},
        "optim": {"micro_batch_tokens": 40, "old_logp": "always"}, "rewards": {"timeout": 5.0}, "checkpoint": {"every": 2},
        "log": {"wandb_project": "x"},
    }  # fmt: skip
    longer, straight = short.replace(steps=5, resume="auto", **seen, **moved), short.replace(name="straight", steps=5)
    assert train(longer)
    out = capsys.readouterr().out
    assert "settings changed: checkpoint.every from 1 to 2, data.eval from '' to " in out
    assert "optim.micro_batch_tokens from 8192 to 40" in out
    assert "warning" not in out
    assert train(straight)
    for a, b in zip(rows(longer), rows(straight), strict=True):
        assert a["reward/mean"] == b["reward/mean"]
        for name in ("loss", "grad_norm", "eapo/entropy"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5)
    assert [row["step"] for row in rows(longer, "evaluations")] == [4, 5]
    assert parse_config([], recipe=path_of(longer) / "config.toml") == longer.replace(resume="")
    environment = json.loads((path_of(longer) / "environment.json").read_text())
    assert environment["kernels"]
    assert environment["processes"] == 1


def test_the_limit_of_prompts_may_change_while_it_leaves_out_no_others(short: Config, prompts: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(prompts.read_text().replace("after n3 ?", "after n3 ? ?"))  # one of 8 tokens, the others have 7
    config = short.replace(data={"train": str(file)})
    assert train(config)
    longer = config.replace(steps=4, resume="auto")
    with pytest.raises(CheckpointError, match=r"data\.train: expected the prompts"):
        train(longer.replace(data={"max_prompt_tokens": 7}))
    assert train(longer.replace(data={"max_prompt_tokens": 8}))


def test_a_diverged_run_continues_with_a_smaller_learning_rate(
    short: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/training.md prescribes; the step before the divergence has been saved."""
    config = short.replace(steps=8, checkpoint={"every": 50}, optim={"schedule": "cosine"})
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(config))
    with raised_by("trainer.learning.learner.clip_grads_with_norm_", 4, DivergenceError("grad_norm: expected a finite number")):
        assert main(["train", "--config", str(recipe)]) == 1
    assert "step-000003: python -m trainer train" in capsys.readouterr().err
    more = ["--optim.lr", "1e-3", "--optim.warmup_steps", "6", "--steps", "10"]
    assert main(["train", "--config", str(path_of(config) / "config.toml"), "--resume", "auto", *more]) == 0
    out = capsys.readouterr().out
    warning = "warning: from step 4 on the run differs from an uninterrupted one: optim.lr, optim.warmup_steps changed"
    assert warning in out
    assert "warning: the cosine schedule is that of 10 steps from step 4 on" in out
    rates = [row["lr"] for row in rows(config)]
    assert rates[3:6] == pytest.approx([1e-3 * step / 6 for step in (4, 5, 6)]), "counted from the first step of the run"
    assert rates[6:] == pytest.approx([1e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * done / 4))) for done in range(4)])


def test_an_earlier_checkpoint_can_be_gone_back_to(short: Config) -> None:
    """By removing the later ones."""
    train(short)
    shutil.rmtree(path_of(short) / "checkpoints" / "step-000003")
    straight = short.replace(name="straight", steps=4)
    train(straight)
    back = short.replace(steps=4, resume="auto")
    assert train(back)
    assert_same_run(straight, back)


def test_a_resume_completes_the_removals_of_a_killed_save(short: Config) -> None:
    """The kill came after the last checkpoint of a run and before the older ones were removed."""
    assert train(short)
    (path_of(short) / "finished.json").unlink()
    last = checkpoints(path_of(short) / "checkpoints")[-1]
    for name in ("step-000001", "step-000000.tmp"):
        shutil.copytree(last, last.with_name(name))
    train(short.replace(resume="auto", checkpoint={"keep": 1}))
    assert [path.name for path in last.parent.iterdir()] == [last.name]


def test_a_run_that_is_stopped_in_its_first_step_has_nothing_to_save(
    changed: Change, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = changed(name="early", steps=100, data={"eval": ""}, rewards={"functions": ("reward_functions:stops",)})
    (tmp_path / "recipe.toml").write_text(to_toml(config))
    reward_functions.STOPS[:] = [signal.SIGINT]
    assert main(["train", "--config", str(tmp_path / "recipe.toml")]) == 130
    assert "interrupted after 0 of 100 steps: nothing to save" in capfd.readouterr().out
    assert not (path_of(config) / "model").exists()


@pytest.mark.parametrize(("number", "method"), [(signal.SIGINT, "eapo"), (signal.SIGTERM, "grpo")])
def test_a_stopped_run_resumes_bitwise(
    changed: Change, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals, method: str
) -> None:
    """Stopped in the middle of a step, far from any due checkpoint; the model is saved."""
    reward = {"functions": ("reward_functions:stops",)}
    config = changed(name="stopped", steps=100, data={"eval": ""}, loss={"method": method}, rewards=reward)
    (tmp_path / "recipe.toml").write_text(to_toml(config))
    reward_functions.STOPS[:] = [None, None, number]
    assert main(["train", "--config", str(tmp_path / "recipe.toml")]) == 130
    done = len(rows(config))
    assert done == 2
    out, err = capfd.readouterr()
    assert "stopping at the next safe point" in err
    assert f"interrupted after {done} of 100 steps" in out
    assert f"step-{done:06d}: --resume auto continues from it" in out
    assert (path_of(config) / "model" / "model.safetensors").exists()
    longer = config.replace(steps=done + 2, resume="auto")
    straight = longer.replace(name="straight", resume="")
    assert train(longer)
    assert train(straight)
    assert_same_run(straight, longer)


def test_eight_bit_moments_resume_bitwise(changed: Change, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="needs torchao: pip install '.[adamw-8bit]'")
    make_model(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)  # matrices of 4096 weights and more
    make_tokenizer().save_pretrained(tmp_path)
    config = changed(model={"path": str(tmp_path)}, optim={"optimizer": "adamw_8bit"}, data={"eval": ""})
    straight, stopped = config.replace(name="straight", steps=4), config.replace(name="stopped", steps=2)
    assert train(straight)
    assert train(stopped)
    longer = stopped.replace(steps=4, resume="auto")
    with pytest.raises(ConfigError, match=r"optim\.optimizer: expected 'adamw_8bit', got 'adamw'"):
        train(longer.replace(optim={"optimizer": "adamw"}))
    assert train(longer)
    assert_same_run(straight, longer)


def test_zero_writes_no_checkpoints(changed: Change) -> None:
    config = changed(steps=2, data={"eval": ""}, checkpoint={"every": 0})
    assert train(config)
    assert not (path_of(config) / "checkpoints").exists()
    with pytest.raises(ConfigError, match="expected a checkpoint of the finished run"):
        train(config.replace(steps=3, resume="auto"))
