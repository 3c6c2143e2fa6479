"""Section rollout: how answers are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .checks import check


@dataclass(frozen=True)
class VllmConfig:
    """The engine ``vllm``: in this process, on the trained model's device, with its own copy of the weights."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the engine's weights and computation; auto is model.dtype. With another one than the trainer's it samples
    from another distribution: set loss.importance_cap."""
    gpu_memory_utilization: float = 0.4
    """Share of the GPU's memory for the engine, weights and KV cache; the trainer needs the rest beside it."""
    kv_cache_gib: float = 0.0
    """Memory of the KV cache; 0 is what gpu_memory_utilization leaves, on a CPU 1 GiB."""
    max_model_len: int = 0
    """Longest question and answer together; 0 is data.max_prompt_tokens + rollout.max_new_tokens, or the model's limit."""
    enforce_eager: bool = False
    """Neither compilation nor CUDA graphs: a start without minutes of waiting, slower generation. On a CPU always so."""
    sleep_level: Literal[0, 1, 2] = 1
    """What the engine leaves to the trainer between rollouts on a GPU: 0 nothing; 1 the KV cache's memory, and the weights' by
    keeping them in the machine's; 2 both, the weights are thrown away and taken from the trainer again."""

    def __post_init__(self) -> None:
        share = self.gpu_memory_utilization
        check(0 < share <= 1, "rollout.vllm.gpu_memory_utilization", "in (0, 1]", share)
        check(self.kv_cache_gib >= 0, "rollout.vllm.kv_cache_gib", "at least 0", self.kv_cache_gib)
        check(self.max_model_len >= 0, "rollout.vllm.max_model_len", "at least 0", self.max_model_len)


@dataclass(frozen=True)
class RolloutConfig:
    """How answers are sampled."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """The engine that generates: transformers with the trained module itself, or vllm with a copy that follows it."""
    prompts: int = 4
    """Questions a step."""
    responses: int = 8
    """Answers to each question; together they form one group."""
    max_new_tokens: int = 128
    """An answer that has not ended by then is truncated."""
    temperature: float = 1.0
    """Sampling temperature. Log-probs, entropy and loss use the same one."""
    top_p: float = 1.0
    """Nucleus sampling; below 1 the engine's log-probs are those of the cut distribution, so a mismatch is logged."""
    batch: int = 64
    """Most answers generated at once."""
    vllm: VllmConfig = field(default_factory=VllmConfig)

    def __post_init__(self) -> None:
        check(self.prompts >= 1, "rollout.prompts", "at least 1", self.prompts)
        check(self.responses >= 2, "rollout.responses", "at least 2 (a group of one has no signal)", self.responses)
        check(self.max_new_tokens >= 1, "rollout.max_new_tokens", "at least 1", self.max_new_tokens)
        check(self.temperature > 0, "rollout.temperature", "a positive number", self.temperature)
        check(0 < self.top_p <= 1, "rollout.top_p", "in (0, 1]", self.top_p)
        check(self.batch >= 1, "rollout.batch", "at least 1", self.batch)
