"""TensorBoard's and wandb's records of a run; wandb offline."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from tiny import raised_by

from trainer.__main__ import main
from trainer.config import Config
from trainer.config.settings import to_toml
from trainer.errors import Interrupted
from trainer.loop import train
from trainer.runs.rundir import read
from trainer.runs.trackers import Trackers

Change = Callable[..., Config]


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_holds_every_metric_of_every_step(changed: Change) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install '.[track]'")
    config = changed(log={"tensorboard": True})
    assert train(config)
    run = Path(config.out) / config.name
    found, rows = scalars(run / "tensorboard"), read(run, "metrics")
    for name in rows[0]:
        assert found[name] == [(row["step"], pytest.approx(row[name])) for row in rows]
    first, last = (row["values"]["reward"] for row in read(run, "evaluations"))
    expected = [(step, pytest.approx(sum(values) / len(values))) for step, values in ((0, first), (3, last))]
    assert found["evaluation/held-out/reward"] == expected


def test_tensorboard_goes_on_after_a_checkpoint_and_starts_anew_without(changed: Change, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install '.[track]'")
    config, board = changed(log={"tensorboard": True}), tmp_path / "tensorboard"
    board.mkdir()
    (board / "mine.txt").touch()
    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with Trackers(config) as trackers:
            trackers.start(tmp_path, done)
            for step in steps:
                trackers.log({"x": step + 0.25 * done}, step)
    assert scalars(board)["x"] == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)]
    with Trackers(config) as trackers:
        assert scalars(board)["x"], "nothing is replaced before the start"
        trackers.start(tmp_path, 0)
        trackers.log({"x": 9.0}, 1)
    assert scalars(board)["x"] == [(1, 9.0)]
    assert (board / "mine.txt").exists()


def test_of_several_processes_the_first_one_logs(changed: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.ranks.is_main", lambda: False)
    with Trackers(changed(log={"tensorboard": True, "wandb": True})) as trackers:
        trackers.start(tmp_path, 0)
        trackers.log({"x": 1.0}, 1)
    assert not list(tmp_path.iterdir())


def test_wandb_offline_keeps_its_id_and_takes_finite_numbers(
    changed: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="needs wandb: pip install '.[track]'")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    config = changed(log={"wandb": True})
    ids: list[str] = []
    records: list[Path] = []
    for done in (0, 1, 0):
        with Trackers(config) as trackers:
            trackers.start(tmp_path, done)
            trackers.log({"reward/probe": 0.5 + done, "probe/nan": math.nan, "probe/none": None}, done + 1)
            trackers.log({"evaluation/probe": 7.25}, done + 1)
        ids.append((tmp_path / "wandb_id").read_text())
        (record,) = {*(tmp_path / "wandb").glob("offline-run-*/run-*.wandb")} - {*records}
        assert record.name == f"run-{ids[-1]}.wandb"
        records.append(record)
    wandb.teardown()  # until then its service may keep records in memory
    for record, done in zip(records, (0, 1, 0), strict=True):
        content = record.read_bytes()
        for written in ("reward/probe", str(0.5 + done), "evaluation/probe", "7.25", "train_limit"):
            assert written.encode() in content, written
        assert b"probe/n" not in content
    assert ids[0] == ids[1] != ids[2], "the second continues the first, the third is a record of its own"


class Wandb:
    """A stand-in for the module and its run: collects the exit codes."""

    def __init__(self) -> None:
        self.codes: list[int] = []

    def init(self, **_: Any) -> Wandb:
        return self

    def log(self, *_: Any, **__: Any) -> None: ...

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


ENDS: dict[str, tuple[str | None, int, type[Exception], int]] = {
    # The function that raises, at which call, what it raises, and the exit code.
    "finished": (None, 1, OSError, 0),
    "interrupted": ("trainer.rollouts.source.RolloutSource.draw", 2, Interrupted, 0),
    "failed at the start": ("trainer.runs.resume.random_state", 1, OSError, 1),
    "failed in a step": ("trainer.rollouts.source.RolloutSource.draw", 2, OSError, 1),
    "failed behind the steps": ("trainer.models.policy.Policy.save", 1, OSError, 1),
}


@pytest.mark.parametrize("end", ENDS)
def test_wandb_gets_the_exit_code(changed: Change, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    target, call, error, code = ENDS[end]
    wandb = Wandb()
    monkeypatch.setattr("trainer.runs.trackers.import_module", lambda _: wandb)
    config = changed(log={"wandb": True}, data={"eval": ""})
    with raised_by(target, call, error("end")) if target else nullcontext(), suppress(OSError):
        assert train(config) is (end == "finished")
    assert wandb.codes == [code]


@pytest.mark.parametrize(("key", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_one_clear_line(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str, module: str
) -> None:
    def missing(name: str, *_: Any) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("trainer.runs.trackers.import_module", missing)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(config))
    assert main(["train", "--config", str(recipe), f"--log.{key}", "True"]) == 2
    expected = f"error: log.{key}: expected the package {key} (pip install '.[track]'), got No module named '{module}'"
    assert capsys.readouterr().err.strip() == expected
