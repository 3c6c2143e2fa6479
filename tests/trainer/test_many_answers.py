"""The experiment with many right answers: its task, its statistics, and a whole tiny run of it."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.experiments.many_answers import __main__ as command
from benchmarks.experiments.many_answers import page
from benchmarks.experiments.many_answers.arms import ARMS, CONTROL, SEARCH_SEED, TESTED, TITLES, Job, Size
from benchmarks.experiments.many_answers.runs import positive_weight
from benchmarks.experiments.many_answers.task import FEWEST, USED, Question, all_questions, answers, example, right_answer
from eapo_kernels import make_controller


def test_answers_are_all_expressions_and_nothing_else() -> None:
    found = answers("12345")
    spelled = set()
    for used in USED:
        for digits in product("12345", repeat=used):
            for signs in product("+-*", repeat=used - 1) if len(set(digits)) == used else ():
                text = digits[0] + "".join(map("".join, zip(signs, digits[1:], strict=True)))
                answer = right_answer(Question("54321", eval(text)), text)
                assert answer is not None
                assert answer in found[eval(text)]
                spelled.add(answer)
    assert sum(map(len, found.values())) == len(spelled)


@pytest.mark.parametrize(
    "text", ["4+5*7-7", "4+5*7-8", "4+5*7", "4+5*7-6-9*1", "4+5*7-6 ", "-6+4+5*7", "4+5*7-06", "(4+5)*7", "", "4++5*7-6", "33"]
)
def test_wrong_answers(text: str) -> None:
    assert right_answer(Question("49576", 33), "4+5*7-6") is not None
    assert right_answer(Question("49576", 33), text) is None


def test_order_of_terms_and_factors_makes_no_other_answer() -> None:
    question = Question("49576", 33)
    assert right_answer(question, "7*5-6+4") == right_answer(question, "4+5*7-6") != right_answer(question, "9*4-7+4")


def test_parts_share_no_digits_and_examples_are_right() -> None:
    train, held_out = all_questions(held_out=False), all_questions(held_out=True)
    digits = [{frozenset(question.digits) for question in part} for part in (train, held_out)]
    assert not digits[0] & digits[1]
    assert len(held_out) >= 200
    assert len(train) > 3200
    random = np.random.default_rng(0)
    for question in held_out[:200]:
        assert right_answer(question, example(question, random)) is not None
        assert len(answers("".join(sorted(question.digits)))[question.target]) >= FEWEST


@pytest.mark.parametrize("arm", ARMS)
def test_arms(arm: str) -> None:
    config = Job(arm, 3e-4, 7, 20, 0.6 if arm == CONTROL else None).config(Size(), Path("model"))
    method, controller = config.method(), make_controller(config.method())
    if controller is None:
        assert positive_weight(method, None) == {"nsr": 0.0, "w_reinforce": 0.1}[arm]
        return
    controller.update(2.0, 1.0)
    controller.update(1.0, 1.0)  # the entropy has halved
    weight = positive_weight(method, controller)
    expected = {"eapo": 0.5, "constant": 0.6, "eapo_smoothed": 1.0}
    assert weight == pytest.approx(expected.get(arm, 1.0))
    assert method.config.clip_high == (0.28 if arm == "clip_higher" else 0.2)
    assert method.config.entropy_coef == (0.01 if arm == "entropy_bonus" else 0.0)


def run_of(arm: str, seed: int, quality: list[float], best: list[float], **other: Any) -> page.Row:
    each = zip(quality, best, strict=True)
    evaluations = [
        {"step": i, "pass@1": q, "pass@16": b, "distinct_right": 1.0, "entropy": 1.0} for i, (q, b) in enumerate(each)
    ]
    return {
        "arm": arm, "lr": 3e-4, "seed": seed, "steps": 200, "positive_weight": None, "evaluations": evaluations,
        "curves": {"weight": [0.5]}, "diverged": None, "seconds": 60.0, **other,
    }  # fmt: skip


def test_gap_at_equal_quality() -> None:
    own = {0: run_of("eapo", 0, [0.2, 0.4, 0.6], [0.9, 0.8, 0.7])}
    base = {
        0: run_of("constant", 0, [0.2, 0.5, 0.45], [0.9, 0.7, 0.8]),
        1: run_of("constant", 1, [0.2, 0.3, 0.4], [0.9, 0.9, 0.9]),
    }
    # Both reach 0.5: own halfway between 0.8 and 0.7, the base at 0.7.
    assert page.gaps(own, base, "pass@16") == pytest.approx([0.05])


def test_sign_flips() -> None:
    assert page.sign_flips(np.array([1.0, 1.0, 1.0, 1.0, 1.0])) == pytest.approx(2 / 32)
    assert page.sign_flips(np.array([1.0, -1.0])) == 1.0
    assert page.sign_flips(np.array([3.0, 1.0, -1.0])) == pytest.approx(6 / 8)  # sums 5, 3, 3, 1 and their opposites


def test_best_rate_is_of_the_search_alone() -> None:
    rows = [
        run_of("grpo", SEARCH_SEED, [0.2, 0.5], [1, 1], lr=1e-4),
        run_of("grpo", SEARCH_SEED, [0.2, 0.6], [1, 1], lr=3e-4),
        run_of("grpo", 0, [0.2, 0.9], [1, 1], lr=1e-3),
    ]
    assert page.best_rate(rows, "grpo") == 3e-4


def test_collapses_are_counted_and_a_diverged_run_is_drawn(tmp_path: Path) -> None:
    rows = [
        run_of("grpo", 0, [0.2, 0.6, 0.1], [1, 1, 1]),
        run_of("grpo", 1, [0.2, 0.6], [1, 1], diverged=50),
        run_of("grpo", 2, [0.2, 0.6, 0.6], [1, 1, 1]),
    ]
    line = next(line for line in page.tables(rows).splitlines() if line.startswith("| GRPO"))
    assert line.split("|")[-2].strip() == "2"
    page.draw_figure(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_time_is_counted_in_medians() -> None:
    rows = [run_of("grpo", i, [0.2], [1], seconds=seconds) for i, seconds in enumerate((60.0, 90.0, 5000.0))]
    rows.append(run_of("grpo", SEARCH_SEED, [0.2], [1], steps=100, seconds=30.0))
    assert page.time_taken(rows) == (
        "4 runs (3 of 200 steps, 90 s each, 1 of 100 steps, 30 s each, in the median): 5 minutes of one core."
    )


def test_the_committed_page_is_drawn_from_the_committed_results() -> None:
    folder = Path(page.__file__).parent
    rows = page.load(folder / page.RESULTS)
    assert len(rows) == 72
    assert (folder / page.PAGE).read_text().partition(page.BEGIN)[2].partition(page.END)[0].strip() == page.tables(rows)


def test_a_tiny_experiment_from_weights_to_page_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "train", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--arms", "eapo", "constant",
        "--seeds", "1", "--tested-seeds", "1", "--lr", "1e-3", "--steps", "3", "--prompts", "2", "--responses", "4",
        "--questions", "4", "--every", "2", "--width", "32", "--layers", "1", "--supervised-steps", "3",
    ]  # fmt: skip
    assert command.main(arguments) == 0
    rows = page.load(tmp_path / "out" / page.RESULTS)
    assert [row["arm"] for row in rows] == [TESTED, CONTROL]
    assert [[found["step"] for found in row["evaluations"]] for row in rows] == [[0, 2, 3]] * 2
    assert rows[1]["positive_weight"] == pytest.approx(np.mean(rows[0]["curves"]["weight"]), rel=1e-3)
    assert rows[0]["evaluations"][0] == rows[1]["evaluations"][0]  # the same weights, the same random numbers
    written = (tmp_path / "out" / page.PAGE).read_text()
    assert TITLES[TESTED] in written
    assert "The test." in written
    capsys.readouterr()
    assert command.main(arguments) == 0  # everything is there
    assert page.load(tmp_path / "out" / page.RESULTS) == rows
    assert "pass@1" not in capsys.readouterr().out


def test_the_control_needs_the_tested_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["train", "--out", str(tmp_path), "--arms", "constant"])
    assert "--arms: expected eapo beside constant" in capsys.readouterr().err
