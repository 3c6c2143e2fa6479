"""The training loop, from top to bottom.

Decisions, so that nobody has to find them in the code:

- One step: sample answers, score them, measure the policy on them, update. Nothing runs ahead: the answers a step
  learns from are drawn from the weights it starts with, so with one minibatch and one epoch the ratio is exactly 1.
- Log-probs, entropy and loss are those of the *sampled* distribution: at the sampling temperature, over the whole
  vocabulary. The log-probs that train come from the trainer's own forward pass; the engine's are kept, their mismatch
  is logged, and ``loss.importance_cap`` corrects for it.
- The end-of-sequence token is part of the answer and is learned; nothing after it exists. A truncated answer counts as
  it stands.
- The EAPO weight of a step comes from the mean entropy over the tokens that are about to be learned from, measured
  in the pass that also gives the old log-probs. H_0 is the first step's. The weight is applied once, inside the loss.
- A group with a failed reward is left out of the step as a whole. A step without a single whole group ends the run.
- Random numbers are functions of (seed, purpose, step): there is no generator state to keep.
- A loss or gradient norm that is not finite ends the run before the optimizer step.
- SIGINT: the phase at hand is left at its next tick (never inside an optimizer step), the model is saved and the report
  is drawn.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from .batching import select
from .config import Config
from .console import Console
from .dataset import PromptSampler, encode_prompt, load_questions
from .errors import Interrupted, RewardError
from .evaluate import evaluate
from .interrupt import StopRequest
from .learner import Experience, Learner, measure
from .metrics import reward_metrics, rollout_metrics, sample_record, whole_groups
from .policy import load_policy
from .report import summary_table, write_report
from .rewards import Rewards
from .rollouts import Sampling, derive_seed
from .rundir import RunDirectory
from .transformers_engine import TransformersEngine

ROLLOUT_SEED, UPDATE_SEED, ADAPTER_SEED = 1, 2, 3


def train(config: Config) -> bool:
    """Run ``config`` to its end. Returns False when it was interrupted.

    Raises:
        EapoError: bad configuration, data, model or rewards, or a run that diverged; see ``errors``.
    """
    with StopRequest() as stop, Console(stop) as console:
        try:
            return _train(config, console)
        except Interrupted:
            console.line("interrupted before the first step: nothing to keep")
            return False


def _train(config: Config, console: Console) -> bool:
    rollout, budget = config.rollout, config.optim.micro_batch_tokens

    train_set = load_questions(config.data.train, config.data.train_limit)
    held_out = load_questions(config.data.eval, config.data.eval_limit) if config.data.eval else None
    sampler = PromptSampler(len(train_set), rollout.prompts, config.seed)
    run = RunDirectory(config)
    console.line(f"run {run.path}: {config.loss.method}, {config.steps} steps, {len(train_set)} training questions")

    with console.phase(f"loading {config.model.path} (an embedded model is converted the first time)"):
        policy = load_policy(config.model, config.lora, seed=derive_seed(config.seed, ADAPTER_SEED))
    with console.phase("loading the rewards"):
        rewards = Rewards(config.rewards, cache=config.model.cache, device=policy.device)
    with console.phase("encoding the questions"):
        prompts = [encode_prompt(row["prompt"], policy.tokenizer, config.data) for row in train_set.rows]

    engine = TransformersEngine(policy, rollout.batch)
    method = config.loss.build(fixed_length=rollout.max_new_tokens)
    learner = Learner(policy, method, config.optim, temperature=rollout.temperature, steps=config.steps)
    controller = config.eapo.build()
    trained, weights = (sum(p.numel() for p in group) for group in (policy.trainable(), policy.parameters()))
    console.line(f"training {trained:,} of {weights:,} weights on {policy.device}")

    eval_sets = {"held-out": held_out, "train": train_set.head(config.eval.train_questions)}

    def evaluation(step: int) -> None:
        for name, questions in eval_sets.items():
            if questions:
                result, samples = evaluate(config, policy, engine, rewards, questions, dataset=name, step=step, console=console)
                run.append("evaluations", asdict(result))
                for sample in samples[:: result.responses]:
                    run.append("samples", sample)
                console.line(f"after step {step}, {name} questions: {result.headline(config.eval.resamples)}")

    step, finished = 0, False
    try:
        evaluation(step)
        while step < config.steps:
            console.seconds.clear()
            indices = sampler.next()
            columns = train_set.columns(indices, rollout.responses)

            with console.phase("rollouts") as tick:
                sampling = Sampling(
                    responses=rollout.responses,
                    max_new_tokens=rollout.max_new_tokens,
                    temperature=rollout.temperature,
                    top_p=rollout.top_p,
                    seed=derive_seed(config.seed, ROLLOUT_SEED, step),
                )
                rollouts = engine.generate([prompts[i] for i in indices], sampling, tick)
                texts = policy.tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True)

            with console.phase("rewards"):
                scores = rewards.score(columns, texts, rollouts.completion_ids)
                for line in scores.complaints():
                    console.line(f"left out: {line}")
                kept = whole_groups(scores, rollout.responses)
                if not kept:
                    raise RewardError(
                        f"step {step + 1}: expected at least one fully scored group, got none; {scores.failures[0]}"
                    )

            with console.phase("old_logp") as tick:
                answers = select(rollouts, kept)
                old = measure(policy, answers, temperature=rollout.temperature, budget=budget, tick=tick)
                weight = controller.update(old.entropy.sum(), answers.tokens)

            with console.phase("update") as tick:
                experience = Experience(
                    answers=answers,
                    rewards=scores.total[kept].to(policy.device),
                    group_ids=torch.tensor(kept, device=policy.device) // rollout.responses,
                    old=old,
                    rollout_logp=answers.rollout_logp.to(policy.device),
                    positive_weight=weight if method.controller == "entropy_ratio" else None,
                )
                seed = derive_seed(config.seed, UPDATE_SEED, step)
                learned = learner.update(experience, step=step, seed=seed, tick=tick)
                engine.sync_weights(policy)

            step += 1
            seconds = dict(console.seconds)
            metrics = {
                "step": step,
                **reward_metrics(scores, rollout.responses),
                **{name: float(value) for name, value in controller.metrics().items()},
                **learned,
                "eapo/entropy": old.entropy.mean().item(),
                **rollout_metrics(rollouts, texts, answers, old, rollout.responses),
                **{f"seconds/{name}": value for name, value in seconds.items()},
                "tokens_per_second": answers.tokens / sum(seconds.values()),
            }
            run.append("metrics", metrics)
            for i in range(min(config.samples_per_step, len(texts))):
                run.append("samples", sample_record(step, i, columns, texts, scores))
            console.step(metrics, config.steps)
            if config.eval.every and step % config.eval.every == 0 and step < config.steps:
                evaluation(step)
        evaluation(step)
        finished = True
    except Interrupted:
        console.line(f"interrupted after {step} of {config.steps} steps")
    if not step:
        return False

    policy.save(run.model)
    picture, page = write_report([run.path], run.path, resamples=config.eval.resamples)
    console.line(f"\n{summary_table(run.path, config.eval.resamples)}\n")
    console.line(f"model    {run.model}\nreport   {page}\npicture  {picture}")
    return finished
