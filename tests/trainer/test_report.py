"""Tables and intervals of the report, and runs that cannot be drawn."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from trainer.config import Config
from trainer.config.settings import to_toml
from trainer.errors import DataError
from trainer.evaluation.diversity import bootstrap
from trainer.evaluation.evaluate import Evaluation, difference, evaluation_table, markdown_table
from trainer.evaluation.report import summary_table, write_report

NAMES = ("reward", "reward_best", "distinct_1", "distinct_2", "entropy", "length", "truncated")


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
    change = difference(evaluation(0, 0.0), evaluation(9, 0.5), "reward")
    assert (change.mean, change.low, change.high) == (0.5, 0.5, 0.5)
    assert bootstrap([1.5, 3.5], 200).low < 2.5 < bootstrap([1.5, 3.5], 200).high


def test_summary_has_before_after_and_change(run: Path) -> None:
    table = summary_table(run)
    assert "3 held-out prompts, 4 completions each, mean [95 % interval] | step 0 " in table
    cells = [cell.strip() for cell in next(line for line in table.splitlines() if "| reward  " in line).split("|")]
    assert cells[1] == "reward"
    assert cells[2].startswith("2.000 [")
    assert cells[3].startswith("2.500 [")
    assert cells[4] == "0.500 [0.500, 0.500]"


def test_a_single_evaluation_says_its_step() -> None:
    """That of a run which was interrupted later, for example."""
    header = evaluation_table([evaluation(0, 0.0)]).splitlines()[0]
    assert header.startswith("| 3 held-out prompts, 4 completions each, after step 0 | mean")
    assert "after step" not in evaluation_table([evaluation(0, 0.0)], after_step=False)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn."""
    found: list[Figure] = []
    monkeypatch.setattr(plt, "close", found.append)
    return found


def test_report_draws_runs_with_gaps_and_refuses_runs_without_steps(run: Path, tmp_path: Path, figures: list[Figure]) -> None:
    other = shutil.copytree(run, tmp_path / "elsewhere" / run.name)
    picture, page = write_report([run, other], tmp_path / "out")
    assert picture.stat().st_size > 10_000
    assert f"## {run}" in page.read_text(), "runs of one name are told apart by their paths"
    reward, *hidden = figures[0].axes
    assert reward.get_title() == "reward"
    assert not any(axis.axison for axis in hidden), "the entropy was never measured"
    assert [line.get_label() for line in reward.lines if not line.get_label().startswith("_")] == [str(run), str(other)]
    with pytest.raises(DataError, match="expected a run with metrics"):
        write_report([tmp_path], tmp_path / "out")


def test_curves_are_smooth_over_the_raw_values_with_evaluations_and_whole_steps(run: Path, figures: list[Figure]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i + 1, "reward/mean": i % 2}) + "\n" for i in range(40)))
    write_report([run], run)
    reward = figures[0].axes[0]
    raw, smooth = (line.get_ydata().tolist() for line in reward.lines[:2])
    assert raw == [i % 2 for i in range(40)]
    assert smooth[0] == pytest.approx(1 / 3)  # of 0 1 0
    assert smooth[10] == pytest.approx(2 / 5)  # of 0 1 0 1 0
    assert [tick for tick in reward.get_xticks() if tick % 1] == []
    (points,) = reward.containers
    assert points.lines[0].get_xdata().tolist() == [0, 25]
    assert points.lines[0].get_ydata().tolist() == [2.0, 2.5], "means of the evaluations; None is left out"


def test_completions_of_some_steps_and_of_the_evaluations_are_shown(run: Path) -> None:
    file = run / "samples.jsonl"
    evaluated = [
        {"step": step, "dataset": "held-out", "prompt": [{"content": "q"}], "completion": f"c{step}", "reward": reward}
        for step, reward in ((0, None), (10, 0.5), (25, 1.0))
    ]
    file.write_text(file.read_text() + "".join(json.dumps(row) + "\n" for row in evaluated))
    _, page = write_report([run], run)
    best_and_worst, before_and_after = (
        page.read_text().split("Best and worst completion of a step:")[1].split("Held-out prompts")
    )
    assert re.findall(r"step (\d+), reward (\S+): q -> '(\w+)", best_and_worst)[:4] == [
        ("1", "0.900", "splendid"), ("1", "0.100", "poor"), ("7", "0.900", "splendid"), ("7", "0.160", "poor"),
    ]  # fmt: skip
    assert "middling" not in best_and_worst
    assert re.findall(r"- (.*)", before_and_after) == ["step 0, reward none: q -> 'c0'", "step 25, reward 1.000: q -> 'c25'"]


def test_markdown_table_is_aligned() -> None:
    assert markdown_table(["a", "bbb"], [["cc", "d"]]) == "| a  | bbb |\n| -- | --- |\n| cc | d   |"
