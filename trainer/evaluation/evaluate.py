"""Evaluation on fixed prompts with a fixed seed: quality, diversity and entropy, one value a
prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from eapo_kernels import EapoError

from .. import ranks
from ..config import Config
from ..dataset import PromptSet
from ..errors import TrainerError
from ..learning.batching import select
from ..learning.measure import measure
from ..models.policy import Policy
from ..records import Tick, derive_seed
from ..rewards.builtin import Similarity
from ..rewards.scoring import Rewards
from ..rollouts.engines import RolloutEngine
from ..runs.console import Console
from ..runs.rundir import RunDirectory
from .diversity import Estimate, bootstrap, dispersion, distinct, ngrams, pass_at_k, self_bleu

EVALUATION_SEED = 1_000_003
"""Larger than any step number, so that no evaluation shares random numbers with a step."""
HEADLINE = ("entropy", "distinct_2", "self_bleu", "dispersion", "truncated")


@dataclass(frozen=True)
class Evaluation:
    """Values of each prompt, so that two evaluations can be compared prompt by prompt.

    Attributes:
        dataset: "held-out" or "train".
        step: training steps done before it.
        values: metric -> one number a prompt (None where there is none).
        responses: completions of each prompt.
        greedy: whether they have the most probable tokens; else they are samples.
    """

    dataset: str
    step: int
    values: dict[str, list[float | None]]
    responses: int
    greedy: bool = False

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
        passed = [name for name in found if name.startswith("pass@")][-1:]
        others = "  ".join(f"{name} {found[name].mean:.3f}" for name in (*passed, *HEADLINE) if name in found)
        return f"reward {found['reward']}  {others}"

    def __str__(self) -> str:
        each = "a greedy completion" if self.greedy else f"{self.responses} completions"
        return f"{len(self.values['reward'])} {self.dataset} prompts, {each} each"


def known(column: Sequence[float | None]) -> list[float]:
    """A column with NaN for None, which stands for NaN in JSON."""
    return [math.nan if value is None else value for value in column]


def difference(before: Evaluation, after: Evaluation, metric: str, resamples: int) -> Estimate:
    """After minus before, paired by prompt."""
    pairs = zip(known(before.values[metric]), known(after.values[metric]), strict=True)
    return bootstrap([b - a for a, b in pairs], resamples)


class Evaluator:
    """Evaluates the policy of a run on its sets of prompts, with the sampling of ``rollout``.

    Args:
        sets: dataset -> its encoded prompts; None or none are left out.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        engine: RolloutEngine,
        rewards: Rewards,
        sets: Mapping[str, PromptSet | None],
        run: RunDirectory,
        console: Console,
    ) -> None:
        self.config, self.policy, self.engine, self.rewards = config, policy, engine, rewards
        self.sets = {name: prompts for name, prompts in sets.items() if prompts}
        self.run, self.console = run, console
        self.embedding = next((f.embedding for f in rewards.functions.values() if isinstance(f, Similarity)), None)
        sampling = config.rollout.sampling(config.eval.responses, derive_seed(config.seed, EVALUATION_SEED))
        self.sampling = sampling.greedy() if config.eval.greedy else sampling
        self.seconds: float | None = None
        """What the latest evaluation of all sets took."""

    def due(self, step: int) -> bool:
        """Whether the run is evaluated after ``step`` steps."""
        own = self.config.eval
        if step in (0, self.config.steps):
            return step > 0 or own.first
        return own.every > 0 and step % own.every == 0

    def seconds_left(self, step: int, completion_seconds: float) -> float:
        """Estimated seconds of the evaluations after more than ``step`` steps: what the latest one
        took, or before the first one ``completion_seconds`` for each completion.
        """
        completions = self.sampling.responses * sum(map(len, self.sets.values()))
        each = completions * completion_seconds if self.seconds is None else self.seconds
        return each * sum(map(self.due, range(step + 1, self.config.steps + 1)))

    def __call__(self, step: int) -> list[Evaluation]:
        """Evaluate all sets after ``step`` training steps, and write the values and a completion to
        each prompt to the run. An error of the trainer or the library in a set is reported, and the set
        is left out: all ranks have it. Any other error is raised, because one rank may have it alone.
        """
        began, found = time.monotonic(), []
        for name in self.sets:
            try:
                result, samples = self.evaluate(name, step)
            except (TrainerError, EapoError) as error:
                what = f"{type(error).__name__}: {error}"
                self.console.line(f"evaluation on {name} prompts after step {step} failed, the run continues: {what}")
                continue
            found.append(result)
            self.record(result, samples[:: result.responses])
            self.console.line(f"after step {step}, {name} prompts: {result.headline(self.config.eval.resamples)}")
        self.seconds = time.monotonic() - began
        return found

    def record(self, result: Evaluation, samples: Sequence[dict[str, Any]]) -> None:
        """Append an evaluation and some of its samples to the log files of the run."""
        self.run.append("evaluations", asdict(result))
        for sample in samples:
            self.run.append("samples", sample)

    def evaluate(self, dataset: str, step: int) -> tuple[Evaluation, list[dict[str, Any]]]:
        """Sample ``eval.responses`` completions of every prompt of a set (or with ``eval.greedy``
        generate one) and measure them. Also returns them as samples.

        A failed reward is reported and left out of the mean of its prompt. Where all rewards are 0
        or 1, pass@k is measured too; with the reward similarity, also the dispersion of its
        sentence embeddings. Ranks share the generation, the rewards, the forward passes and the
        texts.

        Raises:
            TrainerError: on all ranks; a failed reward only with ``rewards.on_failure`` "stop".
        """
        with self.embedding.keeping() if self.embedding else nullcontext():
            return self._evaluate(dataset, step)

    def _evaluate(self, dataset: str, step: int) -> tuple[Evaluation, list[dict[str, Any]]]:
        config, policy, console, prompts = self.config, self.policy, self.console, self.sets[dataset]
        sampling, k, indices = self.sampling, self.sampling.responses, range(len(prompts))
        title = f"evaluation on {dataset} prompts"
        with console.phase(f"{title}: completions", alone=True) as tick:
            rollouts = self.engine.generate(prompts.ids, sampling, tick)
        texts = [policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in rollouts.completion_ids]
        with console.phase(f"{title}: rewards", alone=True) as tick:
            scores = self.rewards.score(prompts.columns(indices, k), texts, rollouts.completion_ids, tick)
        for line in scores.failure_lines():
            console.line(line)
        entropies = rollouts.entropy
        if entropies is None:  # of an engine that has none, or of whole vocabularies where it had filters
            with console.phase(f"{title}: entropy") as tick:
                completions, budget = select(rollouts, range(len(texts))), config.optim.micro_batch_tokens
                found = measure(policy, completions, temperature=sampling.temperature, budget=budget, tick=tick)
                entropies = list(found.entropy.cpu().split(list(map(len, rollouts.completion_ids))))
        groups = [slice(q * k, (q + 1) * k) for q in indices]
        verified = bool(((scores.total == 0) | (scores.total == 1) | scores.total.isnan()).all())
        with console.phase(f"{title}: diversity", alone=True) as tick:
            diversity = self._diversity([texts[own] for own in groups], tick) if k > 1 else [{} for _ in groups]
        values: dict[str, list[float | None]] = {}
        for own, varied in zip(groups, diversity, strict=True):
            valid = [total for total in scores.total[own].tolist() if not math.isnan(total)]
            row = {
                "reward": sum(valid) / len(valid) if valid else math.nan,
                **({"reward_best": max(valid, default=math.nan)} if k > 1 else {}),
                **varied,
                "entropy": torch.cat(entropies[own]).mean().item(),
                "length": sum(map(len, rollouts.completion_ids[own])) / k,
                "truncated": sum(rollouts.truncated[own]) / k,
                **({f"pass@{2**i}": pass_at_k(valid, 2**i) for i in range(k.bit_length())} if verified else {}),
            }
            for name, value in row.items():
                values.setdefault(name, []).append(value)
        asked = (row["prompt"] for row in prompts.rows for _ in range(k))
        samples = [
            {"step": step, "dataset": dataset, "prompt": prompt, "completion": text, "reward": reward}
            for prompt, text, reward in zip(asked, texts, scores.total.tolist(), strict=True)
        ]
        return Evaluation(dataset, step, values, k, config.eval.greedy), samples

    def _diversity(self, groups: Sequence[Sequence[str]], tick: Tick) -> list[dict[str, float]]:
        """Measures of the completions of each prompt; each rank computes those of some prompts, as
        with rewards.
        """
        own = range(ranks.rank(), len(groups), ranks.size())

        def measured() -> list[dict[str, float]]:
            rows = []
            texts = [text for q in own for text in groups[q]]
            vectors = self.embedding(texts).split(len(groups[0])) if self.embedding and texts else ()
            for number, q in enumerate(own):
                tick(number, len(own))
                grams = ngrams(groups[q], 4)
                row = {"distinct_1": distinct(grams[0]), "distinct_2": distinct(grams[1]), "self_bleu": self_bleu(grams)}
                rows.append(row | ({"dispersion": dispersion(vectors[number])} if vectors else {}))
            return rows

        shares = ranks.all_gather(measured)
        return [shares[q % ranks.size()][q // ranks.size()] for q in range(len(groups))]
