"""Runs on the trainer's public parts: sample, check, weigh, update, and evaluate now and then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eapo_kernels import Method, make_controller
from eapo_kernels.objectives.controllers import Controller
from trainer.errors import DivergenceError
from trainer.learning.experience import weigh
from trainer.learning.learner import Learner
from trainer.learning.measure import measure, recorded
from trainer.models.policy import Policy, load_policy
from trainer.records import Rollouts, Sampling, derive_seed
from trainer.rollouts.engines import RolloutEngine, make_engine

from .arms import SAMPLES, Job, Size
from .task import Answer, Question, all_questions, right_answer

SAMPLE, UPDATE, WEIGHT, EVALUATE = 1, 2, 3, 4
AVERAGED = 10
"""Steps behind one point of a curve."""


def run(job: Job, size: Size, model: Path) -> dict[str, Any]:
    """Train one run to its end.

    Returns:
        The job's fields; ``curves``: reward, entropy (nats a token) and weight of the right answers, means over ``AVERAGED``
        steps; ``evaluations``: a table for each; ``diverged``: the step at which a loss was not finite, or None; ``seconds``.
    """
    started = time.perf_counter()
    config = job.config(size, model)
    policy = load_policy(config.model, config.lora, seed=0)
    engine, method = make_engine(config, policy), config.method()
    learner = Learner(policy, method, config.optim, temperature=1.0, steps=job.steps)
    controller = make_controller(method)
    questions, held_out = all_questions(held_out=False), all_questions(held_out=True)[: size.questions]
    order = np.random.default_rng(job.seed).permutation(len(questions))
    groups = torch.arange(size.prompts).repeat_interleave(size.responses)
    steps: list[tuple[float, float, float]] = []
    evaluations, diverged = [], None
    for step in range(job.steps + 1):
        engine.sync_weights(policy)
        if step % size.every == 0 or step == job.steps:
            evaluations.append(
                {
                    "step": step,
                    **evaluate(policy, engine, config.rollout.sampling(SAMPLES, derive_seed(job.seed, EVALUATE)), held_out),
                }
            )
        if step == job.steps:
            break
        # New questions in every step, until all have been asked once.
        asked = [questions[order[(step * size.prompts + i) % len(order)]] for i in range(size.prompts)]
        rollouts, right = sample(
            policy, engine, asked, config.rollout.sampling(size.responses, derive_seed(job.seed, SAMPLE, step))
        )
        rewards = torch.tensor([float(answer is not None) for answer in right])
        old = recorded(rollouts, method, config.optim, {}, policy.device) or measure(
            policy, rollouts, temperature=1.0, budget=config.optim.micro_batch_tokens, tick=_no_tick
        )
        experience = weigh(
            method, rollouts, rewards, groups, old, controller=controller,
            progress=step / job.steps, seed=derive_seed(job.seed, WEIGHT, step),
        )  # fmt: skip
        try:
            learner.update(experience, step=step, seed=derive_seed(job.seed, UPDATE, step), tick=_no_tick)
        except DivergenceError:
            diverged = step
            break
        steps.append((float(rewards.mean()), float(old.entropy.mean()), positive_weight(method, controller)))
    engine.close()
    points = [np.mean(steps[i : i + AVERAGED], axis=0) for i in range(0, len(steps), AVERAGED)]
    curves = {name: [float(point[i]) for point in points] for i, name in enumerate(("reward", "entropy", "weight"))}
    return {
        "arm": job.arm, "lr": job.lr, "seed": job.seed, "steps": job.steps, "positive_weight": job.weight,
        "curves": curves, "evaluations": evaluations, "diverged": diverged, "seconds": time.perf_counter() - started,
    }  # fmt: skip


def positive_weight(method: Method, controller: Controller | None) -> float:
    """The weight of the right answers in the present step."""
    if controller is not None:
        return float(controller.metrics()["eapo/positive_weight"])
    return 1.0 if method.positive_weight is None else float(method.positive_weight)


def sample(
    policy: Policy, engine: RolloutEngine, asked: Sequence[Question], sampling: Sampling
) -> tuple[Rollouts, list[Answer | None]]:
    """Completions of the questions, and the right answer that each is, if it is one."""
    prompts = [policy.tokenizer.encode(str(question), add_special_tokens=False) for question in asked]
    rollouts = engine.generate(prompts, sampling, _no_tick)
    texts = policy.tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True)
    repeated = [question for question in asked for _ in range(sampling.responses)]
    found = zip(repeated, texts, rollouts.truncated, strict=True)
    return rollouts, [None if cut else right_answer(question, text.replace(" ", "")) for question, text, cut in found]


def evaluate(policy: Policy, engine: RolloutEngine, sampling: Sampling, held_out: Sequence[Question]) -> dict[str, float]:
    """Means over held-out questions."""
    rollouts, right = sample(policy, engine, held_out, sampling)
    each = [right[i : i + SAMPLES] for i in range(0, len(right), SAMPLES)]
    entropy = torch.cat(rollouts.entropy).mean() if rollouts.entropy else torch.tensor(torch.nan)
    correct = [sum(answer is not None for answer in answers) for answers in each]
    return {
        "pass@1": float(np.mean([n / SAMPLES for n in correct])),
        f"pass@{SAMPLES}": float(np.mean([n > 0 for n in correct])),
        "distinct_right": float(np.mean([len({answer for answer in answers if answer}) for answers in each])),
        "entropy": float(entropy),
        "ended": 1 - float(np.mean(rollouts.truncated)),
    }


def _no_tick(done: int, total: int) -> None:
    """Nothing interrupts a run: it is repeated from its start."""
