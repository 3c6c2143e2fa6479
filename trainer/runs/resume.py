"""Which checkpoint a run resumes from, and which settings may change then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import CheckpointError, ConfigError
from .checkpoint import checkpoints, step_of, verify
from .console import Console
from .rundir import RunDirectory

FREE = (
    "name", "out", "overwrite", "resume", "steps", "samples_per_step", "diagnose_every", "log.", "checkpoint.", "eval.",
    "data.eval", "data.eval_limit", "data.max_prompt_tokens", "model.cache", "model.device", "model.attention",
    "model.packing", "model.gradient_checkpointing", "rollout.engine", "rollout.batch", "rollout.vllm.",
    "optim.micro_batch_tokens", "optim.old_logp", "rewards.concurrency", "rewards.timeout", "rewards.judge.url",
    "rewards.judge.api_key_env", "rewards.judge.retries", "rewards.reward_model.batch",
)  # fmt: skip
"""Settings that may change at a resume, because they move time, memory or what is seen of a run (a
trailing dot: all settings of a section). The run remains the same up to rounding. Where
data.max_prompt_tokens leaves out other prompts, ``Progress.restore`` refuses it."""
STEERING = ("optim.lr", "optim.warmup_steps", "optim.schedule")
"""Settings that may change with a warning: they are how a diverging run is rescued."""
WHERE = ("name", "out", "overwrite", "resume")

Changes = dict[str, list[Any]]
"""Setting -> its values in the checkpoint and now."""


def choose(config: Config, run: RunDirectory, console: Console) -> tuple[Path | None, Changes]:
    """The verified checkpoint that ``resume`` asks for (None for a new run), and the settings that
    have changed since. Changes nothing.

    Raises:
        ConfigError: no checkpoint of this run at that path, one of more steps or with settings that
            must not change, ``resume`` together with ``overwrite``, or results under the name of a
            new run.
        CheckpointError: it is damaged; with "auto", all of them are.
    """
    if not config.resume:
        run.check_free(replace=config.overwrite)
        return None, {}
    if config.overwrite:
        raise ConfigError("overwrite: expected False together with resume, got True")
    run.check_writable()
    there = checkpoints(run.checkpoints)
    if config.resume == "auto":
        found = _latest_valid(there, console)
        if found is None:
            if run.finished() is not None:
                raise ConfigError(f"resume: expected a checkpoint of the finished run {run.path} to resume from, got none")
            run.check_free(replace=True)
            return None, {}
        path, settings = found
    else:
        path = Path(config.resume).resolve()
        if path not in [known.resolve() for known in there]:
            names = ", ".join(known.name for known in there) or "none"
            raise ConfigError(f"resume: expected auto or a checkpoint in {run.checkpoints} ({names}), got {config.resume!r}")
        settings = verify(path)
    if step_of(path) > config.steps:
        raise ConfigError(f"steps: expected at least the {step_of(path)} that are done in {path}, got {config.steps}")
    changed = changes(path, settings, config)
    for line in _explained(changed, step_of(path), config):
        console.line(line)
    return path, changed


def _latest_valid(there: list[Path], console: Console) -> tuple[Path, dict[str, Any]] | None:
    for path in reversed(there):
        try:
            return path, verify(path)
        except CheckpointError as error:
            console.line(f"refused: {error}")
    if there:
        expected = "expected one valid checkpoint, or none (remove the directory to start a new run)"
        names = ", ".join(path.name for path in reversed(there))
        raise CheckpointError(f"{there[0].parent}: {expected}, got only refused ones: {names}")
    return None


def settings_of(config: Config) -> dict[str, Any]:
    """The settings as a flat table with dotted names, as JSON gives them back."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, table: dict[str, Any]) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                visit(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value

    visit("", config.model_dump())
    return flat


def changes(path: Path, before: dict[str, Any], config: Config) -> Changes:
    """The settings that differ from ``before``, those of the checkpoint ``path``.

    Raises:
        ConfigError: with every setting that must not change, and both values.
    """
    now, default = settings_of(config), settings_of(Config())
    pairs = {key: [before.get(key, default.get(key)), now.get(key)] for key in sorted({*before, *now})}
    differing = {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and key not in WHERE}
    fixed = [
        f"{key}: expected {old!r}, got {new!r}"
        for key, (old, new) in differing.items()
        if key not in STEERING and not any(key == free or (free[-1] == "." and key.startswith(free)) for free in FREE)
    ]
    if fixed:
        raise ConfigError(f"resume: {path} was written with other settings; {'; '.join(fixed)}")
    return differing


def _explained(changed: Changes, step: int, config: Config) -> list[str]:
    """Lines about the changed settings."""
    lines = []
    if changed:
        lines.append("settings changed: " + ", ".join(f"{key} from {old!r} to {new!r}" for key, (old, new) in changed.items()))
    if steered := [key for key in STEERING if key in changed]:
        lines.append(
            f"warning: from step {step + 1} on the run differs from an uninterrupted one: {', '.join(steered)} changed"
        )
    if "steps" in changed and config.optim.schedule == "cosine":
        lines.append(f"warning: the cosine schedule is that of {config.steps} steps from step {step + 1} on")
    return lines
