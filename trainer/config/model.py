"""Sections model, lora and data: the model to train, and the prompts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from .section import Count, Natural, Positive, Section


class ModelConfig(Section):
    """The language model that is trained."""

    path: str = "smollm2-135m"
    """A folder in Hugging Face format (a model, or an adapter saved by a run), an id of the hub (Qwen/Qwen3-4B), or the name
    of an embedded model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; the trained weights themselves always stay in fp32."""
    attention: str = "auto"
    """Attention implementation as transformers names it: sdpa, eager, flash_attention_2, flash_attention_3. auto is flash
    attention where its package is installed, dtype is bfloat16 and the model's class supports it (3 on Hopper), else
    transformers' choice: sdpa, or eager for a model that sdpa cannot compute (Gemma 2)."""
    packing: Literal["auto", "always", "never"] = "auto"
    """A micro-batch is one row of sequences without padding (always), or a row for each, padded to the longest (never).
    auto packs with flash attention: sdpa would compute the attention between all sequences of the row and mask it."""
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


class ColumnsConfig(Section):
    """Names of the columns in the data. A dot leads into a nested one: reward_model.ground_truth."""

    prompt: str = "prompt"
    """Text, or chat messages with role and content."""
    answer: str = "answer"
    """The reference answer; empty where the data have none."""


class DataConfig(Section):
    """Training prompts and held-out prompts. All columns go to the rewards."""

    train: str = ""
    """A JSONL, JSON, CSV or Parquet file, a folder of such files, or a dataset of the Hugging Face hub: ID, ID:SPLIT or
    ID:CONFIG:SPLIT (openai/gsm8k:main:train; a part is train[:200])."""
    eval: str = ""
    """Held-out prompts, in the same way; empty for none."""
    train_limit: Natural = 0
    """Use only the first N training prompts; 0 means all."""
    eval_limit: Natural = 0
    """Use only the first N held-out prompts; 0 means all."""
    columns: ColumnsConfig = ColumnsConfig()
    answer_after: str = ""
    """The reference answer is what follows the last occurrence of this text in its column: "####" for GSM8K."""
    prompt_template: str = "{prompt}"
    """Text of every prompt, in which {prompt} is the column's (of messages the last one's)."""
    system_prompt: str = ""
    """System message before every text prompt (without a chat template: text and an empty line); empty keeps the chat
    template's default."""
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(default={})
    """Keywords of the chat template: enable_thinking = false for Qwen3."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are left out, and counted in one line: truncation would silently change them."""
    answer_marker: str = "</think>"
    """Text that ends the reasoning: the final answer is what follows it (pear)."""
    teacher_prompt: str = "{prompt}\n\nA correct answer: {answer}\n\n"
    """Template of the prompt from which trace computes its teacher log-probs: the policy is also shown the reference
    answer."""

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _truth(cls, value: Any) -> Any:
        """In the text of a flag true and false are no text."""
        words = {"true": True, "false": False}
        return {k: words.get(str(v).lower(), v) for k, v in value.items()} if isinstance(value, dict) else value
