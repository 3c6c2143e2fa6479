"""Before a run: its memory, estimated from the model's configuration, and a check of everything that
needs no weights.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from eapo_kernels.integrations.own_logits import causal_lm
from eapo_kernels.ops.chunking import default_budget

from .config import Config
from .dataset import PromptSampler, load_prompts
from .errors import ConfigError, ModelError
from .learning.learner import check_optimizer, moment_bytes
from .models.embedded import base_of_adapter, resolve
from .models.limits import check_prompts, load_tokenizer
from .models.policy import find_device, with_adapters
from .rewards.scoring import check_functions

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes of each process.

    Attributes:
        title: the model and its numbers of weights.
        always: use -> bytes that stay for the whole run.
        update, rollouts: what comes on top while the policy is updated, and while it samples.
        memory: bytes of the GPU, None on a CPU.
    """

    title: str
    always: dict[str, float]
    update: dict[str, float]
    rollouts: dict[str, float]
    memory: int | None

    def line(self) -> str:
        """Both sums in one line."""
        update, rollouts = (sum({**self.always, **own}.values()) / GIB for own in (self.update, self.rollouts))
        of = f" (the GPU has {self.memory / GIB:.1f})" if self.memory else ""
        return f"memory of a process, estimated: {update:.2f} GiB in the update, {rollouts:.2f} GiB in rollouts{of}"

    def table(self) -> str:
        """One row for each use, with the sums."""
        lines = [self.title]
        for name, own in (("always", self.always), ("update", self.update), ("rollouts", self.rollouts)):
            lines += [f"  {name:<9} {use:<52} {size / GIB:9.3f} GiB" for use, size in own.items()]
        return "\n".join([*lines, self.line()])


def estimate(config: Config, processes: int) -> Estimate:
    """The memory of each of ``processes``. Weights, gradients and AdamW are exact; activations, KV
    cache and gathered layers are calculated from the shapes.

    Raises:
        ModelError: no configuration of a causal language model.
    """
    device = find_device(config.model.device, "model.device")
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    model = _skeleton(config)
    text, rollout, own = model.config.get_text_config(), config.rollout, config.rollout.vllm
    width = getattr(torch, config.model.dtype).itemsize
    adapted = any(not p.requires_grad for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    blocks = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    root = trained + frozen - sum(sizes)  # embedding, head, last norm

    layers, hidden = text.num_hidden_layers, text.hidden_size
    heads = _number(text, "num_attention_heads", 1)  # a state-space model has none
    inner = _number(text, "intermediate_size", 4 * hidden)  # GPT-2's configuration leaves it out
    head = _number(text, "head_dim", hidden // heads)
    cached = 2 * layers * _number(text, "num_key_value_heads", heads) * head  # numbers of the KV cache, a token
    stream = width if adapted else 4  # the residual stream follows the embedding
    layer = width * (4 * hidden + 2 * heads * head + cached / layers + 3 * inner) + 2 * stream * hidden
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    share = -(-rollout.prompts * rollout.responses // processes)
    tokens = max(min(config.optim.micro_batch_tokens, share * longest), longest)
    kept = layers * stream * hidden + layer if config.model.gradient_checkpointing else layers * layer

    always = {
        "weights": (4 * trained + (width if adapted else 4) * frozen) / processes,
        "AdamW": moment_bytes((p for p in model.parameters() if p.requires_grad), config.optim, processes),
    }
    if config.method().config.kl_coef:
        always["reference weights"] = 4 * trained / processes
    update = {
        "gradients": 4 * trained / processes,
        f"activations of {tokens} tokens": tokens * kept,
        "logits in chunks": float(default_budget(memory)),
    }
    if processes > 1:
        update["gathered layers"] = 2 * width * max(sizes, default=0) + 4 * root
    if rollout.engine == "transformers":
        rollouts = {"KV cache": float(width * cached * longest * min(rollout.batch, share))}
        if processes > 1:
            rollouts["all weights gathered"] = float(width * sum(sizes) + 4 * root)
        return Estimate(_title(trained, frozen, processes), always, update, rollouts, memory)
    wide = width if own.dtype == "auto" else getattr(torch, own.dtype).itemsize
    together = own.tensor_parallel_size
    copy = wide * (frozen if adapted else trained) / together
    asked = wide * cached * longest * min(share * together, own.max_num_seqs or 256) / together
    cache = own.kv_cache_gib * GIB or (GIB if memory is None else max(own.gpu_memory_utilization * memory - copy, 0.0))
    engine = {"vLLM's weights": copy, f"vLLM's KV cache ({asked / GIB:.1f} GiB hold all at full length)": cache}
    asleep = memory is not None and own.sleep_level > 0
    return Estimate(
        _title(trained, frozen, processes), always if asleep else {**always, **engine}, update,
        engine if asleep else {}, memory,
    )  # fmt: skip


def _number(config: Any, name: str, default: int) -> int:
    """A number of the model's configuration, of several layers the largest."""
    value = getattr(config, name, None) or default
    return int(max(value) if isinstance(value, list | tuple) else value)


def _title(trained: int, frozen: int, processes: int) -> str:
    each = f"each of {processes} processes" if processes > 1 else "one process"
    return f"memory of {each}, estimated ({trained + frozen:,} weights, {trained:,} of them trained):"


def _skeleton(config: Config) -> Any:
    """The model with its adapters, without memory for its weights."""
    directory = resolve(config.model.path, config.model.cache, weights=False)
    adapted = base_of_adapter(directory, config.model.cache, weights=False)
    base = adapted or directory
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore", category=FutureWarning):  # as in ``load_policy``
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
            if adapted:
                peft = PeftConfig.from_pretrained(directory)
                peft.inference_mode, peft.base_model_name_or_path = False, str(base)
                return get_peft_model(model, peft)
            return with_adapters(model, config.lora, 0) if config.lora.rank else model
    except (ImportError, ValueError, OSError) as error:
        raise ModelError(f"model.path: expected a causal language model in {base}, got: {error}") from error


def check_parts(config: Config) -> None:
    """Raise what the run would raise about rewards, optimizer and engine, without loading a model.

    Raises:
        ConfigError: a reward that cannot be imported or lacks its package or key, no torchao, or no vLLM.
    """
    check_functions(config.rewards)
    check_optimizer(config.optim)
    if config.rollout.engine == "vllm" and find_spec("vllm") is None:
        raise ConfigError("rollout.engine: expected an installed vllm (pip install '.[train,vllm]'), got none")


def dry_run(config: Config, processes: int) -> None:
    """Check rewards, engine and data, and print the estimate, without loading weights.

    Raises:
        TrainerError: as the run would.
    """
    check_parts(config)
    tokenizer = load_tokenizer(resolve(config.model.path, config.model.cache, weights=False))
    model = causal_lm(_skeleton(config))
    for which in ("train", "eval"):
        if getattr(config.data, which):
            found = load_prompts(config.data, which).encoded(tokenizer, config.data)
            check_prompts(model, tokenizer, found, config.rollout.max_new_tokens, print)
            print(f"data.{which}: {len(found)} prompts of at most {max(map(len, found.ids))} tokens")
            if which == "train":
                PromptSampler(len(found), config.rollout.prompts, config.seed)
    print(f"rewards: {', '.join(config.rewards.functions)}; engine: {config.rollout.engine}")
    print(estimate(config, processes).table())
