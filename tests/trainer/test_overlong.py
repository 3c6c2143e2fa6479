"""What truncated completions do: left out of the loss, or penalised by their length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_tokenizer, no_tick

from eapo_kernels import get_method
from eapo_kernels.objectives.advantages import ADVANTAGES
from trainer.config import Config, OptimConfig
from trainer.learning.experience import Experience, weigh
from trainer.learning.learner import Learner
from trainer.learning.measure import measure
from trainer.loop import train
from trainer.models.policy import Policy
from trainer.records import Sampling
from trainer.rewards.scoring import overlong_penalty
from trainer.rollouts.transformers_engine import TransformersEngine
from trainer.runs.rundir import read

REWARDS, GROUPS = torch.arange(12.0) % 5, torch.arange(12) // 4


def updated(experience: Experience) -> tuple[dict[str, float], torch.Tensor]:
    """The metrics of one update of a fresh policy, and its weights in a row."""
    policy = Policy(make_model(), make_tokenizer())
    learner = Learner(policy, get_method("grpo"), OptimConfig(lr=1e-2), temperature=1.0, steps=1)
    learner.optimizer = torch.optim.SGD(policy.trainable(), lr=1.0)  # AdamW would hide a wrong denominator
    metrics = learner.update(experience, step=0, seed=0, tick=no_tick)
    return metrics, torch.cat([p.detach().flatten() for p in policy.trainable()])


def test_masked_completions_train_nothing_and_count_in_their_group(policy: Policy) -> None:
    sampling = Sampling(4, 9, 1.0, 1.0, seed=2)
    rollouts = TransformersEngine(policy, 64).generate([[5, 6, 7, 12, 8], [9], [10, 11, 12]], sampling, no_tick)
    truncated = [i % 3 == 0 for i in range(12)]
    kept = [i for i in range(12) if not truncated[i]]
    method = get_method("grpo")

    def experience(indices: list[int], advantages: torch.Tensor | None) -> Experience:
        completions = rollouts.take(indices)
        old = measure(policy, completions, temperature=1.0, budget=1000, tick=no_tick)
        found = weigh(method, completions, REWARDS[indices], GROUPS[indices], old)
        given = {} if advantages is None else {"advantages": advantages, "token_advantages": False}
        return replace(found, batch=replace(found.batch, **given))

    everything = experience(list(range(12)), None)
    estimator = ADVANTAGES["group_norm"]
    metrics, weights = updated(everything.masked(truncated))
    alone, expected = updated(experience(kept, estimator(REWARDS, GROUPS)[kept].float()))
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    assert metrics["loss"] == pytest.approx(alone["loss"], abs=1e-6)
    assert not torch.allclose(updated(everything)[1], weights, rtol=0, atol=1e-4)
    nothing, unchanged = updated(everything.masked([True] * 12))
    assert nothing["loss"] == nothing["grad_norm"] == 0
    assert torch.equal(unchanged, torch.cat([p.detach().flatten() for p in policy.trainable()]))
    own = replace(everything, batch=replace(everything.batch, mask=everything.batch.targets % 2 == 0))
    both = own.masked(truncated).batch.mask
    assert both is not None
    per_token = torch.tensor([not cut for cut, ids in zip(truncated, rollouts.completion_ids, strict=True) for _ in ids])
    assert torch.equal(both, (everything.batch.targets % 2 == 0) & per_token)


def test_the_penalty_falls_linearly_over_the_last_tokens() -> None:
    assert overlong_penalty([1, 60, 70, 80, 90, 100], 100, 40).tolist() == [0.0, 0.0, -0.25, -0.5, -0.75, -1.0]
    assert overlong_penalty([80, 90, 100], 100, 0).tolist() == [0.0, -0.5, -1.0]


@pytest.mark.parametrize("overlong", ["mask", "penalty"])
def test_a_run(changed: Callable[..., Config], overlong: str) -> None:
    longer = {"max_new_tokens": 40, "responses": 8}
    config = changed(steps=1, rollout=longer, rewards={"overlong": overlong, "overlong_window": 30})
    plain = changed(steps=1, rollout=longer, name="plain")
    assert train(config)
    assert train(plain)
    (row,), (other,) = (read(Path(c.out) / c.name, "metrics") for c in (config, plain))
    assert 0 < row["response/truncated"] == other["response/truncated"] < 1
    assert row["eapo/entropy"] == other["eapo/entropy"]
    assert row["loss"] != other["loss"]
    if overlong == "mask":
        assert row["reward/mean"] == other["reward/mean"]
    else:
        assert row["reward/mean"] == pytest.approx(other["reward/mean"] + row["reward/overlong/mean"])
        assert -1 < row["reward/overlong/mean"] < 0
    before, unpenalised = (read(Path(c.out) / c.name, "evaluations")[0] for c in (config, plain))
    assert before == unpenalised
