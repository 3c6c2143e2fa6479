"""The training loop, from top to bottom.

- One step: sample completions, score them, measure the policy on them, update. A step samples from
  the weights it starts with, so with one minibatch and one epoch the ratio is exactly 1.
- Log-probs, entropy and loss are those of the sampled distribution: at the sampling temperature,
  over the tokens that top_p, top_k and min_p left (``rollout.record_support``), else over the whole
  vocabulary. The log-probs in the loss come from the trainer's own forward pass. The engine's are
  kept, their mismatch is logged, and ``loss.importance_cap`` corrects for it.
- The end-of-sequence token belongs to the completion and is trained on. What happens to a truncated
  completion is a setting (``rewards.overlong``).
- Before the updates, one pass over all completions computes the old log-probs and the statistics
  from which the method weights tokens. The weights are fixed there, over the whole step: EAPO's
  from the mean entropy and H_0, that of the first steps, others' from covariances, quantiles or
  group statistics. The updates then use any split of the tokens. A step with one update and an
  engine that records entropies needs no such pass (``optim.old_logp``).
- Groups without spread may be replaced by others (``rollout.resample_rounds``). Metrics of rewards,
  lengths and diversity cover the first samples, because a selection would bias them.
- A group with a failed reward is left out of the step. A step without a complete group ends the
  run.
- Random numbers are functions of (seed, purpose, step). The global generators are seeded for reward
  functions that use them.
- A loss or gradient norm that is not finite ends the run before the optimizer step.
- An earlier run of the same name is replaced when data, model, rewards and engine have been
  accepted, not before.
- SIGINT or SIGTERM interrupts the current phase at its next tick; an update that has begun is
  finished. Then a checkpoint and the model are saved and the report is drawn.
- Any error saves the state after the last completed step, unless the weights have changed since (an
  update failed between its first and its last optimizer step), or one rank of several failed alone.
  The message says what was saved and which command continues.
- Under torchrun (FSDP2) all ranks hold all completions and share the work: each generates, scores
  and measures some completions and runs its part of every minibatch. Values that only one rank
  knows are exchanged through ``ranks`` before any rank acts on them. The run equals that of one
  process up to rounding.
- A checkpoint is the state between two steps, before an evaluation at that step: weights,
  optimizer, controller (H_0), sampler, generators and the lengths of the log files. A resumed
  run cuts the log files back to these lengths and repeats what followed. Its results are bitwise
  equal to an uninterrupted run on the same machine with the same number of processes and threads.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import set_seed

from eapo_kernels import make_controller

from . import ranks
from .config import Config
from .config.advice import advice, advice_on_rewards, advice_on_zero_gradients
from .dataset import PromptSampler, PromptSet, fingerprint
from .dry_run import prepare
from .errors import Interrupted, RewardError
from .evaluation.evaluate import Evaluator
from .evaluation.report import summary_table, write_report
from .evaluation.step_metrics import (
    call_metrics,
    completion_metrics,
    cost_metrics,
    engine_metrics,
    reward_metrics,
    sample_records,
)
from .learning.experience import extra_statistics, weigh
from .learning.learner import Learner
from .learning.measure import Measurement, measure, recorded, wanted_by
from .models.policy import load_policy
from .models.weights import Reference
from .records import Rollouts, Tick, derive_seed
from .rewards.scoring import Rewards
from .rollouts.engines import make_engine
from .rollouts.source import RolloutSource
from .runs.console import Console
from .runs.locate import step_of
from .runs.resume import Progress, choose
from .runs.rundir import RunDirectory
from .runs.trackers import Trackers

ROLLOUT_SEED, UPDATE_SEED, ADAPTER_SEED, RESAMPLE_SEED, WEIGHT_SEED, GLOBAL_SEED = 1, 2, 3, 4, 5, 6


def train(config: Config) -> bool:
    """Run ``config`` to its end. Returns False when it was interrupted.

    Raises:
        TrainerError: bad configuration, data, model or rewards, or a run that diverged; see
            ``errors``.
    """
    with (
        ranks.init_distributed(config.model.device),
        Console(config.log.heartbeat) as console,
        Trackers(config) as trackers,
    ):
        try:
            return _train(config, console, trackers)
        except Interrupted:
            console.line("interrupted before the first step: nothing to save")
            return False


def _train(config: Config, console: Console, trackers: Trackers) -> bool:
    rollout, budget = config.rollout, config.optim.micro_batch_tokens

    run = RunDirectory(config)
    done = ranks.run_on_main(run.finished)
    if config.resume and done and done >= config.steps:
        console.line(f"run {run.path} is finished ({done} steps): nothing to resume; a larger --steps continues it")
        return True
    with console.phase("checking checkpoints"):
        checkpoint = ranks.run_on_main(lambda: choose(config, run, console))
    with console.phase("checking data, rewards and memory"):
        train_set, held_out, memory = prepare(config, ranks.size(), console.line)
        sampler = PromptSampler(len(train_set), rollout.prompts, config.seed)
    console.line(f"run {run.path}: {config.loss.method}, {config.steps} steps, {len(train_set)} training prompts")
    console.line(memory.line())
    for line in advice(config):
        console.line(f"advice: {line}")

    set_seed(derive_seed(config.seed, GLOBAL_SEED, ranks.rank()))
    with console.phase(f"loading {config.model.path} (an embedded model is converted the first time)"):
        policy = load_policy(config.model, config.lora, seed=derive_seed(config.seed, ADAPTER_SEED))
    with console.phase("loading the rewards"):
        rewards = Rewards(config.rewards, cache=config.model.cache, device=policy.device)
    with console.phase(f"starting the engine {rollout.engine}"):
        engine = make_engine(config, policy)
    method, resample_rounds = config.method(), config.resample_rounds()
    learner = Learner(
        policy, method, config.optim, temperature=rollout.temperature, steps=config.steps,
        gradient_tolerance=config.loss.gradient_tolerance,
    )  # fmt: skip
    controller = make_controller(method)
    reference = Reference(policy.trainable(), config.loss.reference_share()) if method.config.kl_coef else None

    source = RolloutSource(config, policy.tokenizer, engine, rewards, console)
    trained, weights = (sum(p.numel() for p in group) for group in (policy.trainable(), policy.parameters()))
    rows = "packed" if policy.packed else "padded"
    console.line(f"training {trained:,} of {weights:,} weights on {policy.device}, micro-batches {rows}")

    sets = {"held-out": held_out, "train": train_set.take(range(len(train_set))[: config.eval.train_prompts])}
    evaluator = Evaluator(config, policy, source, sets, run)

    def next_prompts() -> PromptSet:
        return train_set.take(sampler.next())

    def statistics(completions: Rollouts, tick: Tick, **wanted: Any) -> Measurement:
        return measure(policy, completions, temperature=rollout.temperature, budget=budget, tick=tick, **wanted)

    progress = Progress(
        config, run, policy, learner.optimizer, parts={"sampler": sampler, "controller": controller},
        reference=reference, prompts=fingerprint(train_set.ids),
    )  # fmt: skip
    step, finished, idle_steps = step_of(checkpoint), False, 0
    trackers.start(run.path, step)
    if checkpoint:
        with console.phase(f"reading {checkpoint}"):
            progress.restore(checkpoint)
        console.line(f"resuming from {checkpoint.name}: {step} of {config.steps} steps are done")
    ranks.run_on_main(lambda: run.resume() if checkpoint else run.start())
    progress.mark(step)

    try:
        while True:
            with console.phase("sync"):  # after the mark: a failure here loses nothing
                engine.sync_weights(policy)
            if evaluator.due(step):
                for result in evaluator(step):
                    trackers.log(result.metrics(), step)
            if step == config.steps:
                break
            console.seconds = {"sync": console.seconds["sync"]}
            diagnosed = bool(config.diagnose_every) and step % config.diagnose_every == 0
            sampling = rollout.sampling(rollout.responses, derive_seed(config.seed, ROLLOUT_SEED, step))
            state = controller.values() if controller else {}
            drawn = source.draw(next_prompts(), range(rollout.prompts), sampling)
            sampled = scored = drawn.take(drawn.fully_scored())
            if len(scored) and resample_rounds:
                seed = derive_seed(config.seed, RESAMPLE_SEED, step)
                sampled = source.resample(scored, sampling, resample_rounds, seed, next_prompts)
            if not len(sampled):
                raise RewardError(
                    f"step {step + 1}: expected at least one fully scored group, got none; {drawn.scores.failures[0]}"
                )

            completions = sampled.rollouts
            with console.phase("measurement") as tick:
                wanted = wanted_by(method, tempered=float(state.get("temperature", 1.0)), diagnose=diagnosed)
                known = recorded(completions, method, config.optim, wanted, policy.device)
                old = known or statistics(completions, tick, **wanted)
                if known:
                    compared = [group[0] for group in sampled.groups()]
                    logp = statistics(completions.take(compared), tick).logp.cpu()
                else:
                    compared, logp = list(range(len(sampled))), old.logp.cpu()
                ref_logp = None
                if reference:
                    with reference.installed():
                        ref_logp = statistics(completions, tick).logp
                experience = weigh(
                    method, completions, sampled.scores.total, torch.tensor(sampled.group_ids), old,
                    controller=controller, ref_logp=ref_logp,
                    extras=extra_statistics(config, method, policy, sampled, completions, tick),
                    progress=step / config.steps, seed=derive_seed(config.seed, WEIGHT_SEED, step),
                )  # fmt: skip
                if config.rewards.overlong == "mask":
                    experience = experience.masked(sampled.rollouts.truncated)

            with console.phase("update") as tick:
                seed = derive_seed(config.seed, UPDATE_SEED, step)
                dynamics = experience.diagnose(method) if diagnosed else {}
                learned = learner.update(experience, step=step, seed=seed, tick=tick)
                if reference:
                    reference.follow()
                if diagnosed:  # without a tick: the weights have changed, so the step must be completed
                    change = statistics(completions, lambda *_: None).entropy.mean() - old.entropy.mean()
                    dynamics["dynamics/measured_entropy_change"] = change.item()

            step += 1
            seconds = dict(console.seconds)
            passes = (len(compared) / len(sampled) if known else 1) + bool(reference) + diagnosed
            metrics = {
                "step": step,
                **reward_metrics(scored),
                **call_metrics(drawn),
                "reward/excluded_groups": float(len(drawn.groups()) - len(scored.groups())),
                **({name: float(value) for name, value in controller.metrics().items()} if controller else {}),
                **learned,
                "eapo/entropy": old.entropy.mean().item(),
                **dynamics,
                **completion_metrics(scored),
                **engine_metrics(sampled.take(compared), logp, method.config.importance_cap),
                **{f"seconds/{name}": value for name, value in seconds.items()},
                **cost_metrics(policy, drawn, sampled, seconds, passes=passes, epochs=config.optim.epochs),
                "tokens_per_second": completions.tokens / sum(seconds.values()),
            }
            idle_steps = 0 if metrics["grad_norm"] else idle_steps + 1
            found = advice_on_rewards(config, sampled.scores.total) if step == 1 else advice_on_zero_gradients(idle_steps)
            for line in found:
                console.line(f"advice: {line}")
            if changed := run.record_kernels():
                console.line(f"advice: {changed}")
            run.append("metrics", metrics)
            trackers.log(metrics, step)
            for record in sample_records(step, sampled, config.samples_per_step):
                run.append("samples", record)
            progress.mark(step)
            completion_seconds = sum(seconds[phase] for phase in ("rollouts", "rewards", "measurement")) / len(drawn)
            console.step(metrics, config.steps, evaluator.seconds_left(step, completion_seconds))
            if config.checkpoint.every and (step % config.checkpoint.every == 0 or step == config.steps):
                with console.phase("saving a checkpoint"):
                    progress.save()
        finished = True
    except Interrupted:
        console.line(f"interrupted after {step} of {config.steps} steps{'' if step else ': nothing to save'}")
    except BaseException as error:
        progress.rescue(error)
        raise
    finally:
        engine.close()
    if not step:
        return False

    if config.checkpoint.every and not finished:
        console.line(f"saved {progress.save()}: --resume auto continues from it")
    try:
        policy.save(run.model)
    except BaseException as error:
        progress.rescue(error)
        raise

    def conclude() -> None:
        if finished:
            run.finish(step)
        console.line(f"model    {run.model}")
        try:
            picture, page = write_report([run.path], run.path)
            console.line(f"report   {page}\nfigure   {picture}\n\n{summary_table(run.path)}".rstrip())
        except (OSError, ValueError, RuntimeError) as error:  # of the disk or matplotlib; the command report repeats it
            console.line(f"the report failed, the run did not: {type(error).__name__}: {error}")

    ranks.run_on_main(conclude)
    return finished
