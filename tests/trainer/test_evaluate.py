"""Metrics of an evaluation, the samples that are kept, and the command ``eval``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import raised_by
from torch import Tensor
from torch.nn.functional import normalize

from trainer.__main__ import main
from trainer.config import Config
from trainer.config.settings import parse_config
from trainer.dataset import PromptSet, load_prompts
from trainer.evaluation.evaluate import Evaluation, Evaluator
from trainer.loop import train
from trainer.models.policy import Policy
from trainer.rewards.builtin import Similarity
from trainer.rewards.scoring import Rewards
from trainer.rollouts.source import RolloutSource
from trainer.rollouts.transformers_engine import TransformersEngine
from trainer.runs.console import Console
from trainer.runs.rundir import RunDirectory, read

Change = Callable[..., Config]


def _prompts(config: Config, policy: Policy, count: int) -> PromptSet:
    return load_prompts(config.data, "train", count).encoded(policy.tokenizer, config.data)


def _evaluate(config: Config, policy: Policy, rewards: Rewards) -> tuple[Evaluation, list[dict[str, Any]]]:
    sets = {"train": _prompts(config, policy, 3), "held-out": None}
    source = RolloutSource(config, policy.tokenizer, TransformersEngine(policy, batch=64), rewards, Console())
    return Evaluator(config, policy, source, sets, RunDirectory(config)).evaluate("train", step=0)


def test_rewards_of_0_and_1_give_pass_at_k(policy: Policy, changed: Change) -> None:
    config = changed(rewards={"functions": ("reward_functions:has_a_low_number",)}, eval={"responses": 5})
    found, samples = _evaluate(config, policy, Rewards(config.rewards, cache="", device=policy.device))
    assert {name for name in found.values if name.startswith("pass")} == {"pass@1", "pass@2", "pass@4"}
    assert found.values["pass@1"] == pytest.approx(found.values["reward"])
    pairs = list(combinations([sample["reward"] for sample in samples[:5]], 2))
    assert found.values["pass@2"][0] == pytest.approx(sum(map(max, pairs)) / 10)
    assert found.estimates()["pass@4"].mean >= found.estimates()["pass@1"].mean


def test_graded_rewards_give_no_pass_at_k_and_similarity_gives_dispersion(policy: Policy, config: Config) -> None:
    class Embedding:
        keeping = staticmethod(nullcontext)

        def __call__(self, texts: list[str]) -> Tensor:
            return normalize(torch.tensor([[float(len(text)), 1.0 + text.count("n1")] for text in texts]), dim=-1)

    embedding = Embedding()
    rewards = Rewards(config.rewards, cache="", device=policy.device)
    assert "dispersion" not in _evaluate(config, policy, rewards)[0].values
    rewards.functions = {"similarity": Similarity(embedding, share=0.5)}  # type: ignore[arg-type]
    found, samples = _evaluate(config, policy, rewards)
    assert not any(name.startswith("pass") for name in found.values)
    vectors = embedding([sample["completion"] for sample in samples[:3]])
    cosines = [float(a @ b) for a, b in combinations(vectors, 2)]
    assert found.values["dispersion"][0] == pytest.approx(1 - sum(cosines) / 3, abs=1e-6)


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9, "temperature": 0.7}], ids=str)
def test_greedy_completions_have_the_most_probable_tokens(policy: Policy, changed: Change, cut: dict[str, float]) -> None:
    config = changed(eval={"greedy": True}, rollout=cut, rewards={"functions": ("reward_functions:has_a_low_number",)})
    found, samples = _evaluate(config, policy, Rewards(config.rewards, cache="", device=policy.device))
    assert found.values.keys() == {"reward", "pass@1", "entropy", "length", "truncated"}
    assert str(found) == "3 train prompts, a greedy completion each"
    assert min(found.values["entropy"]) > 1, "nats, of the whole vocabulary"
    prompts = _prompts(config, policy, 3)
    assert [sample["answer"] for sample in samples] == [row["answer"] for row in prompts.rows]
    for ids, sample in zip(prompts.ids, samples, strict=True):
        ids = list(ids)
        for _ in range(config.rollout.max_new_tokens):
            token = int(policy.language_model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
            if token in policy.eos_ids:
                break
        assert policy.tokenizer.decode(ids, skip_special_tokens=True).endswith(sample["completion"])
        assert sample["completion"]


@pytest.mark.parametrize(("own", "steps"), [
    ({}, [0, 7]), ({"first": False}, [7]), ({"every": 3}, [0, 3, 6, 7]), ({"every": 7, "first": False}, [7]),
])  # fmt: skip
def test_evaluations_are_due_and_forecast(policy: Policy, changed: Change, own: dict[str, Any], steps: list[int]) -> None:
    config = changed(steps=7, eval=own)
    sets = {"train": _prompts(config, policy, 3), "held-out": _prompts(config, policy, 2)}
    rewards, run = Rewards(config.rewards, cache="", device=policy.device), RunDirectory(config)
    source = RolloutSource(config, policy.tokenizer, TransformersEngine(policy, 64), rewards, Console())
    evaluator = Evaluator(config, policy, source, sets, run)
    assert [step for step in range(8) if evaluator.due(step)] == steps
    left = sum(step > 1 for step in steps)
    assert evaluator.seconds_left(1, completion_seconds=0.5) == left * 5 * 3 * 0.5  # prompts, completions to each
    run.start()
    evaluator(0)
    assert evaluator.seconds_left(1, completion_seconds=1e9) == left * evaluator.seconds, "the measured time"


def test_a_failed_evaluation_costs_only_itself(
    changed: Change, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reward fails on the held-out prompts alone, and a failed reward is to stop the run."""
    rewards = {"functions": ("reward_functions:raises_for_number_1",), "on_failure": "stop"}
    lines = prompts.read_text().splitlines(keepends=True)
    for name, kept in (("train", lines[2:6]), ("held_out", lines[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(kept))
    data = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "held_out.jsonl")}
    config = changed(steps=2, rewards=rewards, data=data, eval={"train_prompts": 2})
    assert train(config)
    rows = read(Path(config.out) / config.name, "evaluations")
    assert [(row["dataset"], row["step"]) for row in rows] == [("train", 0), ("train", 2)]
    assert len(read(Path(config.out) / config.name, "metrics")) == 2
    out = capsys.readouterr().out
    assert "evaluation on held-out prompts after step 0 failed, the run continues: RewardError: reward reward_functions:" in out


