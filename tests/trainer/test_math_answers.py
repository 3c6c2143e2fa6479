"""The reward math_verify: answers in LaTeX, what cannot be parsed, and answers that take too long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("math_verify", reason="the reward math_verify needs math-verify: pip install '.[train]'")

from trainer.rewards import Failed, math_answers
from trainer.rewards.math_answers import MathVerify, grade


@pytest.fixture(scope="module")
def reward() -> Iterator[MathVerify]:
    made = MathVerify()
    yield made
    assert made.pool is not None
    made.pool.terminate()


@pytest.mark.parametrize(
    ("answer", "completion", "score"),
    [
        ("72", "Half of 144 is 72, so the answer is \\boxed{72}.", 1),
        ("72", "3 + 69 = 72. The answer is 72", 1),
        ("72", "First \\boxed{72}? No: \\boxed{73}", 0),
        ("34", "\\boxed{35}", 0),
        ("1,234", "\\boxed{1234}", 1),
        ("\\frac{1}{2}", "$\\frac12$", 1),
        ("\\frac{1}{2}", "\\boxed{0.5}", 1),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{3}}", 0),
        ("\\sqrt{8}", "\\boxed{2\\sqrt{2}}", 1),
        ("x^2+2x+1", "\\boxed{(x+1)^2}", 1),
        ("[0,1)", "\\boxed{[0,1)}", 1),
        ("[0,1)", "\\boxed{[0,1]}", 0),
        ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", 1),
        ("\\{1,2\\}", "\\boxed{\\{1,3\\}}", 0),
        ("10", "\\boxed{10\\text{ cm}}", 1),
        ("18", "\\boxed{\\$18}", 1),
        ("5", "\\boxed{x=5}", 1),
        ("$\\frac{3}{4}$", "so \\boxed{75\\%}", 1),
        ("42", "Anna has 17 + 25.", 0),
        ("42", "Ben has 6 * 7.", 0),
        ("42", "\\boxed{6 \\times 7}", 0),
        ("42", "\\boxed{50 - 8}", 0),
        ("42", "\\boxed{2^{5}+10}", 0),
        ("42", "84/2", 0),
        ("42", "\\boxed{\\frac{84}{2}}", 0),
        ("42", "17 + 25 = 42", 1),
        ("42", "\\boxed{17+25=42}", 1),
        ("42", "$x=42$", 1),
        ("-42", "\\boxed{-42}", 1),
        ("0.5", "1/2", 1),
        ("420", "\\boxed{4.2 \\times 10^{2}}", 1),
        ("0.001", "\\boxed{10^{-3}}", 1),
        ("2^{10}", "\\boxed{1024}", 1),
        ("1+\\sqrt{2}", "\\boxed{\\sqrt{2}+1}", 1),
        ("(x+1)^2", "\\boxed{x^2+2x+1}", 1),
        ("17+25", "\\boxed{42}", 1),
    ],
)
def test_equal_as_mathematical_objects(answer: str, completion: str, score: float) -> None:
    assert grade(answer, completion) == score


def test_a_completion_that_cannot_be_parsed_is_zero_and_such_a_reference_a_failure(reward: MathVerify) -> None:
    texts = ["no idea", "", "\\boxed{\\frac{", "\\boxed{3}"]
    assert reward(texts, [3, "3", "3", "3"]) == [0.0, 0.0, 0.0, 1.0]
    (failed,) = reward(["\\boxed{3}"], [""])
    assert isinstance(failed, Failed)
    assert "expected a reference answer (text, number or date), got ''" in failed.reason


def test_a_worker_that_hangs_is_killed_and_the_other_completions_are_graded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answers, "LIMIT", 5.0)
    monkeypatch.setattr(math_answers, "WORKERS", 1)
    reward = MathVerify()
    assert reward(["\\boxed{4}"], ["4"]) == [1.0]  # the worker has started
    pool = reward.pool
    assert pool is not None
    apply = pool.apply_async

    def hanging(function: Any, pair: tuple[str, str]) -> Any:
        return apply(time.sleep, (60,)) if pair[1] == "stuck" else apply(function, pair)

    monkeypatch.setattr(pool, "apply_async", hanging)
    begun = time.monotonic()
    assert reward(["\\boxed{4}", "stuck", "\\boxed{5}"], ["4", "4", "5"]) == [1.0, Failed("not graded within 5 s"), 1.0]
    assert 5 <= time.monotonic() - begun < 20
    assert reward.pool is not None
    assert reward.pool is not pool
    reward.pool.terminate()
