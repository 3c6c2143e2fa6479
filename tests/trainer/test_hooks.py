"""Effects of the rollout hooks on the completions of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny import no_tick

from eapo_kernels import EapoError, get_method
from trainer.config import Config
from trainer.hooks import CutRollouts, OversampledRollouts, ReplayRollouts, RolloutHook, SpreadRollouts, TargetRollouts
from trainer.learning.batching import select
from trainer.learning.measure import measure
from trainer.models.policy import Policy
from trainer.records import Sampling, ScoredRollouts
from trainer.rewards.scoring import Rewards
from trainer.rollouts.source import RolloutSource
from trainer.rollouts.transformers_engine import TransformersEngine
from trainer.runs.console import Console
from trainer.runs.interrupt import StopRequest

Change = Callable[..., Config]
PROMPTS = [[5, 6, 7, 12, 8], [9], [10, 11, 12], [5, 6]]
COLUMNS = {"prompt": ["a", "b", "c", "d"], "answer": ["n1", "n2", "n3", "n4"]}
SAMPLING = Sampling(responses=4, max_new_tokens=8, temperature=1.0, top_p=1.0, seed=7)


@pytest.fixture
def source(policy: Policy, config: Config) -> RolloutSource:
    config = config.replace(rollout={"max_new_tokens": SAMPLING.max_new_tokens})
    rewards = Rewards(config.rewards, cache="unused", device=policy.device)
    engine, console = TransformersEngine(policy, 64), Console(StopRequest())
    return RolloutSource(config, get_method("grpo"), policy, engine, rewards, console, lambda: (PROMPTS, COLUMNS))


def draw(source: RolloutSource, hook: RolloutHook, seed: int = 7) -> ScoredRollouts:
    return source.draw(PROMPTS, COLUMNS, range(4), hook.before(replace(SAMPLING, seed=seed)))


def check(sampled: ScoredRollouts) -> None:
    """All fields have one entry for each completion, and scores belong to their texts."""
    n = len(sampled)
    rollouts = sampled.rollouts
    sizes = [len(c) for c in (rollouts.prompt_ids, rollouts.completion_ids, rollouts.logp, rollouts.truncated)]
    sizes += [len(sampled.group_ids), sampled.scores.total.numel()]
    assert {*sizes, *(len(flags) for flags in sampled.marks.values())} == {n}
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


def test_without_a_hook_nothing_changes(source: RolloutSource) -> None:
    hook = RolloutHook()
    sampled = draw(source, hook)
    assert hook.before(SAMPLING) == SAMPLING
    assert hook.after(sampled, SAMPLING, source, {}, 0) is sampled
    check(sampled)


def test_dapo_asks_other_prompts_in_the_place_of_flat_groups(source: RolloutSource) -> None:
    hook, sampled = SpreadRollouts(rounds=2), draw(source, SpreadRollouts())
    assert source.config.rollout.prompts == 3
    flat = sampled.scores.total.clone()
    flat[4:] = 0.5  # of the four groups only the first has spread
    flat[:4] = torch.tensor([0.0, 0.1, 0.2, 0.3])
    sampled = replace(sampled, scores=replace(sampled.scores, total=flat))
    result = hook.after(sampled, SAMPLING, source, {}, seed=9)
    assert result.rollouts.completion_ids[:4] == sampled.rollouts.completion_ids[:4]
    check(result.take(range(4, len(result))))
    groups = result.groups()
    assert len(groups) == 3
    assert all(result.scores.total[group].unique().numel() > 1 for group in groups)
    assert {result.group_ids[i] for i in range(4, len(result))}.isdisjoint(sampled.group_ids)
    assert len(SpreadRollouts(rounds=0).after(sampled, SAMPLING, source, {}, 0)) == 4
    nothing = replace(sampled, scores=replace(sampled.scores, total=torch.zeros(16)))
    assert SpreadRollouts(rounds=0).after(nothing, SAMPLING, source, {}, 0) is nothing


@pytest.mark.parametrize(("temperature", "above"), [(1.2, 0.0), (0.8, 1.0)])
def test_aepo_replaces_some_by_good_completions_of_another_temperature(
    source: RolloutSource, temperature: float, above: float
) -> None:
    hook = TargetRollouts(resampled_share=0.5, replaced_share=0.25)
    sampled = draw(source, hook)
    asked: list[Sampling] = []
    generate = source.generate
    source.generate = lambda prompts, sampling: asked.append(sampling) or generate(prompts, sampling)  # type: ignore[method-assign]
    state = {"temperature": torch.tensor(temperature, dtype=torch.float64), "above": torch.tensor(above)}
    result = hook.after(sampled, SAMPLING, source, state, seed=3)
    assert [(s.temperature, s.responses) for s in asked] == [(temperature, 4)]
    check(result)
    new = [i for i, flag in enumerate(result.marks["reinforce"]) if flag]
    assert 0 < len(new) <= (2 if above else 4)
    assert len(result) == len(sampled)
    assert result.advantages is not None
    assert bool((result.advantages[new] > 0.05).all())
    assert {result.group_ids[i] for i in new}.isdisjoint(sampled.group_ids)
    full = source.advantages(sampled)  # of the full groups, before any completion is dropped
    kept = [i for i in range(len(sampled)) if sampled.rollouts.completion_ids[i] in result.rollouts.completion_ids[: -len(new)]]
    assert set(result.advantages[: -len(new)].tolist()) <= set(full[kept].tolist())
    again = hook.after(sampled, SAMPLING, source, state, seed=3)
    assert again.rollouts.completion_ids == result.rollouts.completion_ids


def test_cure_continues_from_an_uncertain_token(source: RolloutSource) -> None:
    hook = CutRollouts(continuations=3, top=2)
    sampled = draw(source, hook)
    assert len(sampled) == 4
    entropies = source.entropies(sampled)
    result = hook.after(sampled, SAMPLING, source, {}, seed=5)
    check(result)
    assert len(result) == 16
    assert [len(group) for group in result.groups()] == [4, 4, 4, 4]
    assert result.rollouts.completion_ids[:4] == sampled.rollouts.completion_ids
    for i, (ids, entropy) in enumerate(zip(sampled.rollouts.completion_ids, entropies, strict=True)):
        words = [place for place in range(len(ids)) if ids[place] > 2]  # not pad, eos, unk
        best = sorted(words, key=lambda place: -float(entropy[place]))[:2] if words else range(len(ids))
        new = result.rollouts.completion_ids[4 + 3 * i : 7 + 3 * i]
        assert any(all(other[:cut] == ids[:cut] for other in new) for cut in best)
    # recorded log-probs are those of the full completion under the policy, prefix and continuation
    dense = source.policy.model(
        input_ids=torch.tensor([result.rollouts.prompt_ids[4] + result.rollouts.completion_ids[4]])
    ).logits
    ids, start = result.rollouts.completion_ids[4], len(result.rollouts.prompt_ids[4])
    logp = dense[0, start - 1 : -1].log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(result.rollouts.logp[4], logp.detach(), atol=2e-5, rtol=0)


CUT = replace(SAMPLING, top_p=0.8)


@pytest.mark.parametrize(
    "hook", [CutRollouts(top=2), SpreadRollouts(), ReplayRollouts(good_above=0.5)], ids=lambda h: type(h).__name__
)
def test_completions_keep_their_support(source: RolloutSource, hook: RolloutHook) -> None:
    """Cut, continued, replaced or replayed: the engine's log-probs are the policy's over it."""
    for seed in (7, 8):
        sampled = source.draw(PROMPTS, COLUMNS, range(4), hook.before(replace(CUT, seed=seed)))
        sampled = hook.after(sampled, replace(CUT, seed=seed), source, {}, seed)
    check(sampled)
    assert sampled.rollouts.support is not None
    completions = select(sampled.rollouts, range(len(sampled)))
    found = measure(source.policy, completions, temperature=1.0, budget=200, tick=no_tick)
    torch.testing.assert_close(found.logp, completions.rollout_logp, atol=2e-5, rtol=0)
    if isinstance(hook, ReplayRollouts):
        assert any(sampled.marks["replayed"])
    plain = draw(source, RolloutHook()).rollouts
    with pytest.raises(EapoError, match="support: expected one of all completions or of none, got one of some"):
        sampled.rollouts.concat(plain)


def test_t1_keeps_the_best_and_the_worst(source: RolloutSource) -> None:
    hook = OversampledRollouts(oversample=3, hotter=1.5)
    assert hook.before(SAMPLING) == replace(SAMPLING, responses=12, temperature=1.5)
    sampled = draw(source, hook)
    result = hook.after(sampled, SAMPLING, source, {}, 0)
    check(result)
    for before, after in zip(sampled.groups(), result.groups(), strict=True):
        ordered = sorted(sampled.scores.total[before].tolist())
        assert sorted(result.scores.total[after].tolist()) == ordered[:2] + ordered[-2:]


def test_spear_replays_good_completions_against_the_median(source: RolloutSource) -> None:
    hook = ReplayRollouts(buffer=3, good_above=0.5, replayed_share=0.25)
    first = hook.after(draw(source, hook), SAMPLING, source, {}, 0)
    assert len(first) == 16
    assert not first.marks
    good = [i for i in range(16) if source.advantages(first)[i] > 0.5]
    assert [completion.texts[0] for completion in hook.completions] == [first.texts[i] for i in good][-3:]
    median = float(first.scores.total.median()) if len(first) % 2 else float(first.scores.total.sort().values[7:9].mean())
    fresh = draw(source, hook, seed=8)
    second = hook.after(fresh, SAMPLING, source, {}, 1)
    check(second)
    old = [i for i, flag in enumerate(second.marks["replayed"]) if flag]
    assert old == list(range(16, 16 + len(old)))
    assert 0 < len(old) <= 3
    assert second.advantages is not None
    torch.testing.assert_close(second.advantages[old], second.scores.total[old] - median)
    torch.testing.assert_close(second.advantages[:16], source.advantages(fresh))
    assert set(second.unmarked()) == set(range(16))
    assert len({second.group_ids[i] for i in old} - set(fresh.group_ids)) == len(old)
    assert len(hook.rewards) == 32
