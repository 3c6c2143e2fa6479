"""Tables and intervals of the report, and runs that it cannot draw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.config import Config
from trainer.config.settings import to_toml
from trainer.errors import DataError
from trainer.evaluation.diversity import bootstrap
from trainer.evaluation.evaluate import Evaluation, difference
from trainer.evaluation.report import markdown_table, summary_table, write_report

NAMES = ("reward", "reward_best", "distinct_1", "distinct_2", "self_bleu", "entropy", "length", "truncated")


def evaluation(step: int, shift: float) -> Evaluation:
    return Evaluation("held-out", step, {name: [1.0 + shift, 3.0 + shift, None] for name in NAMES}, responses=4)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "one"
    directory.mkdir()
    (directory / "config.toml").write_text(to_toml(Config()))
    metrics = [{"step": i + 1, "reward/mean": 0.1 * i, "eapo/entropy": None} for i in range(25)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    found = [vars(evaluation(0, 0.0)), vars(evaluation(25, 0.5))]
    (directory / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return directory


def test_the_change_is_paired_by_question() -> None:
    change = difference(evaluation(0, 0.0), evaluation(9, 0.5), "reward", resamples=200)
    assert (change.mean, change.low, change.high) == (0.5, 0.5, 0.5)
    assert bootstrap([1.5, 3.5], 200).low < 2.5 < bootstrap([1.5, 3.5], 200).high


def test_summary_has_before_after_and_change(run: Path) -> None:
    table = summary_table(run, resamples=100)
    assert "one: 3 held-out questions, 4 answers each" in table
    cells = [cell.strip() for cell in next(line for line in table.splitlines() if "| reward  " in line).split("|")]
    assert cells[1] == "reward"
    assert cells[2].startswith("2.000 [")
    assert cells[3].startswith("2.500 [")
    assert cells[4] == "0.500 [0.500, 0.500]"


def test_report_draws_runs_with_gaps_and_refuses_runs_without_steps(run: Path, tmp_path: Path) -> None:
    picture, page = write_report([run], tmp_path / "out", resamples=50)
    assert picture.stat().st_size > 10_000
    rows = [line for line in page.read_text().splitlines() if line.startswith(("| 1 ", "| 25 "))]
    assert len(rows) == 2
    with pytest.raises(DataError, match="expected a run with metrics"):
        write_report([tmp_path], tmp_path / "out")


def test_markdown_table_is_aligned() -> None:
    assert markdown_table(["a", "bbb"], [["cc", "d"]]) == "| a  | bbb |\n| -- | --- |\n| cc | d   |"
