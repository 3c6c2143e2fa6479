"""Where a run is between two steps: what a checkpoint holds, and how the run goes on from one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import ranks
from ..config import Config
from ..errors import CheckpointError, ConfigError
from ..models.policy import Policy
from ..models.reference import Reference
from .checkpoint import checkpoints, read_state, read_tensors, remove, saved_names, write
from .randomness import random_state, restore_random_state
from .resume import check_settings, settings_of
from .rundir import RunDirectory

ADAMW = {"step": (), "exp_avg": None, "exp_avg_sq": None}
"""State of the optimizer for each weight -> its shape; None is the weight's own."""


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Progress:
    """Takes note of everything small after every step, so that a run that is stopped in the middle of the next one can still be
    saved as it was before: the weights and the optimizer only change in the update, which is never left half-way.

    Args:
        parts: what else has a state, by name: sampler, controller, hook.
        questions: what the training questions are, as a hash.
    """

    def __init__(
        self, config: Config, run: RunDirectory, policy: Policy, optimizer: torch.optim.Optimizer, *,
        parts: Mapping[str, Stateful | None], reference: Reference | None, questions: str,
    ) -> None:  # fmt: skip
        self.config, self.run, self.policy, self.optimizer = config, run, policy, optimizer
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.reference, self.questions = reference, questions
        self.mark(0)

    def mark(self, step: int) -> None:
        """``step`` steps are done and logged: from here the run goes on."""
        self.noted: dict[str, Any] = {
            "step": step,
            "offsets": self.run.offsets(),
            "random": random_state(),
            **{name: part.state_dict() for name, part in self.parts.items()},
        }

    def save(self) -> Path:
        """Write the checkpoint of the last mark. All ranks call it."""
        self.run.sync()
        state = {
            **self.noted,
            "settings": settings_of(self.config),
            "questions": self.questions,
            "random": ranks.gather(lambda: self.noted["random"]),
        }
        step, keep = self.noted["step"], self.config.checkpoint.keep
        return write(self.run.checkpoints, step, self._tensors(), state, keep=keep)

    def restore(self, path: Path) -> int:
        """Go on from a verified checkpoint; later ones, damaged or not wanted, are removed. Returns the steps that are done.

        Raises:
            ConfigError: it was written with other settings.
            CheckpointError: other questions, or the run's files lack lines that were there.
        """
        state = read_state(path)
        check_settings(path, state["settings"], self.config)
        if state["step"] > self.config.steps:
            raise ConfigError(f"steps: expected at least the {state['step']} that are done in {path}, got {self.config.steps}")
        if state["questions"] != self.questions:
            raise CheckpointError(f"data.train: expected the questions that {path} was trained on, got others")
        read_tensors(path, self._tensors(saved_names(path)))
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

        def take_back() -> None:
            self.run.truncate(state["offsets"])
            for other in checkpoints(self.run.checkpoints):
                if other.name > path.name:
                    remove(other)

        ranks.on_first(take_back)
        own = ranks.rank() if len(state["random"]) == ranks.size() else 0
        restore_random_state(state["random"][own])
        self.mark(state["step"])
        return state["step"]

    def _tensors(self, saved: set[str] | None = None) -> dict[str, Any]:
        """Trained weights, optimizer, moving reference, by name; with ``saved``, with room for what the optimizer lacks."""
        weights = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        for name, weight in weights.items():
            if saved is not None and f"optimizer.{name}.step" in saved:
                self.optimizer.state[weight] = {
                    key: torch.zeros_like(weight) if shape is None else torch.zeros(shape) for key, shape in ADAMW.items()
                }
        result = {
            "weights": {name: weight.detach() for name, weight in weights.items()},
            "optimizer": {name: self.optimizer.state[w] for name, w in weights.items() if w in self.optimizer.state},
        }
        if self.reference is not None and self.reference.keep < 1:
            result["reference"] = dict(zip(weights, self.reference.weights, strict=True))
        return result
