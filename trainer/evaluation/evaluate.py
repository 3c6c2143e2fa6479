"""Evaluation on fixed prompts with a fixed seed: quality, diversity and entropy, one value a
prompt. In a run, and as the command ``python -m trainer eval``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from eapo_kernels import EapoError

from .. import ranks
from ..config import Config
from ..dataset import PromptSet, load_prompts
from ..errors import ConfigError, Interrupted, TrainerError, check
from ..learning.measure import measure
from ..models.limits import check_prompts
from ..models.policy import Policy
from ..records import derive_seed
from ..rewards.builtin import Similarity
from ..rewards.scoring import Rewards
from ..rollouts.engines import make_engine
from ..rollouts.source import RolloutSource
from ..runs.console import Console
from ..runs.locate import step_of
from ..runs.rundir import RunDirectory
from ..runs.saved import load_saved
from .diversity import Estimate, bootstrap, dispersion, distinct, pass_at_k

EVALUATION_SEED = 1_000_003
"""Larger than any step number, so that no evaluation shares random numbers with a step."""
HEADLINE = ("entropy", "distinct_2", "dispersion", "truncated")


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

    def estimates(self) -> dict[str, Estimate]:
        """Mean over prompts with a bootstrap interval, for every metric."""
        return {name: bootstrap(known(column)) for name, column in self.values.items()}

    def metrics(self) -> dict[str, float]:
        """Mean over prompts of every metric that any prompt has, under the names of trackers."""
        found = {f"evaluation/{self.dataset}/{name}": estimate.mean for name, estimate in self.estimates().items()}
        return {name: mean for name, mean in found.items() if not math.isnan(mean)}

    def headline(self) -> str:
        """Reward, entropy and diversity in one line."""
        found = self.estimates()
        passed = [name for name in found if name.startswith("pass@")][-1:]
        others = "  ".join(f"{name} {found[name].mean:.3f}" for name in (*passed, *HEADLINE) if name in found)
        return f"reward {found['reward']}  {others}"

    def __str__(self) -> str:
        each = "a greedy completion" if self.greedy else f"{self.responses} completions"
        return f"{len(self.values['reward'])} {self.dataset} prompts, {each} each"


def known(column: Sequence[float | None]) -> list[float]:
    """A column with NaN for None, which stands for NaN in JSON."""
    return [math.nan if value is None else value for value in column]


def difference(before: Evaluation, after: Evaluation, metric: str) -> Estimate:
    """After minus before, paired by prompt."""
    pairs = zip(known(before.values[metric]), known(after.values[metric]), strict=True)
    return bootstrap([b - a for a, b in pairs])


def evaluation_table(evaluations: Sequence[Evaluation], *, after_step: bool = True) -> str:
    """The first and the last of evaluations of a run on the same prompts and the change, or a single one.
    after_step: whether its step is known.
    """
    before, after = evaluations[0], evaluations[-1]
    first, last = before.estimates(), after.estimates()
    if before is after:
        header = [f"{after}, after step {after.step}" if after_step else str(after), "mean [95 % interval]"]
        return markdown_table(header, [[name, str(found)] for name, found in last.items()])
    header = [f"{after}, mean [95 % interval]", f"step {before.step}", f"step {after.step}", "change"]
    both = [name for name in first if name in last]  # pass@k is measured only where all rewards are 0 or 1
    rows = [[name, str(first[name]), str(last[name]), str(difference(before, after, name))] for name in both]
    return markdown_table(header, rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join("-" * width for width in widths), *lines[1:]])


class Evaluator:
    """Evaluates the policy of a run on its sets of prompts, with the sampling of ``rollout``.

    Args:
        sets: dataset -> its encoded prompts; None or none are left out.
    """

    def __init__(
        self, config: Config, policy: Policy, source: RolloutSource, sets: Mapping[str, PromptSet | None], run: RunDirectory
    ) -> None:
        self.config, self.policy, self.source, self.run, self.console = config, policy, source, run, source.console
        self.sets = {name: prompts for name, prompts in sets.items() if prompts}
        self.embedding = next((f.embedding for f in source.rewards.functions.values() if isinstance(f, Similarity)), None)
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
            self.console.line(f"after step {step}, {name} prompts: {result.headline()}")
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
        sentence embeddings. Ranks share the generation, the rewards and the forward passes.

        Raises:
            TrainerError: on all ranks; a failed reward only with ``rewards.on_failure`` "stop".
        """
        with self.embedding.keeping() if self.embedding else nullcontext():
            return self._evaluate(dataset, step)

    def _evaluate(self, dataset: str, step: int) -> tuple[Evaluation, list[dict[str, Any]]]:
        config, policy, console, prompts = self.config, self.policy, self.console, self.sets[dataset]
        sampling, k = self.sampling, self.sampling.responses
        title = f"evaluation on {dataset} prompts"
        sampled = self.source.sample(prompts, range(len(prompts)), sampling, f"{title}: ")
        rollouts, texts, scores = sampled.rollouts, sampled.texts, sampled.scores
        entropies = rollouts.entropy
        if entropies is None:  # of an engine that has none, or of whole vocabularies where it had filters
            with console.phase(f"{title}: entropy") as tick:
                budget = config.optim.micro_batch_tokens
                found = measure(policy, rollouts, temperature=sampling.temperature, budget=budget, tick=tick)
                entropies = list(found.entropy.cpu().split(list(map(len, rollouts.completion_ids))))
        verified = bool(((scores.total == 0) | (scores.total == 1) | scores.total.isnan()).all())
        values: dict[str, list[float | None]] = {}
        with console.phase(f"{title}: diversity") as tick:
            for start in range(0, len(texts), k):
                tick(start, len(texts))
                own = slice(start, start + k)
                valid = [total for total in scores.total[own].tolist() if not math.isnan(total)]
                row = {
                    "reward": sum(valid) / len(valid) if valid else math.nan,
                    "entropy": torch.cat(entropies[own]).mean().item(),
                    "length": sum(map(len, rollouts.completion_ids[own])) / k,
                    "truncated": sum(rollouts.truncated[own]) / k,
                }
                if k > 1:
                    row["reward_best"] = max(valid, default=math.nan)
                    row |= {f"distinct_{n}": distinct(texts[own], n) for n in (1, 2)}
                if k > 1 and self.embedding:
                    row["dispersion"] = dispersion(self.embedding(texts[own]))
                if verified:
                    row |= {f"pass@{2**i}": pass_at_k(valid, 2**i) for i in range(k.bit_length())}
                for name, value in row.items():
                    values.setdefault(name, []).append(value)
        samples = [
            {"step": step, "dataset": dataset, "prompt": prompt, "completion": text, "answer": answer, "reward": reward}
            for prompt, answer, text, reward in zip(
                sampled.columns["prompt"], sampled.columns["answer"], texts, scores.total.tolist(), strict=True
            )
        ]
        return Evaluation(dataset, step, values, k, config.eval.greedy), samples


