"""``python -m trainer eval``: evaluate one model without training."""

from __future__ import annotations

from pathlib import Path

from .. import ranks
from ..config import Config
from ..dataset import load_prompts
from ..errors import ConfigError, Interrupted
from ..models.limits import check_prompts
from ..models.policy import load_policy
from ..rewards.scoring import Rewards
from ..rollouts.engines import make_engine
from ..runs.checkpoint import checkpoints, read_weights, step_of, verify
from ..runs.console import Console
from ..runs.interrupt import StopRequest
from ..runs.rundir import RunDirectory
from .evaluate import Evaluator
from .report import estimates_table


def of_run(config: Config, run: Path, checkpoint: str | None) -> tuple[Config, Path | None]:
    """Configuration and checkpoint for the evaluation of a run: its exported model, or
    ``checkpoint`` ("latest" or a name).

    Args:
        config: the run's, possibly with other prompts or another number of completions.

    Returns:
        The configuration of the evaluation, which goes to ``<run>-eval`` beside the run, and the
        path of the checkpoint.

    Raises:
        ConfigError: the run has no such model or checkpoint.
    """
    run = run.resolve()
    there = RunDirectory(config.replace(out=str(run.parent), name=run.name))
    config = config.replace(out=str(run.parent), name=f"{run.name}-eval", overwrite=True, resume="")
    if checkpoint is None:
        if not there.model.is_dir():
            raise ConfigError(f"--run: expected a run with a saved model (or --checkpoint latest), got none in {run}")
        return config.replace(model={"path": str(there.model)}, lora={"rank": 0}), None
    found = {path.name: path for path in checkpoints(there.checkpoints)}
    if found:
        found["latest"] = list(found.values())[-1]
    if checkpoint not in found:
        names = ", ".join(found) or "none"
        raise ConfigError(f"--checkpoint: expected one of {there.checkpoints} ({names}), got {checkpoint!r}")
    return config.replace(name=f"{config.name}-{found[checkpoint].name}"), found[checkpoint]


def evaluate_model(config: Config, checkpoint: Path | None = None) -> bool:
    """Evaluate ``config.model`` and print one table for each set of prompts. Returns False when
    interrupted.

    The values go to evaluations.jsonl in a run directory of their own.

    Args:
        checkpoint: of a run with this configuration; its weights are loaded into the model first.
            Without one the model is evaluated as it is, and no new adapters are added, because they
            would not change it.

    Raises:
        TrainerError: bad configuration, data, model, rewards or checkpoint.
    """
    if checkpoint is None:
        config = config.replace(lora={"rank": 0})
    else:
        verify(checkpoint)
    if not (config.data.eval or config.eval.train_prompts):
        raise ConfigError("data.eval: expected a file, or eval.train_prompts of at least 1; got neither")
    try:
        with ranks.init_distributed(config.model.device), StopRequest() as stop, Console(stop, config.log.heartbeat) as console:
            train_set = load_prompts(config.data, "train", config.eval.train_prompts) if config.eval.train_prompts else None
            held_out = load_prompts(config.data, "eval") if config.data.eval else None
            run = RunDirectory(config)
            ranks.run_on_main(lambda: run.check_free(replace=config.overwrite))
            if (run.path / "metrics.jsonl").exists():
                raise ConfigError(f"name: expected another directory than that of a training run, got {run.path}")
            with console.phase(f"loading {config.model.path}"):
                policy = load_policy(config.model, config.lora, seed=0)
                if checkpoint is not None:
                    read_weights(checkpoint, policy)
                rewards = Rewards(config.rewards, cache=config.model.cache, device=policy.device)
                engine = make_engine(config, policy)
            sets = {
                name: prompts and prompts.encoded(policy.tokenizer, config.data, console.line)
                for name, prompts in {"held-out": held_out, "train": train_set}.items()
            }
            for prompts in filter(None, sets.values()):
                check_prompts(policy.language_model, policy.tokenizer, prompts, config.rollout.max_new_tokens, console.line)
            ranks.run_on_main(run.start)
            evaluator = Evaluator(config, policy, engine, rewards, sets, run, console)
            for name in evaluator.sets:
                result, samples = evaluator.evaluate(name, step_of(checkpoint))
                evaluator.record(result, samples)
                console.line(f"\n{estimates_table(result, config.eval.resamples)}")
            engine.close()
            console.line(f"\nvalues  {run.path / 'evaluations.jsonl'}")
    except Interrupted:
        return False
    return True
