"""The files of a run: nothing of a user is deleted, and a full disk, a killed writer or a damaged file costs one
line and no more than the step.
"""

from __future__ import annotations

import decimal
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from test_checkpoints import assert_same_run, names, path_of
from test_loop import rows

from trainer.__main__ import main
from trainer.config import Config
from trainer.config.settings import to_toml
from trainer.errors import CheckpointError, DataError
from trainer.loop import train
from trainer.models.policy import Policy
from trainer.runs import checkpoint, resume
from trainer.runs.rundir import RunDirectory, read

Change = Callable[..., Config]


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """The system refuses to write a file beyond ``most`` bytes; what fits before is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def short(changed: Change, tmp_path: Path) -> Config:
    config = changed(name="short", steps=4, diagnose_every=0, data={"eval": ""}, checkpoint={"every": 1})
    (tmp_path / "recipe.toml").write_text(to_toml(config))
    return config


def fails(config: Config, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The one line with which the command fails."""
    recipe = Path(config.out).parent / "recipe.toml"
    capsys.readouterr()
    code = main(["train", "--config", str(recipe), *more])
    assert code in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def resumes(config: Config) -> None:
    """The run continues and equals one that was not interrupted."""
    assert train(config.replace(resume="auto"))
    through = config.replace(name="through")
    assert train(through)
    assert_same_run(through, config)


