"""Sections optim, eval, log and checkpoint: optimizer, evaluation, trackers and checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import Count, Decay, Natural, NonNegative, Positive, Section


class OptimConfig(Section):
    """AdamW, and how a step's completions are split into updates."""

    lr: Positive = 1e-6
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw keeps its moments in fp32, 8 bytes a trained weight. adamw_8bit is torchao's (arXiv:2110.02861): 8-bit numbers in
    blocks of 256 with one scale, 2.03 bytes; tensors of less than 4096 weights or a part of a block stay in fp32."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this global norm."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine ends at a tenth of the peak."""
    warmup_steps: Natural = 0
    """Steps of linear warm-up."""
    minibatches: Count = 1
    """Optimizer updates in one pass over the completions of a step; with more than one the later updates are off-policy."""
    epochs: Count = 1
    """Passes over the step's completions."""
    old_logp: Literal["auto", "always"] = "auto"
    """always measures the old log-probs and H with a forward pass over all completions before the
    update. auto leaves it out where it changes nothing but rounding: one minibatch and epoch, an engine
    that records entropies (transformers), a method without token weights and importance_cap. Then the
    engine's log-probs are compared with the trainer's on one completion of each group."""
    micro_batch_tokens: Count = 8192
    """Most tokens, padding included, in one forward pass. It determines memory and speed, not the result."""


class EvalConfig(Section):
    """Evaluation before and after training, with the sampling of ``rollout`` and a separate seed."""

    responses: Annotated[int, Field(ge=2)] = 4
    """Completions to each prompt, at least 2: diversity compares them."""
    greedy: bool = False
    """One completion to each prompt, of the most probable tokens, in the place of ``responses`` samples: cheaper, and
    without pass@k and diversity."""
    train_prompts: Natural = 0
    """Also evaluate on the first N training prompts."""
    first: bool = True
    """Evaluate before the first step, too."""
    every: Natural = 0
    """Also evaluate after every N steps; 0 evaluates only before and after training."""
    resamples: Count = 2000
    """Bootstrap resamples (of prompts) behind the 95 % confidence intervals."""


class LogConfig(Section):
    """Output, and trackers beside the run's own files (``metrics.jsonl`` is always written)."""

    heartbeat: NonNegative = 60.0
    """Without a terminal, seconds of silence after which a line says what a step is doing; 0 for never."""
    tensorboard: bool = False
    """Write TensorBoard's event files to <run>/tensorboard (pip install '.[track]')."""
    wandb: bool = False
    """Log to Weights & Biases (pip install '.[track]'); WANDB_MODE=offline keeps it on this machine."""
    wandb_project: Annotated[str, Field(min_length=1)] = "eapo"
    """The project there."""


class CheckpointConfig(Section):
    """Checkpoints in <out>/<name>/checkpoints, from which a run resumes exactly."""

    every: Natural = 50
    """Steps between checkpoints; a last one is written at the end and on interruption. 0 writes none."""
    keep: Count = 2
    """Number of latest checkpoints that are kept."""
