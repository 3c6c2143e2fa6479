"""The loop on a tiny model: reward rises, runs are deterministic, logs are complete, and signals
stop it.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import WORDS, make_tokenizer

from trainer.__main__ import main
from trainer.config import Config
from trainer.config.settings import parse_config, to_toml
from trainer.errors import ConfigError, RewardError
from trainer.loop import train
from trainer.records import ScoredRollouts
from trainer.rollouts.source import RolloutSource
from trainer.runs import rundir
from trainer.runs.rundir import RunDirectory, read

Change = Callable[..., Config]


def rows(config: Config, stream: str = "metrics") -> list[dict[str, Any]]:
    return read(Path(config.out) / config.name, stream)


def without_times(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("seconds/", "share/", "tokens", "memory/")
    return [{k: value for k, value in row.items() if not (k.startswith(timed) or k.endswith("/seconds"))} for row in metrics]


def test_a_resume_on_other_kernels_says_so(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = RunDirectory(config)
    first.start()
    monkeypatch.setattr(rundir, "used", lambda: {"bfloat16": "triton (triton is right)"})
    assert first.record_kernels() is None
    assert first.record_kernels() is None
    resumed = RunDirectory(config)
    monkeypatch.setattr(rundir, "used", lambda: {"bfloat16": "torch (triton is wrong)"})
    changed = "bfloat16: triton (triton is right) before, torch (triton is wrong) now"
    assert resumed.record_kernels() == f"other kernels than in the earlier part of the run: {changed}"
    assert resumed.record_kernels() is None
    content = json.loads((resumed.path / "environment.json").read_text())
    assert content["kernels"]["bfloat16"] == "torch (triton is wrong)"
    assert content["versions"]["torch"]


def test_reward_rises(changed: Change) -> None:
    config = changed(steps=20, rollout={"prompts": 8, "responses": 8}, data={"eval": ""})
    assert train(config)
    rewards = [row["reward/mean"] for row in rows(config)]
    assert sum(rewards[-3:]) / 3 > 2 * sum(rewards[:3]) / 3


def test_a_run_leaves_its_files_and_every_metric(config: Config, with_report: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config)
    run = Path(config.out) / config.name
    assert parse_config([], recipe=run / "config.toml") == config
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert environment["kernels"] == {"EAPO_KERNELS_BACKEND": "auto"}, "on a CPU nothing is checked"
    assert {path.name for path in run.iterdir()} == {
        "config.toml", "environment.json", "metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "model", "report.md",
        "curves.png", "checkpoints", "finished.json",
    }  # fmt: skip

    template = (run / "model" / "chat_template.jinja").read_text()
    assert template == make_tokenizer().chat_template, "saved as it was"

    metrics = rows(config)
    assert [row["step"] for row in metrics] == [1, 2, 3]
    weights = [row["eapo/positive_weight"] for row in metrics]
    assert weights == pytest.approx([row["eapo/entropy"] / metrics[0]["eapo/entropy"] for row in metrics], rel=1e-5)
    assert weights[0] == pytest.approx(1.0)
    for row in metrics:
        assert row["eapo/entropy_init"] == pytest.approx(metrics[0]["eapo/entropy"], rel=1e-6)
        assert row["eapo/entropy_ratio"] == pytest.approx(row["eapo/positive_weight"])
        assert 0 < row["eapo/positive_fraction"] < 1
        assert row["ratio_mean"] == pytest.approx(1.0, abs=1e-5)  # one update a step: on-policy
        assert row["rollout/logp_gap_max"] < 1e-4
        assert row["clip_fraction"] == 0
        assert row["lr"] == 1e-2
        wanted = {"loss", "grad_norm", "reward/mean", "reward/std", "reward/reward_functions:low_numbers/mean"}
        wanted |= {"reward/reward_functions:low_numbers/failed", "reward/reward_functions:low_numbers/seconds"}
        wanted |= {"response/length", "response/truncated", "diversity/distinct_2", "tokens_per_second"}
        wanted |= {"memory/peak_gib", "tokens/prompt_per_second", "tokens/completion_per_second"}
        wanted |= {f"share/{phase}" for phase in ("rollout", "reward", "measurement", "update")}
        wanted |= {f"seconds/{phase}" for phase in ("rollouts", "rewards", "measurement", "update")}
        assert wanted <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
        assert sum(value for name, value in row.items() if name.startswith("share/")) == pytest.approx(1)
        assert "mfu" not in row, "the peak of this device is unknown"

    evaluations = rows(config, "evaluations")
    assert [(row["dataset"], row["step"]) for row in evaluations] == [("held-out", 0), ("held-out", 3)]
    assert len(evaluations[0]["values"]["reward"]) == 2
    samples = rows(config, "samples")
    assert [s["step"] for s in samples] == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    output = capsys.readouterr().out
    lines = [line.split()[0] for line in output.splitlines() if line.startswith(("step", "about", "  ..."))]
    assert lines == ["step", "about", "step", "step"], "without a terminal one line for each step"
    assert re.search(r"about \d+s for 2 more steps, evaluations included", output)
    assert re.search(r"step 3/3  reward .*  flat .*  truncated .*  grad .* tok/s  eta 0s", output)
    assert "2 held-out prompts, 3 completions each" in output
    assert str(run / "curves.png") in output


def test_a_failed_report_costs_no_run(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("trainer.loop.write_report", fails)
    assert train(config)
    assert "the report failed, the run did not: OSError: no space left" in capsys.readouterr().out
    assert RunDirectory(config).finished() == config.steps
    assert (RunDirectory(config).model / "config.json").exists()


@pytest.mark.parametrize("cut", [{"top_p": 0.8}, {"top_k": 12}, {"min_p": 0.2, "temperature": 1.5}], ids=str)
def test_the_ratio_of_an_unchanged_policy_is_1_over_the_support(changed: Change, cut: dict[str, float]) -> None:
    """And the probability that the filter left without it. A KL penalty reads the reference's
    log-probs over the same support.
    """
    loss = {"method": "grpo", "kl_coef": 0.1}
    recorded = changed(rollout=cut, loss=loss)
    whole = changed(name="whole", steps=1, rollout={**cut, "record_support": False}, data={"eval": ""})
    assert train(recorded)
    assert train(whole)
    metrics = rows(recorded)
    for row in metrics:
        assert row["rollout/ratio_at_start"] == pytest.approx(1, abs=1e-5)
        assert row["rollout/logp_gap_max"] < 1e-4
        assert row["ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert 1 < row["rollout/support"] < len(WORDS)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    (first,) = rows(whole)
    assert 0.4 < first["rollout/ratio_at_start"] < 0.95
    assert "rollout/support" not in first
    assert first["eapo/entropy"] > metrics[0]["eapo/entropy"] + 0.1


def test_a_seed_decides_the_run(changed: Change) -> None:
    runs = [changed(name=name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    for config in runs:
        train(config)
    first, second, third = (without_times(rows(config)) for config in runs)
    assert first == second
    assert first != third
    assert rows(runs[0], "evaluations") == rows(runs[1], "evaluations")


def test_micro_batches_and_generation_batches_do_not_change_the_run(changed: Change) -> None:
    one, cut = changed(name="one"), changed(name="cut", optim={"micro_batch_tokens": 40})
    for config in (one, cut):
        train(config)
    for a, b in zip(rows(one), rows(cut), strict=True):
        assert a["reward/mean"] == b["reward/mean"]
        for name in ("loss", "grad_norm", "eapo/entropy", "eapo/positive_weight", "eapo/positive_fraction"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "sections",
    [
        {"loss": {"method": "grpo"}},
        {"loss": {"method": "dr_grpo", "clip_high": 0.28}, "optim": {"minibatches": 2, "epochs": 2}},
        {"loss": {"importance_cap": 2.0}, "rollout": {"top_p": 0.8, "temperature": 0.7}},
        {"lora": {"rank": 2}, "eval": {"every": 1, "train_prompts": 2}, "optim": {"schedule": "cosine"}},
        {"loss": {"method": "w_reinforce"}, "rewards": {"functions": ("exact_match",)}},
    ],
    ids=str,
)
def test_settings_run(changed: Change, sections: dict[str, Any]) -> None:
    config = changed(steps=2, **sections)
    assert train(config)
    assert len(rows(config)) == 2
    method = sections.get("loss", {}).get("method", "eapo")
    expected = {"grpo": 1.0, "dr_grpo": 1.0, "w_reinforce": 0.1}.get(method)
    if expected is not None:
        assert rows(config)[1]["eapo/positive_weight"] == pytest.approx(expected)
    if "eval" in sections:
        assert [row["step"] for row in rows(config, "evaluations") if row["dataset"] == "train"] == [0, 1, 2]


@pytest.mark.parametrize("method", ["eapo", "dapo"])
def test_rewards_beyond_the_integers_of_fp32_train_as_near_ones(changed: Change, method: str) -> None:
    found = []
    for name in ("near", "far"):
        rewards = {"functions": (f"reward_functions:{name}_numbers",)}
        config = changed(name=name, steps=2, data={"eval": ""}, rewards=rewards, loss={"method": method})
        assert train(config)
        found.append(rows(config))
        assert {row["reward"] % 1 for row in rows(config, "samples")} == {0.0}
    for near, far in zip(*found, strict=True):
        assert far["reward/mean"] - 1e9 == pytest.approx(near["reward/mean"], abs=1e-5)
        assert near["reward/std"] > 0
        for key in ("loss", "grad_norm", "eapo/entropy", "reward/std", "reward/flat_groups"):
            assert far[key] == pytest.approx(near[key], rel=1e-4, abs=1e-6), key


def test_metrics_are_about_the_completions_before_a_selection(changed: Change) -> None:
    """Groups without spread are drawn again; the logged reward is the mean over the first draw."""
    config = changed(
        steps=1, loss={"method": "dapo"}, rewards={"functions": ("reward_functions:has_a_low_number",)}, data={"eval": ""},
        rollout={"responses": 2}, samples_per_step=100,
    )  # fmt: skip
    drawn: list[ScoredRollouts] = []
    draw = RolloutSource.draw

    def seen(self: RolloutSource, *args: Any) -> ScoredRollouts:
        drawn.append(draw(self, *args))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutSource, "draw", seen)
        assert train(config)
    (row,), first = rows(config), drawn[0]
    assert len(drawn) > 1
    assert row["reward/mean"] == pytest.approx(first.scores.total.mean().item())
    assert row["response/length"] == pytest.approx(sum(map(len, first.rollouts.completion_ids)) / 6)
    kept = [sample["reward"] for sample in rows(config, "samples") if sample["step"] == 1]
    assert sum(kept) / len(kept) == 0.5, "every group that is left has one of each"


def test_chat_prompts(changed: Change, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    row = {"prompt": [{"role": "user", "content": "what is n1 ?"}], "answer": "n2"}
    path.write_text(f"{json.dumps(row)}\n" * 2)
    config = changed(steps=1, data={"train": str(path), "eval": ""}, rollout={"prompts": 2},
                     rewards={"functions": ("rouge",)})  # fmt: skip
    assert train(config)


@pytest.mark.parametrize("function", ["nan_for_number_1", "raises_for_number_1"])
def test_a_failed_reward_is_reported_and_its_group_not_trained_on(
    changed: Change, function: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(data={"train_limit": 3, "eval": ""}, rewards={"functions": (f"reward_functions:{function}",)})
    assert train(config)
    assert [row["reward/excluded_groups"] for row in rows(config)] == [1, 1, 1]
    failed = 1 / 12 if function == "nan_for_number_1" else 4 / 12
    assert [row[f"reward/reward_functions:{function}/failed"] for row in rows(config)] == pytest.approx([failed] * 3)
    assert all(math.isfinite(row["loss"]) for row in rows(config))
    assert f"left out: reward reward_functions:{function} failed on completion" in capsys.readouterr().out


def test_nothing_left_to_train_on_ends_the_run(changed: Change) -> None:
    config = changed(data={"eval": ""}, rewards={"functions": ("reward_functions:always_raises",)})
    with pytest.raises(RewardError, match=r"step 1: expected at least one fully scored group.*the judge is away"):
        train(config)
    assert rows(config) == []


def test_a_run_is_not_overwritten_by_accident(changed: Change) -> None:
    config = changed(steps=1, data={"eval": ""})
    train(config)
    with pytest.raises(ConfigError, match="expected a new run"):
        train(config)
    train(changed(steps=2, overwrite=True, data={"eval": ""}))
    assert len(rows(config)) == 2


def test_eval_and_report_commands(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config)
    run = Path(config.out) / config.name
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(config))
    capsys.readouterr()
    assert main(["eval", "--config", str(recipe), "--name", "again", "--model.path", str(run / "model")]) == 0
    assert "| reward " in capsys.readouterr().out
    after, again = rows(config, "evaluations")[-1], read(Path(config.out) / "again", "evaluations")[0]
    assert again["values"] == after["values"]  # the saved model is the trained one, and evaluation is deterministic
    assert main(["report", str(run), str(run), "--out", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both" / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "both" / "report.md").read_text()
    assert page.count("2 held-out prompts, 3 completions each") == 1, "the same run twice is one"


def start(config: Config, tmp_path: Path) -> subprocess.Popen[str]:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(config))
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "SLOW_REWARD_STARTED": str(tmp_path / "started")}
    command = [sys.executable, "-m", "trainer", "train", "--config", str(recipe)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **own})


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_sigint_stops_at_once(changed: Change, tmp_path: Path) -> None:
    config = changed(data={"eval": ""}, rewards={"functions": ("reward_functions:slow",)})
    process = start(config, tmp_path)
    wait_for((tmp_path / "started").exists, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert time.monotonic() - begun < 10
