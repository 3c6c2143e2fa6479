"""The first half of a step: the engine samples completions and the rewards score them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from ..config import Config
from ..dataset import PromptSet
from ..errors import ConfigError
from ..records import Sampling, ScoredRollouts
from ..rewards.scoring import Rewards, overlong_penalty
from ..runs.console import Console
from .engines import RolloutEngine

SHOWN = 3
"""Failures that are printed for each call."""


@dataclass
class RolloutSource:
    """Samples and scores completions, and reports failures, whose scores are NaN."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    engine: RolloutEngine
    rewards: Rewards
    console: Console

    def sample(self, prompts: PromptSet, group_ids: Sequence[int], sampling: Sampling, name: str = "") -> ScoredRollouts:
        """``sampling.responses`` completions of every prompt and their rewards. group_ids: one for each
        prompt. name: of the phases, before their own.
        """
        with self.console.phase(f"{name}rollouts", alone=True) as tick:
            rollouts = self.engine.generate(prompts.ids, sampling, tick)
        texts = self.tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True)
        columns = prompts.columns(sampling.responses)
        with self.console.phase(f"{name}rewards", alone=True) as tick:
            scores = self.rewards.score(columns, texts, rollouts.completion_ids, tick)
        for failure in scores.failures[:SHOWN]:
            self.console.line(f"left out: {failure}")
        if (more := len(scores.failures) - SHOWN) > 0:
            self.console.line(f"left out: ... and {more} more failures")
        return ScoredRollouts(rollouts, texts, columns, scores, [i for i in group_ids for _ in range(sampling.responses)])

    def draw(self, prompts: PromptSet, group_ids: Sequence[int], sampling: Sampling) -> ScoredRollouts:
        """``sample`` for training: with the penalty on long completions, and rewards that the method can
        use.

        Raises:
            ConfigError: it takes rewards of 0 or 1, and there are others.
        """
        sampled, own = self.sample(prompts, group_ids, sampling), self.config.rewards
        scores = sampled.scores
        if own.overlong == "penalty":
            lengths = [len(ids) for ids in sampled.rollouts.completion_ids]
            penalty = overlong_penalty(lengths, self.config.rollout.max_new_tokens, own.overlong_window)
            scores = replace(scores, total=scores.total + penalty, parts={**scores.parts, "overlong": penalty.tolist()})
        graded = scores.total[(scores.total != 0) & (scores.total != 1) & ~scores.total.isnan()]
        if len(graded) and self.config.method().config.advantage == "binary":
            method, got = self.config.loss.method, f"{graded[0]:.3g} from {', '.join(scores.parts)}"
            raise ConfigError(f"rewards.functions: expected rewards of 0 or 1 with method {method!r}, got {got}")
        return replace(sampled, scores=scores)

    def resample(
        self, sampled: ScoredRollouts, sampling: Sampling, rounds: int, seed: int, next_prompts: Callable[[], PromptSet]
    ) -> ScoredRollouts:
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
            prompts = next_prompts()
            more = self.draw(prompts, range(first, first + len(prompts)), replace(sampling, seed=seed + number))
            first += len(prompts)
            result = result.concat(_with_spread(more.take(more.fully_scored()), missing))
        return result if len(result) else sampled


def _with_spread(sampled: ScoredRollouts, most: int) -> ScoredRollouts:
    """The first ``most`` groups whose rewards are not all equal."""
    return sampled.take([i for group in sampled.varied_groups()[:most] for i in group])
