"""TRL's signature, weights, and failed scores."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from trainer.config import RewardsConfig
from trainer.config.settings import parse_config
from trainer.errors import ConfigError, RewardError
from trainer.evaluation.step_metrics import reward_metrics
from trainer.records import Rollouts, ScoredRollouts
from trainer.rewards import Failed
from trainer.rewards.builtin import Similarity, exact_match, rouge
from trainer.rewards.math_answers import MathVerify
from trainer.rewards.scoring import Rewards

HERE = "reward_functions:"


def make(*functions: str, weights: tuple[float, ...] | None = None, **options: Any) -> Rewards:
    config = RewardsConfig(functions=functions, weights=weights or (1.0,) * len(functions), **options)
    return Rewards(config, cache="unused", device=torch.device("cpu"))


def score(rewards: Rewards, texts: list[str], **columns: list[Any]) -> Any:
    prompts = columns.pop("prompt", ["q"] * len(texts))
    return rewards.score({"prompt": prompts, **columns}, texts, [[1]] * len(texts))


def test_functions_receive_what_trl_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def function(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns)
        return [0.5, 1.5]

    rewards = make("rouge")
    rewards.functions = {"f": function}
    chat = [{"role": "user", "content": "hi"}]
    found = rewards.score({"prompt": ["q", chat], "answer": ["a", "b"], "level": [1, 2]}, ["x", "y"], [[4, 5], [6]])
    assert found.total.tolist() == [0.5, 1.5]
    assert seen["prompts"] == ["q", chat]
    assert seen["completions"] == ["x", [{"role": "assistant", "content": "y"}]]
    assert seen["completion_ids"] == [[4, 5], [6]]
    assert seen["columns"] == {"answer": ["a", "b"], "level": [1, 2]}


def test_weighted_sum_leaves_out_functions_that_do_not_apply() -> None:
    rewards = make("exact_match", HERE + "only_even", weights=(2.0, 10.0))
    found = score(rewards, ["yes", "no", " Yes "], answer=["yes"] * 3, number=[1, 2, 2])
    assert found.total.tolist() == [2.0, 10.0, 12.0]
    assert found.parts[HERE + "only_even"] == [None, 1.0, 1.0]
    unscored = score(make(HERE + "only_even"), ["a", "b"], number=[1, 2])
    assert math.isnan(unscored.total[0])
    assert "no function scored it" in str(unscored.failures[0])


@pytest.mark.parametrize(("function", "bad"), [("nan_for_number_1", [3]), ("raises_for_number_1", [2, 3])])
def test_failed_scores_are_reported_and_take_their_group_along(function: str, bad: list[int]) -> None:
    texts = ["a", "bb", "ccc", "dddd", "e", "ff"]
    found = score(make(HERE + function), texts, number=[0, 0, 1, 1, 2, 2])
    assert found.total.isnan().nonzero().flatten().tolist() == bad
    assert [failure.index for failure in found.failures] == bad
    assert texts[bad[0]] in str(found.failures[0])
    empty: list[Any] = [[] for _ in texts]
    sampled = ScoredRollouts(Rollouts(empty, empty, empty, empty), texts, {}, found, [0, 0, 1, 1, 2, 2])
    assert sampled.fully_scored() == [0, 1, 4, 5]
    metrics = reward_metrics(sampled.take(sampled.fully_scored()))
    assert metrics["reward/mean"] == pytest.approx((1 + 2 + 1 + 2) / 4)
    with pytest.raises(RewardError, match=function):
        score(make(HERE + function, on_failure="stop"), texts, number=[0, 0, 1, 1, 2, 2])


def test_a_broken_contract_always_stops() -> None:
    with pytest.raises(RewardError, match="expected a list of 3 numbers or None, got 1 of them"):
        score(make(HERE + "too_few"), ["a", "b", "c"])
    rewards = make("rouge")
    for wrong, message in ((lambda **_: ["x", "y"], "expected numbers or None"), (lambda **_: None, "got None")):
        rewards.functions = {"f": wrong}
        with pytest.raises(RewardError, match=message):
            score(rewards, ["a", "b"])


def test_a_function_that_fails_only_on_many_is_not_trusted() -> None:
    def moody(completions: list[str], **_: Any) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("only one at a time")
        return [1.0]

    rewards = make("rouge")
    rewards.functions = {"moody": moody}
    with pytest.raises(RewardError, match="only one at a time"):
        score(rewards, ["a", "b"])


@pytest.mark.parametrize("path", ["no.such.module:f", "math:nothing", "math:pi"])
def test_import_paths_that_lead_nowhere(path: str) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.functions"):
        make(path)


def test_built_in_values() -> None:
    # The longest common subsequence of "the cat sat" and "the cat on the mat" is 2 words: P = 2/3, R = 2/5, F1 = 1/2.
    assert rouge(["the cat sat", "", "cats"], ["the cat on the mat", "a", "cat"]) == pytest.approx([0.5, 0.0, 1.0])
    assert exact_match([" Yes ", "no"], ["yes", "yes"]) == [1.0, 0.0]

    def embedding(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0] if "cat" in text else [0.6, 0.8] for text in texts])

    similarity = Similarity(embedding, share=0.25)
    assert similarity(["the cat sat", "x"], ["the cat on the mat", "a cat"]) == pytest.approx([0.625, 0.15])


@pytest.mark.parametrize("name", ["exact_match", "rouge", "math_verify", "similarity"])
def test_a_missing_answer_is_never_a_text(name: str) -> None:
    """Neither its name in Python nor an empty completion earns anything."""
    if name == "math_verify":
        pytest.importorskip("math_verify", reason="pip install '.[train]'")
    functions: dict[str, Any] = {"exact_match": exact_match, "rouge": rouge, "similarity": Similarity(_same, 0.5)}
    function = MathVerify() if name == "math_verify" else functions[name]
    missing: list[Any] = [None, math.nan, "", "  ", b"n1", [], ["n1"], {"a": 1}]
    said = ["None", "nan", "", "", "b'n1'", "[]", "['n1']", "{'a': 1}"]
    for score in function(completions=said, answer=missing):
        assert isinstance(score, Failed)
        assert "expected a reference answer" in score.reason
    written: list[Any] = [decimal.Decimal("1.50"), 2, 2.5]
    if name != "math_verify":
        written += [datetime.date(1989, 11, 9), "007"]
    scores = function(completions=[str(value) for value in written], answer=written)
    assert scores == pytest.approx([1.0] * len(written))


def _same(texts: Sequence[str]) -> torch.Tensor:
    """A sentence embedding for which all texts are equal."""
    return torch.ones(len(texts), 1)


def test_no_reference_column_for_a_function_that_compares() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.columns\.answer: expected the column of the reference answers that rouge compares"
    ):
        parse_config(["--data.columns.answer=", "--rewards.functions", "rouge"])
    assert parse_config(["--data.columns.answer=", "--rewards.functions", "math:sin"]).data.columns.answer == ""
