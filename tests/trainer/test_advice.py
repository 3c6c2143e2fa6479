"""Warnings about settings that have no effect: one line each, printed once, and none for other
settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer.config import Config, VllmConfig
from trainer.config.advice import advice, advice_on_rewards
from trainer.loop import train

LATE = {"loss": {"method": "kl_cov"}}
CUT = {"rollout": {"top_p": 0.9, "record_support": False}}
ROUNDED = {"rollout": {"engine": "vllm", "vllm": VllmConfig(dtype="bfloat16")}}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, None),
        (LATE, "kl_cov has no effect while the ratio is 1"),
        ({**LATE, "optim": {"epochs": 2}}, None),
        ({**LATE, "optim": {"minibatches": 2}}, None),
        ({"loss": {"method": "spear"}}, "spear: only its loss is in this trainer, not its way to sample completions"),
        (CUT, "rollout.record_support is False"),
        ({"rollout": {"top_p": 0.9, "top_k": 5}}, None),
        ({"rollout": {"record_support": False}}, None),
        ({**CUT, "loss": {"importance_cap": 2.0}}, None),
        (ROUNDED, "rollout.vllm.dtype is bfloat16 and model.dtype float32"),
        ({**ROUNDED, "model": {"dtype": "bfloat16"}}, None),
        ({**ROUNDED, "loss": {"importance_cap": 2.0}}, None),
    ],
    ids=str,
)
def test_before_the_first_step(changed: Callable[..., Config], sections: dict[str, Any], expected: str | None) -> None:
    found = advice(changed(**sections))
    assert len(found) == (expected is not None)
    assert expected is None or found[0].startswith(expected)
    assert all("\n" not in line for line in found)


@pytest.mark.parametrize("method", ["pear", "dcpo", "trace", "a3po"])
def test_after_the_first_step(changed: Callable[..., Config], method: str) -> None:
    config = changed(loss={"method": method})
    (line,) = advice_on_rewards(config, torch.tensor([0.1, 0.5]))
    assert line.startswith(
        f"{method} counts completions with a reward above 0.5 as correct, and the highest reward of the first step is 0.5"
    )
    assert advice_on_rewards(config, torch.tensor([0.1, 0.6])) == []
    assert advice_on_rewards(changed(loss={"method": method, "correct_above": 0.3}), torch.tensor([0.4])) == []
    assert advice_on_rewards(changed(), torch.tensor([0.1])) == []


def test_a_run_says_it_once(changed: Callable[..., Config], capsys: pytest.CaptureFixture[str]) -> None:
    config = changed(steps=2, loss={"method": "pear"}, data={"eval": ""}, rewards={"weights": (0.01,)}, **CUT)
    assert train(config)
    output = capsys.readouterr().out
    assert output.count("advice: rollout.record_support is False") == 1
    assert output.count("advice: pear counts completions with a reward above 0.5") == 1


@pytest.mark.parametrize(("reward", "expected"), [("same", 1), ("low_numbers", 0)])
def test_a_run_that_learns_nothing_says_so_once(
    changed: Callable[..., Config], capsys: pytest.CaptureFixture[str], reward: str, expected: int
) -> None:
    config = changed(steps=11, diagnose_every=0, data={"eval": ""}, rewards={"functions": (f"reward_functions:{reward}",)})
    assert train(config)
    output = capsys.readouterr().out
    assert output.count("advice: the gradient of five steps was 0, so nothing was learned") == expected
