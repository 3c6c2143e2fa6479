"""``python -m trainer eval``: one model, no training."""

from __future__ import annotations

from dataclasses import asdict, replace

from ..config import Config
from ..dataset import load_questions
from ..errors import ConfigError, Interrupted
from ..models.policy import load_policy
from ..rewards.scoring import Rewards
from ..rollouts.engines import make_engine
from ..runs.console import Console
from ..runs.interrupt import StopRequest
from ..runs.rundir import RunDirectory
from .evaluate import evaluate
from .report import estimates_table


def evaluate_model(config: Config) -> bool:
    """Evaluate ``config.model`` as it is and print one table for each set of questions; False when interrupted.

    The values go to evaluations.jsonl of a run directory of their own. New adapters would change nothing: ``lora`` is
    not used.

    Raises:
        EapoError: bad configuration, data, model or rewards.
    """
    config = replace(config, lora=replace(config.lora, rank=0))
    train_set = load_questions(config.data.train, config.eval.train_questions) if config.eval.train_questions else None
    held_out = load_questions(config.data.eval, config.data.eval_limit) if config.data.eval else None
    if not (train_set or held_out):
        raise ConfigError("data.eval: expected a file, or eval.train_questions of at least 1; got neither")
    run = RunDirectory(config)
    run.start(replace=config.overwrite)
    try:
        with StopRequest() as stop, Console(stop) as console:
            with console.phase(f"loading {config.model.path}"):
                policy = load_policy(config.model, config.lora, seed=0)
                rewards = Rewards(config.rewards, cache=config.model.cache, device=policy.device)
                engine = make_engine(config, policy)
            for name, questions in {"held-out": held_out, "train": train_set}.items():
                if questions:
                    result, samples = evaluate(
                        config, policy, engine, rewards, questions, dataset=name, step=0, console=console
                    )
                    run.append("evaluations", asdict(result))
                    for sample in samples:
                        run.append("samples", sample)
                    console.line(f"\n{estimates_table(result, config.eval.resamples)}")
    except Interrupted:
        return False
    print(f"\nvalues  {run.path / 'evaluations.jsonl'}")
    return True
