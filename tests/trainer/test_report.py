"""Tables and intervals of the report, and runs that cannot be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.config import Config
from trainer.config.settings import to_toml
from trainer.errors import DataError
from trainer.evaluation.diversity import bootstrap
from trainer.evaluation.evaluate import Evaluation, difference
from trainer.evaluation.pictures import CONTRACTING, GAP, MEASURED, PREDICTED, SHARE, sign_agreement
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
    completions = [
        {"step": i + 1, "prompt": "q", "completion": f"{word} {i + 1}", "reward": reward}
        for i in range(25)
        for word, reward in (("middling", 0.5), ("poor", 0.1 + i / 100), ("splendid", 0.9))
    ]
    (directory / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in completions))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    found = [vars(evaluation(0, 0.0)), vars(evaluation(25, 0.5))]
    (directory / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return directory


def test_the_change_is_paired_by_prompt() -> None:
    change = difference(evaluation(0, 0.0), evaluation(9, 0.5), "reward", resamples=200)
    assert (change.mean, change.low, change.high) == (0.5, 0.5, 0.5)
    assert bootstrap([1.5, 3.5], 200).low < 2.5 < bootstrap([1.5, 3.5], 200).high


def test_summary_has_before_after_and_change(run: Path) -> None:
    table = summary_table(run, resamples=100)
    assert "one: 3 held-out prompts, 4 completions each" in table
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


def test_the_best_and_the_worst_completion_of_some_steps_are_shown(run: Path) -> None:
    _, page = write_report([run], run, resamples=50)
    text = page.read_text()
    shown = [line.removeprefix("- step ") for line in text.splitlines() if line.startswith("- step ")]
    assert shown == ["1", "7", "13", "19", "25"]
    assert "  - best, reward 0.900: q -> 'splendid 13'\n  - worst, reward 0.220: q -> 'poor 13'" in text
    assert "middling" not in text


def test_diagnostics_are_drawn_where_they_were_measured(run: Path) -> None:
    write_report([run], run, resamples=50)
    picture, metrics = run / "diagnostics.png", run / "metrics.jsonl"
    assert not picture.exists()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for i, row in enumerate(rows[::2]):
        row |= {SHARE: 0.4, PREDICTED: -0.1, MEASURED: 0.02 if i < 3 else -0.02, GAP: 1e-5, **dict.fromkeys(CONTRACTING, 0.6)}
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sign_agreement(rows) == pytest.approx(10 / 13)
    assert sign_agreement(rows[1::2]) is None
    _, page = write_report([run, run], run, resamples=50)
    assert picture.stat().st_size > 20_000
    assert "![diagnostics](diagnostics.png)" in page.read_text()


def test_markdown_table_is_aligned() -> None:
    assert markdown_table(["a", "bbb"], [["cc", "d"]]) == "| a  | bbb |\n| -- | --- |\n| cc | d   |"