def test_a_full_disk_leaves_half_a_line_and_everything_before_it(
    short: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append = RunDirectory.append

    def filling(self: RunDirectory, stream: str, record: dict[str, Any]) -> None:
        if stream == "metrics" and record["step"] == 3:
            with full_disk((self.path / "metrics.jsonl").stat().st_size + 20):
                append(self, stream, record)
        append(self, stream, record)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", filling)
        line = fails(short, capsys)
    run = path_of(short)
    assert f"File too large: '{run / 'metrics.jsonl'}'" in line
    assert f"to continue from step-000002: python -m trainer train --config {run}/config.toml --resume auto" in line
    assert len((run / "metrics.jsonl").read_bytes().splitlines()) == 3, "half of the third"
    assert [row["step"] for row in read(run, "metrics")] == [1, 2]
    assert main(["report", str(run)]) == 0
    resumes(short)


def test_a_full_disk_costs_no_earlier_checkpoint(
    short: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, save = checkpoint.write, checkpoint.torch.save
    for step, where in ((2, "tensors"), (3, "state")):

        def filling(root: Path, number: int, *args: Any, step: int = step, **options: Any) -> Path:
            with full_disk(1000 if number >= step else 10**9):
                return write(root, number, *args, **options)

        def cut(*args: Any) -> None:
            state = isinstance(args[1], Path) and args[1].parent.name == "step-000003.tmp"
            with full_disk(100 if state else 10**9):
                save(*args)

        with monkeypatch.context() as patch:
            if where == "tensors":
                patch.setattr(resume, "write", filling)
            else:
                patch.setattr(checkpoint.torch, "save", cut)
            line = fails(short, capsys, "--resume", "auto")
        there = path_of(short) / "checkpoints"
        assert line.startswith(f"error: checkpoint {there}/step-{step:06d}: expected to write it, got: "), line
        assert f"the state after step {step} could not be saved: checkpoint" in line
        assert f"to continue from step-{step - 1:06d}: python -m trainer train" in line
        assert names(short)[-1] == f"step-{step - 1:06d}"
        assert not list(there.glob("*.tmp")), "its room is needed"
    resumes(short)


def test_a_model_that_cannot_be_written_leaves_a_run_to_continue(
    short: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = Policy.save

    def filling(self: Policy, directory: Path) -> None:
        with full_disk(1000):
            save(self, directory)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "save", filling)
        line = fails(short, capsys)
    assert line.startswith(f"error: {path_of(short)}/model: expected to write the model, got: ")
    assert "to continue from step-000004: python -m trainer train" in line
    assert not list(path_of(short).glob("model*"))
    resumes(short)


def test_small_files_are_written_whole_or_stay(short: Config) -> None:
    run = RunDirectory(short)
    run.start()
    before = {file.name: file.read_bytes() for file in run.path.iterdir()}
    with full_disk(10):
        for write in (run.resume, lambda: run.finish(3), run.record_kernels):
            with pytest.raises(OSError, match="File too large"):
                write()
    assert {file.name: file.read_bytes() for file in run.path.iterdir()} == before


def test_a_damaged_file_is_one_line(short: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(short)
    run = path_of(short)
    first, *_ = (run / "metrics.jsonl").read_bytes().split(b"\n")
    (run / "metrics.jsonl").write_bytes(first + b'\n{"st\n{"step": 3}\n')
    assert main(["report", str(run)]) == 2
    assert f"{run}/metrics.jsonl: expected a JSON object a line, got line 2: " in capsys.readouterr().err
    with pytest.raises(DataError, match="line 2"):
        read(run, "metrics")
    (run / "metrics.jsonl").write_bytes(first + b"\n")
    (run / "config.toml").write_text("a = ")
    assert main(["report", str(run)]) == 2
    assert "report: expected the settings of a run" in capsys.readouterr().err
    (run / "finished.json").write_text('{"st')
    assert "finished.json: expected JSON, got" in fails(short, capsys, "--resume", "auto", "--steps", "5")
    with pytest.raises(CheckpointError, match="finished"):
        RunDirectory(short).finished()


def test_a_place_that_cannot_be_written_is_said_before_anything_is_loaded(
    short: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper", tmp_path / "dangling"):
        line = fails(short, capsys, "--out", str(out), "--model.path", "no/such/model")
        assert line.startswith("error: out: expected a directory in which 'short' can be written, got")
    assert train(short)
    before = sorted(path_of(short).rglob("*"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0)  # permissions do not bind root
    for more in ((), ("--overwrite", "True"), ("--resume", "auto", "--steps", "5")):
        line = fails(short, capsys, *more, "--model.path", "no/such/model")
        assert line.startswith("error: out: expected a directory in which 'short' can be written, got")
    assert sorted(path_of(short).rglob("*")) == before


def test_out_may_begin_with_the_home_directory(short: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDirectory(short.replace(out="~/runs")).path == tmp_path / "runs" / "short"


def test_copies_of_checkpoints_are_left_alone(short: Config) -> None:
    config = short.replace(checkpoint={"keep": 1})
    assert train(config.replace(steps=2))
    there = path_of(config) / "checkpoints"
    mine = [there / name for name in ("step-000002-best", "step-000002.bak", "step-mine", "step-old.tmp", "step-000001-x.tmp")]
    for copy in mine:
        copy.mkdir()
        (copy / "weights").write_text("mine")
    assert train(config.replace(resume="auto"))
    assert names(config) == ["step-000004"]
    assert train(config.replace(overwrite=True, steps=1))
    assert names(config) == ["step-000001"]
    assert [(copy / "weights").read_text() for copy in mine] == ["mine"] * len(mine)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in ("step-1000000", "step-999999", "step-000010"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000010", "step-999999", "step-1000000"]


def test_an_evaluation_replaces_no_training_run(
    short: Config, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = short.replace(steps=1, overwrite=True)
    for name in ("short", "short-eval"):
        assert train(config.replace(name=name))
    run = path_of(config)
    before = {file: file.read_bytes() for file in run.parent.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert main(["eval", "--run", str(run), "--data.eval", str(prompts)]) == 2
    assert "expected another directory than that of a training run" in capsys.readouterr().err
    (run.parent / "recipe.toml").write_text(to_toml(config.replace(data={"eval": str(prompts)})))
    assert main(["eval", "--config", str(run.parent / "recipe.toml")]) == 2
    (run.parent / "recipe.toml").unlink()
    assert {file: file.read_bytes() for file in run.parent.rglob("*") if file.is_file()} == before
    (run.parent / "short-eval").rename(run.parent / "other")
    monkeypatch.chdir(run)
    assert main(["eval", "--run", ".", "--data.eval", str(prompts)]) == 0
    assert (run.parent / "short-eval" / "evaluations.jsonl").exists()


SEPARATORS = ("\u2028", "\u2029", "\u0085", "\x0b", "\x1c", "\0")


def test_separators_of_unicode_end_no_record(changed: Change, tmp_path: Path, with_report: None) -> None:
    """In prompts, answers and reward names; read again by the report, the resume and every reader of samples."""
    questions = [{"prompt": f"what{s}is n{i} ?", "answer": f"n{i}{s}n1"} for i, s in enumerate(SEPARATORS)]
    lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    (tmp_path / "q.jsonl").write_text(lines, encoding="utf-8")
    data = {"train": str(tmp_path / "q.jsonl"), "eval": str(tmp_path / "q.jsonl"), "eval_limit": 0}
    config = changed(steps=2, data=data, rewards={"functions": ("rouge",)}, samples_per_step=4)
    assert train(config)
    run = path_of(config)
    for stream in ("metrics", "samples", "evaluations"):
        text = (run / f"{stream}.jsonl").read_text(encoding="utf-8")
        assert read(run, stream) == [json.loads(line) for line in text.split("\n")[:-1]]
    sampled = [row for row in rows(config, "samples") if "answer" in row]
    assert sampled
    assert all({"prompt": row["prompt"], "answer": row["answer"]} in questions for row in sampled)
    assert main(["report", str(run)]) == 0
    assert train(config.replace(steps=3, resume="auto"))


def test_a_run_on_typed_values_resumes(changed: Change, tmp_path: Path) -> None:
    """Columns that neither JSON nor a checkpoint has a type for go to the rewards as they are."""
    Dataset.from_list(
        [
            {"prompt": f"n{i}", "answer": decimal.Decimal("1.50"), "raw": b"\xff\xfe", "price": decimal.Decimal(i)}
            for i in range(4)
        ]
    ).to_parquet(tmp_path / "q.parquet")
    config = changed(
        steps=2, data={"train": str(tmp_path / "q.parquet"), "eval": ""}, checkpoint={"every": 1},
        rewards={"functions": ("exact_match",)}, loss={"method": "spear"},
    )  # fmt: skip
    assert train(config)
    assert train(config.replace(steps=3, resume="auto"))
    assert {row["answer"] for row in rows(config, "samples")} == {"1.50"}
