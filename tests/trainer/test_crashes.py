"""A run that fails: nothing of an earlier run is lost, the last completed step is saved, and the
resumed run equals an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import reward_functions
import torch
from test_checkpoints import assert_same_run, names, path_of
from test_loop import rows
from tiny import raised_by

from trainer.__main__ import main
from trainer.config import Config
from trainer.config.settings import parse_config, to_toml
from trainer.errors import ConfigError, DivergenceError, ModelError, RewardError, TrainerError
from trainer.loop import train
from trainer.models.policy import Policy
from trainer.models.weights import Reference

Change = Callable[..., Config]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def engine_fails(*_: Any) -> None:
    raise ModelError("rollout.engine: expected a GPU with free memory, got none")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rewards": {"functions": ("reward_functions:low_numberz",)}}, "low_numberz"),
        ({"model": {"path": "no/such/model"}}, "no/such/model"),
        ({"data": {"train": "no/such.jsonl"}}, "no/such.jsonl"),
        ({"data": {"eval": "no/such.jsonl"}}, "no/such.jsonl"),
        ({"data": {"max_prompt_tokens": 1}}, "max_prompt_tokens"),
        ({"lora": {"rank": 2, "targets": ("no_proj",)}}, "lora"),
        ({"log": {"wandb": True}}, "log.wandb"),
        ({"steps": 3}, "the engine"),
        ({"resume": "auto"}, "overwrite: expected False together with resume"),
    ],
    ids=str,
)
def test_a_run_that_cannot_start_leaves_the_earlier_one_untouched(
    changed: Change, sections: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = changed(steps=2, data={"eval": ""}, checkpoint={"every": 1})
    assert train(old)
    before = contents(path_of(old))
    assert len(before) > 10
    if message == "log.wandb":
        monkeypatch.setattr("trainer.runs.trackers.import_module", lambda name: __import__(f"no_{name}"))
    if message == "the engine":
        monkeypatch.setattr("trainer.loop.make_engine", engine_fails)
        message = "expected a GPU with free memory"
    with pytest.raises(TrainerError, match=message):
        train(changed(overwrite=True, **sections))
    assert contents(path_of(old)) == before


def test_only_files_of_a_run_are_replaced(changed: Change) -> None:
    config = changed(steps=2, overwrite=True, data={"eval": ""}, checkpoint={"every": 1})
    assert train(config)
    run = path_of(config)
    mine = [run / "notes.jsonl", run / "picture.png", run / "checkpoints" / "mine.tmp", run / "tensorboard" / "mine"]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}\n{}\n")
    assert parse_config([], recipe=run / "config.toml") == config.replace(overwrite=False), "it would replace itself"
    assert train(config.replace(steps=1))
    assert [row["step"] for row in rows(config)] == [1]
    assert names(config) == ["step-000001"]
    mine[0].write_text("{}\n")
    assert train(config.replace(steps=3, overwrite=False, resume="auto"))
    assert [file.read_text() for file in mine] == ["{}\n", *["{}\n{}\n"] * 3]


def test_a_directory_that_no_run_wrote_is_refused(changed: Change) -> None:
    config = changed(overwrite=True, data={"eval": ""})
    weights = path_of(config) / "model" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    for resume in ("", "auto"):
        with pytest.raises(ConfigError, match="expected a new directory or that of a run"):
            train(config.replace(resume=resume, overwrite=not resume))
    assert weights.exists()


@pytest.mark.parametrize("name", ["..", ".", "", "/tmp", "a/b", "a\0b", "n" * 201])
def test_a_run_stays_in_its_directory(name: str) -> None:
    with pytest.raises(ConfigError, match="name: expected the name of a directory in out"):
        parse_config(["--name", name])


def test_an_evaluation_that_cannot_start_leaves_the_earlier_one(changed: Change, tmp_path: Path) -> None:
    config = changed(overwrite=True)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(config))
    assert main(["eval", "--config", str(recipe)]) == 0
    before = contents(path_of(config))
    assert main(["eval", "--config", str(recipe), "--rewards.functions", "no:such"]) == 2
    assert contents(path_of(config)) == before


@contextmanager
def broken_reward(after: int) -> Iterator[None]:
    reward_functions.CALLS_LEFT[:] = [after]
    yield
    reward_functions.CALLS_LEFT.clear()


Failing = AbstractContextManager[None]
MEMORY = torch.OutOfMemoryError


def out_of_memory(target: str, call: int) -> Failing:
    return raised_by(target, call, MEMORY("CUDA out of memory"))


FAILURES: dict[str, tuple[Callable[[], Failing], type[BaseException]]] = {
    # What fails after two completed steps, and the error. Evaluations call the reward too.
    "reward": (lambda: broken_reward(3), RewardError),
    "rollout": (lambda: out_of_memory("trainer.rollouts.source.RolloutSource.draw", 3), MEMORY),
    "measurement": (lambda: out_of_memory("trainer.loop.measure", 3), MEMORY),
    "update": (lambda: out_of_memory("trainer.learning.learner.policy_loss", 5), MEMORY),
    "divergence": (
        lambda: raised_by("trainer.learning.learner.clip_grads_with_norm_", 5, DivergenceError("loss")), DivergenceError,
    ),
    "tracker": (lambda: raised_by("trainer.runs.trackers.Trackers.log", 4, OSError("no network")), OSError),
    "engine": (
        lambda: raised_by("trainer.rollouts.transformers_engine.TransformersEngine.sync_weights", 3, RuntimeError("engine")),
        RuntimeError,
    ),
}  # fmt: skip


@pytest.fixture
def failing(changed: Change) -> Config:
    """Checkpoints are far away: what a failure saves is the only one."""
    return changed(
        name="failing", steps=4, diagnose_every=0, rewards={"functions": ("reward_functions:breaks",)}, eval={"every": 2},
        checkpoint={"every": 50}, optim={"minibatches": 2, "schedule": "cosine"},
    )  # fmt: skip


@pytest.mark.parametrize("what", FAILURES)
def test_any_error_saves_the_last_completed_step(failing: Config, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    fails, kind = FAILURES[what]
    with fails(), pytest.raises(kind) as caught:
        train(failing)
    assert [row["step"] for row in rows(failing)] == [1, 2]
    command = f"python -m trainer train --config {path_of(failing)}/config.toml --resume auto"
    saved = f"saved {path_of(failing)}/checkpoints/step-000002; to continue from step-000002: {command}"
    assert caught.value.__notes__ == [saved]
    assert names(failing) == ["step-000002"]
    assert main(command.split()[3:]) == 0
    assert "resuming from step-000002" in capsys.readouterr().out
    through = failing.replace(name="through")
    assert train(through)
    assert_same_run(through, failing)


@pytest.mark.parametrize(
    ("target", "call"),
    [("trainer.learning.learner.policy_loss", 6), ("trainer.runs.rundir.RunDirectory.append", 11)],
    ids=["second minibatch", "log"],
)
def test_changed_weights_are_not_saved(failing: Config, target: str, call: int) -> None:
    """The error comes between the first optimizer step of an update and the end of the step."""
    config = failing.replace(checkpoint={"every": 2}, eval={"every": 0})
    with raised_by(target, call, OSError(28, "No space left on device")), pytest.raises(OSError, match="No space") as caught:
        train(config)
    (note,) = caught.value.__notes__
    assert note.startswith("nothing was saved: the update of step 3 had begun; to continue from step-000002: python -m trainer")
    assert names(config) == ["step-000002"]
    assert train(config.replace(resume="auto"))
    through = config.replace(name="through")
    assert train(through)
    assert_same_run(through, config)


def test_what_cannot_be_saved_is_said(failing: Config) -> None:
    with broken_reward(1), pytest.raises(RewardError) as caught:
        train(failing)
    assert caught.value.__notes__ == ["nothing was saved: no step was completed"]
    without = failing.replace(overwrite=True, checkpoint={"every": 0})
    with broken_reward(2), pytest.raises(RewardError) as caught:
        train(without)
    assert caught.value.__notes__ == ["nothing was saved: checkpoint.every is 0"]
    full = raised_by("torch.distributed.checkpoint.save", 1, torch.distributed.checkpoint.api.CheckpointException("full", {}))
    with broken_reward(2), full, pytest.raises(RewardError) as caught:
        train(failing.replace(overwrite=True))
    (note,) = caught.value.__notes__
    assert note.startswith("the state after step 1 could not be saved: checkpoint"), note


def test_the_command_says_in_one_line_what_failed_and_how_to_continue(
    failing: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(to_toml(failing))
    with broken_reward(3):
        assert main(["train", "--config", str(tmp_path / "recipe.toml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: step 3: expected at least one fully scored group, got none; reward reward_functions:breaks")
    assert line.endswith(f"step-000002: python -m trainer train --config {path_of(failing)}/config.toml --resume auto")


def test_a_reference_is_installed_without_allocating(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a lack of memory cannot leave the weights of two policies mixed."""
    monkeypatch.setattr("trainer.models.weights.CHUNK", 100)  # most weights have more
    reference = Reference(policy.trainable(), 1.0)
    old = [weight.clone() for weight in policy.trainable()]
    with torch.no_grad():
        new = [weight.add_(1).clone() for weight in policy.trainable()]
    with monkeypatch.context() as patch:
        for name in ("empty", "empty_like", "zeros_like", "clone"):
            patch.setattr(torch, name, None)
        patch.setattr(torch.Tensor, "clone", None)
        with reference.installed():
            for weight, kept, own, other in zip(policy.trainable(), reference.weights, old, new, strict=True):
                assert torch.equal(weight, own)
                assert torch.equal(kept, other)
    assert all(torch.equal(weight, own) for weight, own in zip(policy.trainable(), new, strict=True))
