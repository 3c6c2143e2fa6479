"""The state of a run between two steps, what an error leaves of it, and how a run resumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from .. import ranks
from ..config import Config
from ..errors import CheckpointError, ConfigError
from ..models.policy import Policy
from ..models.weights import Reference
from .checkpoint import (
    STATE,
    prune,
    random_state,
    read_tensors,
    remove,
    restore_random_state,
    saved_names,
    verify,
    write,
)
from .console import Console
from .locate import checkpoints, step_of
from .rundir import RunDirectory

BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
NAMING = ("name", "out", "overwrite", "resume")
FREE = (
    "steps", "samples_per_step", "diagnose_every", "log.", "checkpoint.", "eval.",
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


def choose(config: Config, run: RunDirectory, console: Console) -> Path | None:
    """The latest undamaged checkpoint, or None: a new run. Changes nothing.

    Raises:
        ConfigError: the checkpoint is one of more steps or with settings that must not change, ``resume``
            together with ``overwrite``, or results under the name of a new run.
        CheckpointError: all of them are damaged.
    """
    if config.resume and config.overwrite:
        raise ConfigError("overwrite: expected False together with resume, got True")
    run.check_writable()
    found = checkpoints(run.checkpoints) if config.resume else []
    if not found:
        if config.resume and run.finished() is not None:
            raise ConfigError(f"resume: expected a checkpoint of the finished run {run.path} to resume from, got none")
        run.check_free(replace=config.overwrite or bool(config.resume))
        return None
    refused: list[str] = []
    for path in reversed(found):
        try:
            settings = verify(path)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        if step_of(path) > config.steps:
            raise ConfigError(f"steps: expected at least the {step_of(path)} that are done in {path}, got {config.steps}")
        changed = changes(path, settings, config)
        for line in (*(f"refused: {reason}" for reason in refused), *_explained(changed, step_of(path), config)):
            console.line(line)
        return path
    raise CheckpointError("; ".join([*refused, f"without {run.checkpoints} a new run starts"]))


def settings_of(config: Config) -> dict[str, Any]:
    """The settings as a flat table with dotted names, as JSON gives them back."""

    def flat(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix[1:]: value}
        return {name: own for key, inner in value.items() for name, own in flat(f"{prefix}.{key}", inner).items()}

    return flat("", config.model_dump(mode="json"))


def changes(path: Path, before: dict[str, Any], config: Config) -> dict[str, list[Any]]:
    """The settings that differ from ``before``, those of the checkpoint ``path``, with both values.

    Raises:
        ConfigError: with every setting that must not change, and both values.
    """
    now, default = settings_of(config), settings_of(Config())
    pairs = {key: [before.get(key, default.get(key)), now.get(key)] for key in sorted({*before, *now} - {*NAMING})}
    differing = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    fixed = [
        f"{key}: expected {old!r}, got {new!r}"
        for key, (old, new) in differing.items()
        if key not in STEERING and not any(key == free or (free[-1] == "." and key.startswith(free)) for free in FREE)
    ]
    if fixed:
        raise ConfigError(f"resume: {path} was written with other settings; {'; '.join(fixed)}")
    return differing


def _explained(changed: dict[str, list[Any]], step: int, config: Config) -> list[str]:
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


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Progress:
    """Records the small state after every step, so that a run that stops within the next step can
    still be saved as it was before it. Weights and optimizer change only from the first optimizer
    step of an update to the next mark; a stop request is not followed in between.

    Args:
        parts: further objects with a state, by name: sampler, controller.
        prompts: a hash of the training prompts.
    """

    def __init__(
        self, config: Config, run: RunDirectory, policy: Policy, optimizer: torch.optim.Optimizer, *,
        parts: Mapping[str, Stateful | None], reference: Reference | None, prompts: str,
    ) -> None:  # fmt: skip
        self.config, self.run, self.policy, self.optimizer = config, run, policy, optimizer
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.reference, self.prompts = reference, prompts
        self.changed = False
        optimizer.register_step_pre_hook(self._note_change)

    def _note_change(self, *_: Any) -> None:
        self.changed = True

    def mark(self, step: int) -> None:
        """Record that ``step`` steps are done and logged."""
        self.changed = False
        self.noted: dict[str, Any] = {
            "step": step,
            "offsets": self.run.offsets(),
            "random": random_state(),
            **{name: part.state_dict() for name, part in self.parts.items()},
        }

    def save(self) -> Path:
        """Write the checkpoint of the last mark. All ranks call it."""
        self.run.sync()
        state = {**self.noted, "prompts": self.prompts, "random": ranks.all_gather(lambda: self.noted["random"])}
        settings, keep = settings_of(self.config), self.config.checkpoint.keep
        return write(self.run.checkpoints, self.noted["step"], self._tensors(), state, settings, keep=keep)

    def rescue(self, error: BaseException) -> None:
        """Save the last mark after an error in the loop, where the weights are still those of it.
        Adds to the error's notes what was saved, and the command that continues. All ranks call it.
        """
        step, path = self.noted["step"], None
        together = ranks.failed_together(error)
        if not self.config.checkpoint.every:
            reason = "checkpoint.every is 0"
        elif not step:
            reason = "no step was completed"
        elif self.changed:
            reason = f"the update of step {step + 1} had begun"
        elif not together:
            reason = "the ranks did not fail together, which a checkpoint needs"
        else:
            try:
                path = self.save()
            except BaseException as second:
                error.add_note(self._continued(f"the state after step {step} could not be saved: {second}"))
                raise error from second
        error.add_note(self._continued(f"saved {path}" if path else f"nothing was saved: {reason}"))

    def _continued(self, saved: str) -> str:
        """``saved``, with the command that continues from the last checkpoint where there is one."""
        there = next(reversed(checkpoints(self.run.checkpoints)), None)
        return f"{saved}; to continue from {there.name}: {self.run.command()}" if there else saved

    def restore(self, path: Path) -> None:
        """Resume from a verified checkpoint and remove later ones.

        Raises:
            CheckpointError: the training prompts differ, or the log files are shorter than at the
                checkpoint.
        """
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        if state["prompts"] != self.prompts:
            raise CheckpointError(f"data.train: expected the prompts that {path} was trained on, got others")
        tensors, saved = self._tensors(), saved_names(path)
        known = {key: value for key, value in tensors["optimizer"].items() if f"optimizer.{key}" in saved}
        read_tensors(path, {**tensors, "optimizer": known})
        initial = get_optimizer_state_dict(self.policy, self.optimizer, options=BY_NAME)
        set_optimizer_state_dict(self.policy, self.optimizer, {**initial, **known}, options=BY_NAME)
        for name, weight in self.policy.named_parameters():  # a weight that has not had a gradient yet
            if not any(key.startswith(f"state.{name}.") for key in known):
                self.optimizer.state.pop(weight, None)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

        def take_back() -> None:
            self.run.truncate(state["offsets"])
            for other in checkpoints(self.run.checkpoints):
                if step_of(other) > step_of(path):
                    remove(other)
            prune(self.run.checkpoints, self.config.checkpoint.keep)  # a kill behind the last write left this undone

        ranks.run_on_main(take_back)
        own = ranks.rank() if len(state["random"]) == ranks.size() else 0
        restore_random_state(state["random"][own])

    def _tensors(self) -> dict[str, dict[str, Any]]:
        """Trained weights, optimizer state (allocated where there is none yet) and a moving
        reference by name, in the memory that the run uses.
        """
        weights = self.policy.trained_weights()
        state = get_optimizer_state_dict(self.policy, self.optimizer, options=BY_NAME)
        tensors: dict[str, dict[str, Any]] = {
            "weights": weights,
            "optimizer": {key: value for key, value in state.items() if key.startswith("state.")},
        }
        if self.reference is not None and self.reference.keep < 1:
            tensors["reference"] = dict(zip(weights, self.reference.weights, strict=True))
        return tensors
