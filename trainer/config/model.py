"""Sections model, lora and data: the model to train, and the prompts."""

from __future__ import annotations

from typing import Literal

from .section import Count, Natural, Positive, Section


class ModelConfig(Section):
    """The language model that is trained."""

    path: str = "smollm2-135m"
    """A directory in Hugging Face format (a model, or an adapter saved by a run), or the name of an embedded model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; the trained weights themselves always stay in fp32."""
    attention: str = "auto"
    """Attention implementation as transformers names it: sdpa, eager, flash_attention_2; auto is flash_attention_2 on a GPU
    with flash-attn installed and dtype bfloat16, else sdpa."""
    device: str = "auto"
    """auto (cuda where there is one, else cpu), cpu, cuda, or cuda:N."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    cache: str = "~/.cache/eapo_kernels"
    """Directory of converted embedded models."""


class LoraConfig(Section):
    """Low-rank adapters (arXiv:2106.09685) through peft."""

    rank: Natural = 0
    """Rank of the adapters; 0 trains every weight of the model."""
    alpha: Positive = 32.0
    """The adapters' output is scaled by alpha / rank."""
    layers: tuple[Natural, ...] = ()
    """Numbers of the layers that get adapters; empty means all of them."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear modules that get adapters. The output head cannot be one of them."""


class DataConfig(Section):
    """Training prompts and held-out prompts."""

    train: str = ""
    """JSONL or Parquet with the columns prompt (text or chat messages) and answer; all other columns go to the rewards."""
    eval: str = ""
    """Held-out prompts in the same format; empty for none."""
    train_limit: Natural = 0
    """Use only the first N training prompts; 0 means all."""
    eval_limit: Natural = 0
    """Use only the first N held-out prompts; 0 means all."""
    system_prompt: str = ""
    """System message before every text prompt; empty keeps the chat template's default."""
    max_prompt_tokens: Count = 1024
    """A longer prompt is an error, because truncation would silently change it."""
    answer_marker: str = "</think>"
    """Text that ends the reasoning: the final answer is what follows it (pear)."""
    teacher_prompt: str = "{prompt}\n\nA correct answer: {answer}\n\n"
    """Template of the prompt from which trace computes its teacher log-probs: the policy is also shown the reference
    answer."""
