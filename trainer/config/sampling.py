"""Section rollout: how completions are sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from .section import Count, Decay, Natural, NonNegative, Positive, Section

if TYPE_CHECKING:
    from ..records import Sampling

PositiveShare = Annotated[float, Field(gt=0, le=1)]


class VllmConfig(Section):
    """The engine ``vllm``: one in every process, on the device of the trained model, with its own copy of the weights."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the engine's weights and computation; auto is model.dtype. With another dtype than the trainer's, the engine
    samples from a different distribution: set loss.importance_cap."""
    gpu_memory_utilization: PositiveShare = 0.4
    """Share of the GPU's memory for the engine's weights and KV cache; the trainer uses the rest."""
    kv_cache_gib: NonNegative = 0.0
    """Memory of the KV cache; 0 is what gpu_memory_utilization leaves, on a CPU 1 GiB."""
    max_num_seqs: Natural = 0
    """Most completions computed at once by one engine; 0 is vLLM's own default (256, on an H100 1024)."""
    tensor_parallel_size: Count = 1
    """Consecutive processes of torchrun that hold one copy of the engine's weights together and sample the same completions."""
    max_model_len: Natural = 0
    """Longest prompt and completion together; 0 is data.max_prompt_tokens + rollout.max_new_tokens, or the model's limit if
    that is smaller."""
    enforce_eager: bool = False
    """Disable compilation and CUDA graphs: faster start, slower generation. Always set on a CPU."""
    sleep_level: Annotated[int, Field(ge=0, le=2)] = 2
    """Memory that the engine frees between rollouts on a GPU. 0: none. 1: the KV cache, and the weights by moving them to host
    memory, once for every process. 2: both; the weights are discarded and copied from the trainer again, which every step does
    in any case."""


class RolloutConfig(Section):
    """How completions are sampled."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """transformers generates with the trained module itself; vllm has a copy of the weights that is updated after every
    step."""
    prompts: Count = 4
    """Prompts in a step."""
    responses: Annotated[int, Field(ge=2)] = 8
    """Completions of each prompt, at least 2; together they form one group."""
    max_new_tokens: Count = 128
    """A completion without an end-of-sequence token within this length is truncated."""
    temperature: Positive = 1.0
    """Sampling temperature. Log-probs, entropy and loss use the same one."""
    top_p: PositiveShare = 1.0
    """Nucleus sampling: the fewest tokens whose probabilities add up to this; 1 is no limit."""
    top_k: Natural = 0
    """Sample from the k most probable tokens; 0 is no limit."""
    min_p: Decay = 0.0
    """Sample from the tokens with at least this share of the largest probability; 0 is no limit. transformers applies top_k,
    top_p and min_p in this order, vLLM min_p first."""
    record_support: bool = True
    """Where top_p, top_k or min_p removes tokens, record those that were left. Log-probs, entropy and loss are then those of
    the sampled distribution. False: those of the whole vocabulary, and the ratio to the engine starts at the probability that
    was left (rollout/ratio_at_start) instead of 1."""
    resample_rounds: Natural | None = None
    """Groups whose rewards are all equal have no gradient. They are replaced by groups of other prompts in at most this number
    of additional draws, each of as many prompts as a step has (DAPO's dynamic sampling, arXiv:2503.14476). None: 2 for the
    method dapo, 0 for others."""
    batch: Count = 64
    """Most completions generated at once."""
    vllm: VllmConfig = VllmConfig()

    def sampling(self, responses: int, seed: int) -> Sampling:
        """These settings with a number of responses and a seed."""
        from ..records import Sampling

        return Sampling(
            responses, self.max_new_tokens, self.temperature, self.top_p, seed, self.top_k, self.min_p, self.record_support
        )
