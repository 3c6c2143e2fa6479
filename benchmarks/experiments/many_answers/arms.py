"""The arms, and what all of them share: a run of an arm is the trainer's configuration with few changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import Config

from .task import LONGEST

GRPO: dict[str, Any] = {"loss": {"method": "eapo"}, "eapo": {"kappa": 0.0, "scale": 1.0, "low": 0.0}}
"""EAPO's loss with the weight 1: GRPO with the mean over all tokens."""

ARMS: Mapping[str, dict[str, Any]] = {
    "eapo": {"loss": {"method": "eapo"}, "eapo": {"ema": 0.0, "low": 0.0, "high": float("inf"), "anchor_steps": 1}},
    "constant": {"loss": {"method": "eapo"}, "eapo": {"kappa": 0.0, "low": 0.0}},  # the scale is eapo's mean weight
    "eapo_smoothed": {"loss": {"method": "eapo"}},
    "grpo": GRPO,
    "clip_higher": {**GRPO, "loss": {"method": "eapo", "clip_high": 0.28}},
    "entropy_bonus": {**GRPO, "loss": {"method": "eapo", "entropy_coef": 0.01}},
    "nsr": {"loss": {"method": "nsr"}},
    "w_reinforce": {"loss": {"method": "w_reinforce"}},
}
TITLES = {
    "eapo": "EAPO, as the paper has it",
    "constant": "constant weight, EAPO's mean",
    "eapo_smoothed": "EAPO, smoothed and bounded",
    "grpo": "GRPO",
    "clip_higher": "GRPO, clip-higher",
    "entropy_bonus": "GRPO, entropy bonus",
    "nsr": "NSR",
    "w_reinforce": "W-REINFORCE",
}
TESTED, CONTROL = "eapo", "constant"
"""The pre-registered comparison. The control has the learning rate of the tested arm."""
SAMPLES = 16
LEARNING_RATES = (3e-5, 1e-4, 3e-4)
SEARCH_SEED, SEARCH_STEPS = 100, 100
"""Of the runs that choose a learning rate: the one with the highest pass@1 on held-out questions at their end."""


@dataclass(frozen=True)
class Size:
    """How much a run does.

    Attributes:
        steps, prompts, responses: of training; every step has new questions.
        questions: held-out ones of an evaluation, with ``SAMPLES`` answers each.
        every: steps between evaluations.
        minibatches: updates in a step; with one alone the ratio is 1 and clipping does nothing.
        model, dtype, device: as in the trainer's section model; the model is what is supervised first, an own
            one where it is empty.
    """

    steps: int = 200
    prompts: int = 16
    responses: int = 8
    questions: int = 200
    every: int = 40
    minibatches: int = 4
    model: str = ""
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Job:
    """One run. ``weight``: of the arm ``constant``."""

    arm: str
    lr: float
    seed: int
    steps: int
    weight: float | None = None

    def config(self, size: Size, model: Path) -> Config:
        """The trainer's configuration of this run."""
        table: dict[str, Any] = {name: dict(section) for name, section in ARMS[self.arm].items()}
        if self.weight is not None:
            table["eapo"]["scale"] = self.weight
        return Config.model_validate(
            {
                **table,
                "seed": self.seed,
                "steps": self.steps,
                "model": {"path": str(model), "dtype": size.dtype, "device": size.device},
                "rollout": {
                    "prompts": size.prompts, "responses": size.responses, "max_new_tokens": LONGEST, "batch": 512,
                },
                "optim": {"lr": self.lr, "warmup_steps": 5, "minibatches": size.minibatches, "micro_batch_tokens": 4096},
            }
        )  # fmt: skip
