"""The first half of a step: the engine samples completions and the rewards score them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..config import Config
from ..errors import ConfigError
from ..records import Sampling, ScoredRollouts
from ..rewards.scoring import Rewards, overlong_penalty
from ..runs.console import Console
from .engines import RolloutEngine


@dataclass
class RolloutSource:
    """Samples and scores the completions of a step. next_prompts: returns the next prompts of the
    sampler, as token ids and columns.
    """

    config: Config
    tokenizer: PreTrainedTokenizerBase
    engine: RolloutEngine
    rewards: Rewards
    console: Console
    next_prompts: Callable[[], tuple[list[list[int]], dict[str, list[Any]]]]

    def draw(
        self, prompts: Sequence[list[int]], columns: dict[str, list[Any]], group_ids: Sequence[int], sampling: Sampling
    ) -> ScoredRollouts:
        """Sample ``sampling.responses`` completions of every prompt and score them. Failures are
        reported and their scores are NaN. columns, group_ids: one entry for each prompt.
        """
        repeats = sampling.responses
        repeated = {name: [value for value in column for _ in range(repeats)] for name, column in columns.items()}
        groups = [group for group in group_ids for _ in range(repeats)]
        with self.console.phase("rollouts", alone=True) as tick:
            rollouts = self.engine.generate(prompts, sampling, tick)
        texts = self.tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True)
        with self.console.phase("rewards", alone=True) as tick:
            scores = self.rewards.score(repeated, texts, rollouts.completion_ids, tick)
        own = self.config.rewards
        if own.overlong == "penalty":
            lengths = [len(ids) for ids in rollouts.completion_ids]
            penalty = overlong_penalty(lengths, self.config.rollout.max_new_tokens, own.overlong_window)
            scores = scores.with_part("overlong", penalty)
        graded = scores.total[(scores.total != 0) & (scores.total != 1) & ~scores.total.isnan()]
        if len(graded) and self.config.method().config.advantage == "binary":
            method, got = self.config.loss.method, f"{graded[0]:.3g} from {', '.join(scores.parts)}"
            raise ConfigError(f"rewards.functions: expected rewards of 0 or 1 with method {method!r}, got {got}")
        for line in scores.failure_lines():
            self.console.line(f"left out: {line}")
        return ScoredRollouts(rollouts, texts, repeated, scores, groups)

    def resample(self, sampled: ScoredRollouts, sampling: Sampling, rounds: int, seed: int) -> ScoredRollouts:
        """Replace the groups whose rewards are all equal by groups of the next prompts, in at most
        ``rounds`` draws. The completions as they are if all groups are such.

        Args:
            sampled: complete groups in which all have rewards.
        """
        wanted, result = self.config.rollout.prompts, _with_spread(sampled, len(sampled))
        first = max(sampled.group_ids) + 1
        for number in range(rounds):
            missing = wanted - len(result.groups())
            if missing <= 0:
                break
            prompts, columns = self.next_prompts()
            more = self.draw(prompts, columns, range(first, first + len(prompts)), replace(sampling, seed=seed + number))
            first += len(prompts)
            result = result.concat(_with_spread(more.take(more.fully_scored()), missing))
        return result if len(result) else sampled


def _with_spread(sampled: ScoredRollouts, most: int) -> ScoredRollouts:
    """The first ``most`` groups whose rewards are not all equal."""
    return sampled.take([i for group in sampled.varied_groups()[:most] for i in group])
