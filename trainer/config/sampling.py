"""Section rollout: how completions are sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..records import Sampling
from .checks import check


@dataclass(frozen=True)
class VllmConfig:
    """The engine ``vllm``: one in every process, on the device of the trained model, with its own
    copy of the weights.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the engine's weights and computation; auto is model.dtype. With another dtype
    than the trainer's, the engine samples from a different distribution: set
    loss.importance_cap."""
    gpu_memory_utilization: float = 0.4
    """Share of the GPU's memory for the engine's weights and KV cache; the trainer uses the
    rest."""
    kv_cache_gib: float = 0.0
    """Memory of the KV cache; 0 is what gpu_memory_utilization leaves, on a CPU 1 GiB."""
    max_num_seqs: int = 0
    """Most completions computed at once by one engine; 0 is vLLM's own default (256, on an H100 1024)."""
    tensor_parallel_size: int = 1
    """Consecutive processes of torchrun that hold one copy of the engine's weights together and sample the same
    completions."""
    max_model_len: int = 0
    """Longest prompt and completion together; 0 is data.max_prompt_tokens + rollout.max_new_tokens,
    or the model's limit if that is smaller."""
    enforce_eager: bool = False
    """Disable compilation and CUDA graphs: faster start, slower generation. Always set on a CPU."""
    sleep_level: Literal[0, 1, 2] = 2
    """Memory that the engine frees between rollouts on a GPU. 0: none. 1: the KV cache, and the
    weights by moving them to host memory, once for every process. 2: both; the weights are discarded
    and copied from the trainer again, which every step does in any case."""

    def __post_init__(self) -> None:
        share = self.gpu_memory_utilization
        check(0 < share <= 1, "rollout.vllm.gpu_memory_utilization", "in (0, 1]", share)
        check(self.kv_cache_gib >= 0, "rollout.vllm.kv_cache_gib", "at least 0", self.kv_cache_gib)
        check(self.max_num_seqs >= 0, "rollout.vllm.max_num_seqs", "at least 0", self.max_num_seqs)
        check(self.tensor_parallel_size >= 1, "rollout.vllm.tensor_parallel_size", "at least 1", self.tensor_parallel_size)
        check(self.max_model_len >= 0, "rollout.vllm.max_model_len", "at least 0", self.max_model_len)


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """transformers generates with the trained module itself; vllm has a copy of the weights that is
    updated after every step."""
    prompts: int = 4
    """Prompts in a step."""
    responses: int = 8
    """Completions of each prompt; together they form one group."""
    max_new_tokens: int = 128
    """A completion without an end-of-sequence token within this length is truncated."""
    temperature: float = 1.0
    """Sampling temperature. Log-probs, entropy and loss use the same one."""
    top_p: float = 1.0
    """Nucleus sampling: the fewest tokens whose probabilities add up to this; 1 is no limit."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0 is no limit."""
    min_p: float = 0.0
    """Sample from the tokens with at least this share of the largest probability; 0 is no limit.
    transformers applies top_k, top_p and min_p in this order, vLLM min_p first."""
    record_support: bool = True
    """Where top_p, top_k or min_p removes tokens, record those that were left. Log-probs, entropy
    and loss are then those of the sampled distribution. False: those of the whole vocabulary, and
    the ratio to the engine starts at the probability that was left (rollout/ratio_at_start)
    instead of 1."""
    batch: int = 64
    """Most completions that the engine transformers generates at once in one process."""
    vllm: VllmConfig = field(default_factory=VllmConfig)

    def __post_init__(self) -> None:
        check(self.prompts >= 1, "rollout.prompts", "at least 1", self.prompts)
        check(self.responses >= 2, "rollout.responses", "at least 2 (a group of one has no signal)", self.responses)
        check(self.max_new_tokens >= 1, "rollout.max_new_tokens", "at least 1", self.max_new_tokens)
        check(self.temperature > 0, "rollout.temperature", "a positive number", self.temperature)
        check(0 < self.top_p <= 1, "rollout.top_p", "in (0, 1]", self.top_p)
        check(self.top_k >= 0, "rollout.top_k", "at least 0", self.top_k)
        check(0 <= self.min_p < 1, "rollout.min_p", "in [0, 1)", self.min_p)
        check(self.batch >= 1, "rollout.batch", "at least 1", self.batch)

    def sampling(self, responses: int, seed: int) -> Sampling:
        """These settings with a number of responses and a seed."""
        return Sampling(
            responses, self.max_new_tokens, self.temperature, self.top_p, seed, self.top_k, self.min_p, self.record_support
        )
