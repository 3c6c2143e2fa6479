"""Sections optim, eval, log and checkpoint: optimizer, evaluation, trackers and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import check


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, and how a step's completions are split into updates."""

    lr: float = 1e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine ends at a tenth of the peak."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    minibatches: int = 1
    """Optimizer updates in one pass over the completions of a step; with more than one the later
    updates are off-policy."""
    epochs: int = 1
    """Passes over the step's completions."""
    old_logp: Literal["auto", "always"] = "auto"
    """always measures the old log-probs and H with a forward pass over all completions before the
    update. auto leaves it out where it changes nothing but rounding: one minibatch and epoch, an engine
    that records entropies (transformers), a method without token weights and importance_cap. Then the
    engine's log-probs are compared with the trainer's on one completion of each group."""
    micro_batch_tokens: int = 8192
    """Most padded tokens in one forward pass. It determines memory and speed, not the result."""

    def __post_init__(self) -> None:
        check(self.lr > 0, "optim.lr", "a positive number", self.lr)
        check(self.max_grad_norm > 0, "optim.max_grad_norm", "a positive number", self.max_grad_norm)
        check(self.warmup_steps >= 0, "optim.warmup_steps", "at least 0", self.warmup_steps)
        check(self.minibatches >= 1, "optim.minibatches", "at least 1", self.minibatches)
        check(self.epochs >= 1, "optim.epochs", "at least 1", self.epochs)
        check(self.micro_batch_tokens >= 1, "optim.micro_batch_tokens", "at least 1", self.micro_batch_tokens)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation before and after training, with the sampling of ``rollout`` and a separate seed."""

    responses: int = 4
    """Completions to each prompt."""
    train_prompts: int = 0
    """Also evaluate on the first N training prompts."""
    every: int = 0
    """Also evaluate after every N steps; 0 evaluates only before and after training."""
    resamples: int = 2000
    """Bootstrap resamples (of prompts) behind the 95 % confidence intervals."""

    def __post_init__(self) -> None:
        check(self.responses >= 2, "eval.responses", "at least 2 (diversity compares completions)", self.responses)
        check(self.train_prompts >= 0, "eval.train_prompts", "at least 0", self.train_prompts)
        check(self.every >= 0, "eval.every", "at least 0", self.every)
        check(self.resamples >= 1, "eval.resamples", "at least 1", self.resamples)


@dataclass(frozen=True)
class LogConfig:
    """Trackers beside the run's own files (``metrics.jsonl`` is always written)."""

    tensorboard: bool = False
    """Write TensorBoard's event files to <run>/tensorboard (pip install '.[track]')."""
    wandb: bool = False
    """Log to Weights & Biases (pip install '.[track]'); WANDB_MODE=offline keeps it on this
    machine."""
    wandb_project: str = "eapo"
    """The project there."""

    def __post_init__(self) -> None:
        check(bool(self.wandb_project), "log.wandb_project", "a name", self.wandb_project)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints in <out>/<name>/checkpoints, from which a run resumes exactly."""

    every: int = 50
    """Steps between checkpoints; a last one is written at the end and on interruption. 0 writes
    none."""
    keep: int = 2
    """Number of latest checkpoints that are kept."""

    def __post_init__(self) -> None:
        check(self.every >= 0, "checkpoint.every", "at least 0", self.every)
        check(self.keep >= 1, "checkpoint.keep", "at least 1", self.keep)
