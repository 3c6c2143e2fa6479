"""The state of a run between two steps: what a checkpoint holds, and how a run resumes from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from .. import ranks
from ..config import Config
from ..errors import CheckpointError
from ..models.policy import Policy
from ..models.reference import Reference
from .checkpoint import checkpoints, prune, read_state, read_tensors, remove, saved_names, step_of, write
from .randomness import random_state, restore_random_state
from .resume import settings_of
from .rundir import RunDirectory

BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


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
        state = read_state(path)
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
        weights = {name: p.detach() for name, p in self.policy.named_parameters() if p.requires_grad}
        state = get_optimizer_state_dict(self.policy, self.optimizer, options=BY_NAME)
        tensors: dict[str, dict[str, Any]] = {
            "weights": weights,
            "optimizer": {k: v for k, v in state.items() if k.startswith("state.")},
        }
        if self.reference is not None and self.reference.keep < 1:
            tensors["reference"] = dict(zip(weights, self.reference.weights, strict=True))
        return tensors