def evaluate_model(config: Config, checkpoint: Path | None = None) -> bool:
    """Evaluate ``config.model`` without training, print a table for each set of prompts and write
    the values to a run directory of their own. Returns False when interrupted.

    Args:
        checkpoint: of a run with this configuration; its weights are loaded into the model first.
            Without one no new adapters are added, because they would not change the model.

    Raises:
        TrainerError: bad configuration, data, model, rewards or checkpoint.
    """
    if not checkpoint:
        config = config.replace(lora={"rank": 0})
    data, train_prompts = config.data, config.eval.train_prompts
    check(bool(data.eval or train_prompts), "data.eval", "prompts, or eval.train_prompts of at least 1", data.eval)
    try:
        with ranks.init_distributed(config.model.device), Console(config.log.heartbeat) as console:
            found = {"held-out": load_prompts(data, "eval")} if data.eval else {}
            if train_prompts:
                found["train"] = load_prompts(data, "train", train_prompts)
            run = RunDirectory(config)
            ranks.run_on_main(lambda: run.check_free(replace=config.overwrite))
            if (run.path / "metrics.jsonl").exists():
                raise ConfigError(f"name: expected another directory than that of a training run, got {run.path}")
            with console.phase(f"loading {config.model.path}"):
                policy = load_saved(config.model, config.lora, checkpoint)
                rewards = Rewards(config.rewards, cache=config.model.cache, device=policy.device)
                engine = make_engine(config, policy)
            sets = {name: prompts.encoded(policy.tokenizer, data, console.line) for name, prompts in found.items()}
            for prompts in sets.values():
                check_prompts(policy.language_model, policy.tokenizer, prompts, config.rollout.max_new_tokens, console.line)
            ranks.run_on_main(run.start)
            evaluator = Evaluator(config, policy, RolloutSource(config, policy.tokenizer, engine, rewards, console), sets, run)
            for name in sets:
                result, samples = evaluator.evaluate(name, step_of(checkpoint))
                evaluator.record(result, samples)
                console.line(f"\n{evaluation_table([result], after_step=checkpoint is not None)}")
            engine.close()
            console.line(f"\nvalues  {run.path / 'evaluations.jsonl'}")
    except Interrupted:
        return False
    return True
