"""The training loop, from top to bottom.

Decisions, so that nobody has to find them in the code:

- One step: sample answers, score them, measure the policy on them, update. Nothing runs ahead: the answers a step
  learns from are drawn from the weights it starts with, so with one minibatch and one epoch the ratio is exactly 1.
- Log-probs, entropy and loss are those of the *sampled* distribution: at the sampling temperature, over the whole
  vocabulary. The log-probs that train come from the trainer's own forward pass; the engine's are kept, their mismatch
  is logged, and ``loss.importance_cap`` corrects for it.
- The end-of-sequence token is part of the answer and is learned; nothing after it exists. A truncated answer counts as
  it stands.
- A step has two phases. First the policy is measured on all answers of the step, in the pass that gives the old log-probs, and
  every weight that the method gives a token is fixed there, over the whole step: EAPO's from the mean entropy (H_0 is the first
  step's), others' from covariances, quantiles or group statistics. Then the updates, on any cut of the tokens.
- A method may also change how answers are sampled (``hooks``). Metrics of rewards, lengths and diversity are about all answers
  that were drawn first, before a hook selects, replaces or adds some: a choice of them would be biased.
- A group with a failed reward is left out of the step as a whole. A step without a single whole group ends the run.
- Random numbers are functions of (seed, purpose, step); the global generators are seeded for reward functions that use them.
- A loss or gradient norm that is not finite ends the run before the optimizer step.
- SIGINT or SIGTERM: the phase at hand is left at its next tick, but an update that has begun is finished. A checkpoint and the
  model are saved and the report is drawn.
- Under torchrun (FSDP2) every rank holds all answers with all that is known of them, and only work is shared: each generates,
  scores and measures some answers and runs its part of every minibatch. What a rank alone knows goes through ``ranks`` before
  anything is decided by it, so all take the same turns, and a run is that of one process but for rounding.
- A checkpoint is the state between two steps, before any evaluation there: weights, optimizer, controller (H_0), sampler, hook,
  generators and how long the log files were. A run that goes on from it takes the files back to that length and does
  everything after it again: bit for bit the run that was never stopped (same machine, number of processes and of threads).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from eapo_kernels import make_controller

from . import ranks
from .config import Config
from .config.advice import advice, advice_on_rewards
from .dataset import PromptSampler, encode_prompt, fingerprint, load_questions
from .errors import Interrupted, RewardError
from .evaluation.evaluate import evaluate
from .evaluation.report import summary_table, write_report
from .evaluation.step_metrics import answer_metrics, best_and_worst, call_metrics, engine_metrics, reward_metrics, sample_record
from .learning.batching import Answers, select
from .learning.experience import extra_statistics, per_token, weigh
from .learning.learner import Learner
from .learning.measure import NOTHING, Measurement, Wanted, measure, wanted_by
from .models.policy import load_policy
from .models.reference import Reference
from .records import Sampling, Tick, derive_seed
from .rewards.scoring import Rewards
from .rollouts.engines import make_engine
from .rollouts.source import AnswerSource
from .runs.checkpoint import step_of
from .runs.console import Console
from .runs.interrupt import StopRequest
from .runs.progress import Progress
from .runs.randomness import seed_generators
from .runs.resume import choose
from .runs.rundir import RunDirectory
from .runs.trackers import Trackers

ROLLOUT_SEED, UPDATE_SEED, ADAPTER_SEED, HOOK_SEED, WEIGHT_SEED, GLOBAL_SEED = 1, 2, 3, 4, 5, 6


def train(config: Config) -> bool:
    """Run ``config`` to its end. Returns False when it was interrupted.

    Raises:
        EapoError: bad configuration, data, model or rewards, or a run that diverged; see ``errors``.
    """
    with ranks.joined(config.model.device), StopRequest() as stop, Console(stop) as console:
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
    seed_generators(derive_seed(config.seed, GLOBAL_SEED, ranks.rank()))
    run = RunDirectory(config)
    done = ranks.on_first(run.finished)
    if config.resume and done and done >= config.steps:
        console.line(f"run {run.path} is finished ({done} steps): nothing to resume; more steps go on from there")
        return True
    with console.phase("checking checkpoints"):
        checkpoint = ranks.on_first(lambda: choose(config, run, console))
    if not checkpoint:
        ranks.on_first(lambda: run.start(replace=config.overwrite or bool(config.resume)))
    trackers = Trackers(config, run.path, step_of(checkpoint))
    console.line(f"run {run.path}: {config.loss.method}, {config.steps} steps, {len(train_set)} training questions")

    with console.phase(f"loading {config.model.path} (an embedded model is converted the first time)"):
        policy = load_policy(config.model, config.lora, seed=derive_seed(config.seed, ADAPTER_SEED))
    with console.phase("loading the rewards"):
        rewards = Rewards(config.rewards, cache=config.model.cache, device=policy.device)
    with console.phase("encoding the questions"):
        prompts = [encode_prompt(row["prompt"], policy.tokenizer, config.data) for row in train_set.rows]

    for line in advice(config):
        console.line(f"advice: {line}")
    with console.phase(f"starting the engine {rollout.engine}"):
        engine = make_engine(config, policy)
    method, hook = config.method(), config.loss.hook()
    if method.config.advantage == "binary":
        ranks.on_first(lambda: rewards.check_binary(method.name, train_set.rows[:4], policy.tokenizer))
    learner = Learner(policy, method, config.optim, temperature=rollout.temperature, steps=config.steps)
    controller = make_controller(method)
    reference = Reference(policy, config.loss.reference_share()) if method.config.kl_coef else None

    def questions() -> tuple[list[list[int]], dict[str, list[Any]]]:
        indices = sampler.next()
        return [prompts[i] for i in indices], train_set.columns(indices, 1)

    source = AnswerSource(config, method, policy, engine, rewards, console, questions)
    trained, weights = (sum(p.numel() for p in group) for group in (policy.trainable(), policy.parameters()))
    console.line(f"training {trained:,} of {weights:,} weights on {policy.device}")

    eval_sets = {"held-out": held_out, "train": train_set.head(config.eval.train_questions)}

    def evaluation(step: int) -> None:
        for name, questions in eval_sets.items():
            if questions:
                result, samples = evaluate(config, policy, engine, rewards, questions, dataset=name, step=step, console=console)
                run.append("evaluations", asdict(result))
                trackers.log(result.metrics(), step)
                for sample in samples[:: result.responses]:
                    run.append("samples", sample)
                console.line(f"after step {step}, {name} questions: {result.headline(config.eval.resamples)}")

    def statistics(answers: Answers, tick: Tick, wanted: Wanted = NOTHING) -> Measurement:
        return measure(policy, answers, temperature=rollout.temperature, budget=budget, tick=tick, wanted=wanted)

    progress = Progress(
        config, run, policy, learner.optimizer, parts={"sampler": sampler, "controller": controller, "hook": hook},
        reference=reference, questions=fingerprint(prompts),
    )  # fmt: skip
    step, finished = 0, False
    if checkpoint:
        with console.phase(f"reading {checkpoint}"):
            step = progress.restore(checkpoint)
        ranks.on_first(run.go_on)
        engine.sync_weights(policy)
        console.line(f"going on from {checkpoint.name}: {step} of {config.steps} steps are done")

    try:
        while True:
            if step in (0, config.steps) or (config.eval.every and step % config.eval.every == 0):
                evaluation(step)
            if step == config.steps:
                break
            console.seconds.clear()
            diagnosed = bool(config.diagnose_every) and step % config.diagnose_every == 0
            sampling = Sampling(
                responses=rollout.responses,
                max_new_tokens=rollout.max_new_tokens,
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                seed=derive_seed(config.seed, ROLLOUT_SEED, step),
            )
            state = controller.values() if controller else {}
            drawn = source.draw(*questions(), range(rollout.prompts), hook.before(sampling))
            sampled = scored = drawn.chosen(drawn.whole())
            if len(sampled):
                sampled = hook.after(scored, sampling, source, state, derive_seed(config.seed, HOOK_SEED, step))
                sampled = sampled.chosen(sampled.whole())
            if not len(sampled):
                raise RewardError(
                    f"step {step + 1}: expected at least one fully scored group, got none; {drawn.scores.failures[0]}"
                )

            answers = select(sampled.rollouts, range(len(sampled)))
            with console.phase("old_logp") as tick:
                wanted = wanted_by(method, tempered=float(state.get("temperature", 1.0)), diagnose=diagnosed)
                old = statistics(answers, tick, wanted)
                ref_logp = None
                if reference:
                    with reference.installed():
                        ref_logp = statistics(answers, tick).logp
                experience = weigh(
                    method, answers, sampled.scores.total, torch.tensor(sampled.group_ids), old,
                    controller=controller, advantages=sampled.advantages, ref_logp=ref_logp,
                    extras=extra_statistics(config, method, policy, sampled, answers, tick),
                    progress=step / config.steps, seed=derive_seed(config.seed, WEIGHT_SEED, step),
                )  # fmt: skip

            with console.phase("update") as tick:
                seed = derive_seed(config.seed, UPDATE_SEED, step)
                dynamics = experience.diagnose(method) if diagnosed else {}
                learned = learner.update(experience, step=step, seed=seed, tick=tick)
                engine.sync_weights(policy)
                if reference:
                    reference.follow()
                if diagnosed:  # not left half-way: the weights have changed already, and the step counts
                    change = statistics(answers, lambda *_: None).entropy.mean() - old.entropy.mean()
                    dynamics["dynamics/measured_entropy_change"] = change.item()

            step += 1
            seconds = dict(console.seconds)
            ordinary = sampled.ordinary() or list(range(len(sampled)))
            own = per_token(torch.isin(torch.arange(len(sampled)), torch.tensor(ordinary)), answers)
            metrics = {
                "step": step,
                **reward_metrics(scored),
                **call_metrics(drawn),
                "reward/excluded_groups": float(len(drawn.groups()) - len(scored.groups())),
                **({name: float(value) for name, value in controller.metrics().items()} if controller else {}),
                **learned,
                "eapo/entropy": old.entropy.mean().item(),
                **dynamics,
                **{f"rollout/{name}": sum(flags) / len(flags) for name, flags in sampled.marks.items()},
                **answer_metrics(scored),
                **engine_metrics(sampled.chosen(ordinary), old.logp.cpu()[own], method.config.importance_cap),
                **{f"seconds/{name}": value for name, value in seconds.items()},
                "tokens_per_second": answers.tokens / sum(seconds.values()),
            }
            for line in advice_on_rewards(config, sampled.scores.total) if step == 1 else ():
                console.line(f"advice: {line}")
            run.append("metrics", metrics)
            trackers.log(metrics, step)
            for i in best_and_worst(sampled, config.samples_per_step):
                run.append("samples", sample_record(step, i, sampled))
            progress.mark(step)
            console.step(metrics, config.steps)
            if config.checkpoint.every and (step % config.checkpoint.every == 0 or step == config.steps):
                with console.phase("saving a checkpoint"):
                    progress.save()
        finished = True
    except Interrupted:
        console.line(f"interrupted after {step} of {config.steps} steps")
    finally:
        engine.close()
        trackers.close()
    if not step:
        return False

    if config.checkpoint.every and not finished:
        console.line(f"saved {progress.save()}: --resume auto goes on from there")
    policy.save(run.model)

    def conclude() -> None:
        picture, page = write_report([run.path], run.path, resamples=config.eval.resamples)
        console.line(f"\n{summary_table(run.path, config.eval.resamples)}\n")
        if finished:
            run.finish(step)
        console.line(f"model    {run.model}\nreport   {page}\npicture  {picture}")

    ranks.on_first(conclude)
    return finished
