"""DAPO's dynamic sampling: groups without spread are replaced by groups of other prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import no_tick

from eapo_kernels import EapoError
from trainer.config import Config
from trainer.dataset import PromptSet
from trainer.learning.measure import measure
from trainer.models.policy import Policy
from trainer.records import Sampling, ScoredRollouts
from trainer.rewards.scoring import Rewards
from trainer.rollouts.source import RolloutSource
from trainer.rollouts.transformers_engine import TransformersEngine
from trainer.runs.console import Console

PROMPTS = [[5, 6, 7, 12, 8], [9], [10, 11, 12], [5, 6]]
COLUMNS = {"prompt": ["a", "b", "c", "d"], "answer": ["n1", "n2", "n3", "n4"]}
ASKED = PromptSet([dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)], "data.train", PROMPTS)
SAMPLING = Sampling(responses=4, max_new_tokens=8, temperature=1.0, top_p=1.0, seed=7)


@pytest.fixture
def source(policy: Policy, config: Config) -> RolloutSource:
    config = config.replace(rollout={"max_new_tokens": SAMPLING.max_new_tokens})
    rewards = Rewards(config.rewards, cache="unused", device=policy.device)
    engine, console = TransformersEngine(policy, 64), Console()
    return RolloutSource(config, policy.tokenizer, engine, rewards, console)


def check(sampled: ScoredRollouts) -> None:
    """All fields have one entry for each completion, and scores belong to their texts."""
    n = len(sampled)
    rollouts = sampled.rollouts
    sizes = [len(c) for c in (rollouts.prompt_ids, rollouts.completion_ids, rollouts.logp, rollouts.truncated)]
    sizes += [len(sampled.group_ids), sampled.scores.total.numel()]
    assert {*sizes} == {n}
    supports = rollouts.support or [None] * n
    for ids, logp, truncated, support in zip(rollouts.completion_ids, rollouts.logp, rollouts.truncated, supports, strict=True):
        assert support is None or all(
            t in kept for t, kept in zip(ids, support.ids.split(support.counts.tolist()), strict=True)
        )
        assert len(ids) == len(logp) <= SAMPLING.max_new_tokens
        assert 1 not in ids[:-1]
        assert truncated is (ids[-1] != 1)
    for i, text in enumerate(sampled.texts):
        words = text.split()
        assert sampled.scores.total[i].item() == pytest.approx(sum(w in {f"n{k}" for k in range(10)} for w in words) / 6)
        row = COLUMNS["prompt"].index(sampled.columns["prompt"][i])
        assert (sampled.columns["answer"][i], rollouts.prompt_ids[i]) == (COLUMNS["answer"][row], PROMPTS[row])


def test_other_prompts_are_asked_in_the_place_of_flat_groups(source: RolloutSource) -> None:
    sampled = source.draw(ASKED, range(4), SAMPLING)
    check(sampled)
    assert source.config.rollout.prompts == 3
    flat = sampled.scores.total.clone()
    flat[4:] = 0.5  # of the four groups only the first has spread
    flat[:4] = torch.tensor([0.0, 0.1, 0.2, 0.3])
    sampled = replace(sampled, scores=replace(sampled.scores, total=flat))
    result = source.resample(sampled, SAMPLING, rounds=2, seed=9, next_prompts=lambda: ASKED)
    assert result.rollouts.completion_ids[:4] == sampled.rollouts.completion_ids[:4]
    check(result.take(range(4, len(result))))
    groups = result.groups()
    assert len(groups) == 3
    assert all(result.scores.total[group].unique().numel() > 1 for group in groups)
    assert {result.group_ids[i] for i in range(4, len(result))}.isdisjoint(sampled.group_ids)
    nothing = replace(sampled, scores=replace(sampled.scores, total=torch.zeros(16)))
    assert source.resample(nothing, SAMPLING, rounds=0, seed=0, next_prompts=lambda: ASKED) is nothing


def test_dapo_resamples_by_default(config: Config) -> None:
    assert config.resample_rounds() == 0
    assert config.replace(rollout={"resample_rounds": 3}).resample_rounds() == 3
    assert config.replace(loss={"method": "dapo"}).resample_rounds() == 2
    assert config.replace(loss={"method": "dapo"}, rollout={"resample_rounds": 0}).resample_rounds() == 0


def test_completions_keep_their_support(source: RolloutSource, policy: Policy) -> None:
    """The engine's log-probs of first and further completions are the policy's over it."""
    cut = replace(SAMPLING, top_p=0.8)
    sampled = source.draw(ASKED, range(4), cut)
    sampled.scores.total[4:] = 0.5
    sampled = source.resample(sampled, cut, rounds=2, seed=9, next_prompts=lambda: ASKED)
    assert sampled.rollouts.support is not None
    completions = sampled.rollouts
    found = measure(policy, completions, temperature=1.0, budget=200, tick=no_tick)
    torch.testing.assert_close(found.logp, torch.cat(completions.logp), atol=2e-5, rtol=0)
    plain = source.draw(ASKED, range(4), SAMPLING).rollouts
    with pytest.raises(EapoError, match="support: expected one of all completions or of none, got one of some"):
        sampled.rollouts.concat(plain)
