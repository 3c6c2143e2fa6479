"""Comparisons: what the arms are, and that one command runs, reports, keeps and continues them."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eapo_kernels import TokenBatch, make_controller, policy_loss
from trainer.__main__ import main
from trainer.config import Config
from trainer.config.settings import to_toml
from trainer.errors import ConfigError
from trainer.evaluation import compare as module
from trainer.evaluation.arms import ARMS, FIXED_WEIGHTS, arm_config, planned, split_name
from trainer.evaluation.compare import compare, is_finished, job_environment, steps_done
from trainer.runs.rundir import RunDirectory, read

Change = Callable[..., Config]


@pytest.fixture
def recipe(changed: Change) -> Config:
    return changed(name="cmp", steps=2, diagnose_every=0, rewards={"functions": ("rouge",)}, data={"eval_limit": 1})


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_changes_the_weights_of_the_loss_and_nothing_else(config: Config, arm: str) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 8), torch.randn(20, 8)
    rewards = torch.tensor([0.9, 0.1, 0.3, 0.4])  # graded; above the mean of the group: the first
    batch = TokenBatch(
        targets=torch.arange(12), sequence_ids=torch.arange(4).repeat_interleave(3), rewards=rewards,
        group_ids=torch.zeros(4, dtype=torch.int64), old_logp=torch.log_softmax(hidden @ weight.T, -1)[range(12), range(12)],
    )  # fmt: skip
    method = arm_config(config, arm, seed=0).method()
    controller = make_controller(method)
    assert controller is not None
    controller.update(2.0, 1.0)
    positive = controller.update(1.2, 1.0)  # the entropy has fallen to 0.6 of the first
    loss = policy_loss(hidden, weight, batch, method=method, positive_weight=positive).loss
    advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-6)).repeat_interleave(3)
    above, below = FIXED_WEIGHTS.get(arm, (0.6, 1.0))
    expected = -(torch.where(advantages > 0, above, below) * advantages).mean()  # the ratio is 1
    torch.testing.assert_close(loss, expected)


def test_a_method_of_the_library_can_be_an_arm(config: Config) -> None:
    run = arm_config(config, "dapo", seed=3)
    assert (run.loss.method, run.seed, run.name, Path(run.out).name) == ("dapo", 3, "dapo-seed3", "tiny")
    assert split_name("w_reinforce-seed12") == ("w_reinforce", 12)
    assert split_name("model") is None


def test_plans_go_seed_by_seed_and_refuse_what_they_cannot_mean(config: Config, changed: Change) -> None:
    assert [run.name for run in planned(config, ["eapo", "nsr"], [1, 0])] == [
        "eapo-seed1", "nsr-seed1", "eapo-seed0", "nsr-seed0",
    ]  # fmt: skip
    for arms, seeds, message in (
        (["eapo", "gspoo"], [0], "--methods: expected names among eapo, grpo, .*got 'gspoo'"),
        (["eapo", "eapo"], [0], "none twice"),
        (["eapo"], [], "--seeds: expected at least one"),
        (["eapo"], [-1], "at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            planned(config, arms, seeds)
    with pytest.raises(ConfigError, match=r"loss.method: expected 'eapo'"):
        planned(changed(loss={"method": "dapo"}), ["eapo"], [0])


def test_jobs_share_cores_and_gpus(config: Config, changed: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cores", lambda: 9)
    on_cpu = job_environment(config, slot=1, jobs=4, gpus=0, environment={"A": "b"})
    assert on_cpu == {"A": "b", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    on_gpu = changed(model={"device": "auto"})
    taken = [job_environment(on_gpu, slot, 3, 2, {"CUDA_VISIBLE_DEVICES": "4,7"})["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert taken == ["4", "7", "4"]
    assert job_environment(on_gpu, 1, 2, 2, {})["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.slow
def test_a_comparison_runs_reports_failures_and_continues(
    recipe: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(to_toml(recipe))
    command = ["compare", "--config", str(recipe_file), "--methods", "eapo", "psr", "--seeds", "4", "--jobs", "2"]
    # A directory where one of its files belongs: that run fails, the other one is finished.
    directory = Path(recipe.out) / "cmp"
    (directory / "psr-seed4" / "samples.jsonl").mkdir(parents=True)
    assert main(command) == 1
    assert "failed: psr-seed4, exit code 1: IsADirectoryError" in capsys.readouterr().err
    first = (directory / "eapo-seed4" / "metrics.jsonl").read_bytes()
    assert len(read(directory / "eapo-seed4", "metrics")) == 2

    (directory / "psr-seed4" / "samples.jsonl").rmdir()
    assert main(command) == 0
    assert "2 runs of 2 steps, 1 finished already" in capsys.readouterr().out
    assert (directory / "eapo-seed4" / "metrics.jsonl").read_bytes() == first
    weights = {
        arm: [row["eapo/positive_weight"] for row in read(directory / f"{arm}-seed4", "metrics")] for arm in ("eapo", "psr")
    }
    assert weights["psr"] == [1.0, 1.0]
    assert weights["eapo"][1] != 1.0

    assert main([*command, "--optim.lr", "0.5"]) == 2
    assert "was written with other settings; optim.lr: expected 0.01, got 0.5" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_from_its_checkpoints(recipe: Config, tmp_path: Path) -> None:
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(to_toml(replace(recipe, steps=60, data=replace(recipe.data, eval=""))))
    command = [sys.executable, "-m", "trainer", "compare", "--config", str(recipe_file), "--methods", "nsr", "--seeds", "0"]
    run = Path(recipe.out) / "cmp" / "nsr-seed0"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while steps_done(run) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "interrupted: the same command continues" in output
    done = steps_done(run)
    assert 3 <= done < 60
    assert main(command[3:]) == 0
    assert [row["step"] for row in read(run, "metrics")] == list(range(1, 61))
    assert f"going on from step-{done:06d}" in (run / "train.log").read_text()


def test_a_run_counts_as_finished_only_when_it_came_to_its_end(recipe: Config) -> None:
    run = arm_config(recipe, "grpo", seed=0)
    directory = RunDirectory(run)
    assert not is_finished(run)
    directory.start(replace=False)
    directory.append("metrics", {"step": 1})
    directory.append("metrics", {"step": 2})
    assert not is_finished(run)
    directory.finish(2)
    assert is_finished(run)
    assert not is_finished(replace(run, overwrite=True))
    assert not is_finished(replace(run, steps=3))  # goes on
    with pytest.raises(ConfigError, match=r"steps: expected at least the 2 that .* has finished, got 1"):
        is_finished(replace(run, steps=1))
    with pytest.raises(ConfigError, match=r"eapo.kappa: expected 0.0, got 2.0"):
        is_finished(replace(run, eapo=replace(run.eapo, kappa=2.0)))


def test_help_names_the_options_and_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for command, option in (("compare", "--seeds"), ("eval", "--checkpoint")):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert option in shown
        assert "--optim.lr" in shown
    assert main(["compare", "--seeds", "one"]) == 2
    assert "argument --seeds: invalid int value: 'one'" in capsys.readouterr().err


def test_a_comparison_that_is_being_run_is_left_alone(recipe: Config) -> None:
    directory = Path(recipe.out) / recipe.name
    directory.mkdir(parents=True)
    with (directory / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="no other process at work"):
            compare(recipe, ["eapo"], [0], jobs=1)
