"""Evaluation on fixed prompts with a fixed seed: quality, diversity and entropy, one value a
prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..dataset import PromptSet, encode_prompt
from ..learning.batching import select
from ..learning.measure import measure
from ..models.embedding import SentenceEmbedding
from ..models.policy import Policy
from ..records import derive_seed
from ..rewards.builtin import Similarity
from ..rewards.scoring import Rewards
from ..rollouts.engines import RolloutEngine
from ..runs.console import Console
from .diversity import Estimate, bootstrap, dispersion, distinct_n, pass_at_k, self_bleu

EVALUATION_SEED = 1_000_003
"""Larger than any step number, so that no evaluation shares random numbers with a step."""


@dataclass(frozen=True)
class Evaluation:
    """Values of each prompt, so that two evaluations can be compared prompt by prompt.

    Attributes:
        dataset: "held-out" or "train".
        step: training steps done before it.
        values: metric -> one number a prompt (None where there is none).
        responses: completions of each prompt.
    """

    dataset: str
    step: int
    values: dict[str, list[float | None]]
    responses: int

    def estimates(self, resamples: int) -> dict[str, Estimate]:
        """Mean over prompts with a bootstrap interval, for every metric."""
        return {name: bootstrap(known(column), resamples) for name, column in self.values.items()}

    def metrics(self) -> dict[str, float]:
        """Mean over prompts of every metric that any prompt has, under the names of trackers."""
        columns = {name: [value for value in known(column) if not math.isnan(value)] for name, column in self.values.items()}
        return {f"evaluation/{self.dataset}/{name}": sum(found) / len(found) for name, found in columns.items() if found}

    def headline(self, resamples: int) -> str:
        """Reward, entropy and diversity in one line."""
        found = self.estimates(resamples)
        others = "  ".join(
            f"{name} {found[name].mean:.3f}" for name in ("entropy", "distinct_2", "self_bleu", "dispersion") if name in found
        )
        return f"reward {found['reward']}  {others}"


def known(column: Sequence[float | None]) -> list[float]:
    """A column with NaN for None, which stands for NaN in JSON."""
    return [math.nan if value is None else value for value in column]


def difference(before: Evaluation, after: Evaluation, metric: str, resamples: int) -> Estimate:
    """After minus before, paired by prompt."""
    pairs = zip(known(before.values[metric]), known(after.values[metric]), strict=True)
    return bootstrap([b - a for a, b in pairs], resamples)


def evaluate(
    config: Config,
    policy: Policy,
    engine: RolloutEngine,
    rewards: Rewards,
    prompt_set: PromptSet,
    *,
    dataset: str,
    step: int,
    console: Console,
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Sample ``eval.responses`` completions of every prompt and measure them. Also returns them as
    samples.

    A failed reward is reported and left out of the mean of its prompt; it ends an evaluation only
    with ``rewards.on_failure`` "stop". Where all rewards are 0 or 1, pass@k is measured too; with
    the reward similarity, also the dispersion of its sentence embeddings.
    """
    k, indices = config.eval.responses, range(len(prompt_set))
    prompts = [encode_prompt(row["prompt"], policy.tokenizer, config.data) for row in prompt_set.rows]
    sampling = config.rollout.sampling(k, derive_seed(config.seed, EVALUATION_SEED))
    title = f"evaluation on {dataset} prompts"
    with console.phase(f"{title}: completions", alone=True) as tick:
        rollouts = engine.generate(prompts, sampling, tick)
    texts = [policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in rollouts.completion_ids]
    with console.phase(f"{title}: rewards", alone=True) as tick:
        scores = rewards.score(prompt_set.columns(indices, k), texts, rollouts.completion_ids, tick)
    for line in scores.failure_lines():
        console.line(line)
    with console.phase(f"{title}: entropy") as tick:
        completions = select(rollouts, range(len(texts)))
        budget = config.optim.micro_batch_tokens
        entropy = measure(policy, completions, temperature=sampling.temperature, budget=budget, tick=tick).entropy.cpu()
    embedding = _embedding(rewards)
    verified = bool(((scores.total == 0) | (scores.total == 1) | scores.total.isnan()).all())
    values: dict[str, list[float | None]] = {}
    for q in indices:
        own = slice(q * k, (q + 1) * k)
        valid = [total for total in scores.total[own].tolist() if not math.isnan(total)]
        row = {
            "reward": sum(valid) / len(valid) if valid else math.nan,
            "reward_best": max(valid, default=math.nan),
            "distinct_1": distinct_n(texts[own], 1),
            "distinct_2": distinct_n(texts[own], 2),
            "self_bleu": self_bleu(texts[own]),
            "entropy": entropy[completions.starts[own.start] : completions.starts[own.stop]].mean().item(),
            "length": sum(map(len, rollouts.completion_ids[own])) / k,
            "truncated": sum(rollouts.truncated[own]) / k,
            **({"dispersion": dispersion(embedding(texts[own]))} if embedding else {}),
            **({f"pass@{n}": pass_at_k(valid, n) for n in _powers_of_two(k)} if verified else {}),
        }
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    asked = (row["prompt"] for row in prompt_set.rows for _ in range(k))
    samples = [
        {"step": step, "dataset": dataset, "prompt": prompt, "completion": text, "reward": reward}
        for prompt, text, reward in zip(asked, texts, scores.total.tolist(), strict=True)
    ]
    return Evaluation(dataset, step, values, k), samples


def _embedding(rewards: Rewards) -> SentenceEmbedding | None:
    return next((f.embedding for f in rewards.functions.values() if isinstance(f, Similarity)), None)


def _powers_of_two(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]