def test_another_error_of_an_evaluation_ends_the_run_and_costs_no_step(changed: Change) -> None:
    """As on several ranks, of which one may have it alone. The evaluation is repeated at the resume."""
    config = changed(steps=3, eval={"every": 2}, data={"eval_limit": 1})
    with (
        raised_by("trainer.evaluation.evaluate.distinct", 3, torch.OutOfMemoryError("tried to allocate")),
        pytest.raises(torch.OutOfMemoryError) as caught,
    ):
        train(config)
    (note,) = caught.value.__notes__
    assert "to continue from step-000002: python -m trainer train" in note
    assert train(config.replace(resume="auto"))
    assert [row["step"] for row in read(Path(config.out) / config.name, "evaluations")] == [0, 2, 3]


def test_the_best_and_the_worst_completion_of_every_step_are_kept(changed: Change) -> None:
    config = changed(samples_per_step=3, data={"eval": ""})
    everything = changed(name="all", samples_per_step=100, data={"eval": ""})
    assert train(config)
    assert train(everything)
    for step in (1, 2, 3):
        kept, ranked = (
            [row["reward"] for row in read(Path(run.out) / run.name, "samples") if row["step"] == step]
            for run in (config, everything)
        )
        assert len(ranked) == 12
        assert kept == [max(ranked), min(ranked), sorted(ranked)[-2]]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_is_evaluated_by_its_model_or_by_a_checkpoint(
    changed: Change, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    config = changed(eval={"every": 1}, checkpoint={"every": 1, "keep": 2}, lora={"rank": rank})
    assert train(config)
    run = Path(config.out) / config.name
    seen = {row["step"]: row["values"] for row in read(run, "evaluations")}
    assert seen[2] != seen[3]
    checkpoints = run / "checkpoints"
    for source, name, step in (
        (run, "tiny-eval", 0),
        (checkpoints / "step-000003", "tiny-eval-step-000003", 3),
        (checkpoints / "step-000002", "tiny-eval-step-000002", 2),
    ):
        for _ in range(2):  # again, too
            assert main(["eval", "--run", str(source)]) == 0
        (row,) = read(run.parent / name, "evaluations")
        recorded = parse_config([], recipe=run.parent / name / "config.toml")
        assert recorded.lora.rank == (rank if step else 0), "the saved model has its adapters"
        assert row["values"] == seen[step or 3]
        assert row["step"] == step
    capsys.readouterr()
    for arguments, message in (
        ([str(checkpoints / "step-000001")], r"one of its checkpoints .*there are step-000002, step-000003\), got .*000001$"),
        ([str(run), "--config", "x.toml"], "--config: expected nothing together with --run"),
        ([str(run / "nowhere")], "run: expected a run with a saved model, .*, got .*nowhere$"),
    ):
        assert main(["eval", "--run", *arguments]) == 2
        assert re.search(message, capsys.readouterr().err.strip())
    shutil.rmtree(run / "model")
    assert main(["eval", "--run", str(run)]) == 2
    assert "run: expected a run with a saved model" in capsys.readouterr().err
