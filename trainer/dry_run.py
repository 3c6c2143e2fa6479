"""Before a run: a check of everything that needs no weights, and its memory, estimated from the
model's configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from eapo_kernels.integrations.own_logits import causal_lm
from eapo_kernels.ops.chunking import default_budget

from . import ranks
from .config import Config
from .dataset import PromptSampler, PromptSet, load_prompts
from .errors import ConfigError
from .learning.experience import teacher_prompts
from .learning.learner import check_optimizer, moment_bytes
from .models.embedded import resolve
from .models.limits import check_prompts, heads_of, load_tokenizer, number
from .models.policy import find_device, load_model
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


def estimate(config: Config, processes: int, model: PreTrainedModel | PeftModel, prompt: int) -> Estimate:
    """The memory of each of ``processes``. Weights, gradients and AdamW are exact; activations, KV
    cache and gathered layers are calculated from the shapes. prompt: tokens of the longest one.
    """
    device = find_device(config.model.device, "model.device")
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    text, rollout, own = model.config.get_text_config(), config.rollout, config.rollout.vllm
    width = getattr(torch, config.model.dtype).itemsize
    adapted = any(not p.requires_grad for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    blocks = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    root = trained + frozen - sum(sizes)  # embedding, head, last norm

    layers, hidden = text.num_hidden_layers, text.hidden_size
    heads, head = heads_of(text)
    inner = number(text, "intermediate_size", 4 * hidden)  # GPT-2's configuration leaves it out
    cached = 2 * layers * number(text, "num_key_value_heads", heads) * head  # numbers of the KV cache, a token
    stream = width if adapted else 4  # the residual stream follows the embedding
    layer = width * (4 * hidden + 2 * heads * head + cached / layers + 4 * inner) + 2 * stream * hidden
    longest = prompt + rollout.max_new_tokens
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
    else:
        wide = width if own.dtype == "auto" else getattr(torch, own.dtype).itemsize
        together = own.tensor_parallel_size
        copy = wide * (frozen if adapted else trained) / together
        asked = wide * cached * longest * min(share * together, own.max_num_seqs or 256) / together
        cache = own.kv_cache_gib * GIB or (GIB if memory is None else max(own.gpu_memory_utilization * memory - copy, 0.0))
        rollouts = {"vLLM's weights": copy, f"vLLM's KV cache ({asked / GIB:.1f} GiB hold all at full length)": cache}
        if memory is None or own.sleep_level == 0:  # it never frees them
            always, rollouts = {**always, **rollouts}, {}
    each = f"each of {processes} processes" if processes > 1 else "one process"
    title = f"memory of {each}, estimated ({trained + frozen:,} weights, {trained:,} of them trained):"
    return Estimate(title, always, update, rollouts, memory)


def prepare(
    config: Config, processes: int, report: Callable[[str], None] = print
) -> tuple[PromptSet, PromptSet | None, Estimate]:
    """Check everything that needs no weights: rewards, optimizer, engine, data, and the prompts against
    what the model's tables hold. All ranks call it.

    Returns:
        The encoded training and held-out prompts (None without ``data.eval``), and the memory of each
        process.

    Raises:
        TrainerError: what a run would raise about them.
    """
    check_functions(config.rewards)
    check_optimizer(config.optim)
    if config.rollout.engine == "vllm" and find_spec("vllm") is None:
        raise ConfigError("rollout.engine: expected an installed vllm (pip install '.[train,vllm]'), got none")
    train_set = load_prompts(config.data, "train")
    held_out = load_prompts(config.data, "eval") if config.data.eval else None
    tokenizer = load_tokenizer(ranks.run_on_main(lambda: resolve(config.model.path, config.model.cache, weights=False)))
    model = skeleton_of(config)
    train_set = train_set.encoded(tokenizer, config.data, report)
    held_out = held_out and held_out.encoded(tokenizer, config.data, report)
    given = [train_set, *([held_out] if held_out else [])]
    longest = max(len(ids) for prompts in given for ids in prompts.ids)
    if (weighting := config.method().token_weighting) and "teacher_logp" in weighting.needs:
        columns = train_set.columns()
        taught = teacher_prompts(config.data, columns["prompt"], columns["answer"], tokenizer)
        given.append(PromptSet(train_set.rows, "data.teacher_prompt", taught))
    for prompts in given:
        check_prompts(causal_lm(model), tokenizer, prompts, config.rollout.max_new_tokens, report)
    return train_set, held_out, estimate(config, processes, model, longest)


def skeleton_of(config: Config) -> PreTrainedModel | PeftModel:
    """The model with its adapters, without memory for its weights."""
    with torch.device("meta"):
        return load_model(config.model, config.lora, seed=0, device=None)


def dry_run(config: Config, processes: int) -> None:
    """Print what a run would need, without loading weights.

    Raises:
        TrainerError: as the run would.
    """
    train_set, held_out, found = prepare(config, processes)
    PromptSampler(len(train_set), config.rollout.prompts, config.seed)
    for prompts in filter(None, (train_set, held_out)):
        print(f"{prompts.setting}: {len(prompts)} prompts of at most {max(map(len, prompts.ids))} tokens")
    print(f"rewards: {', '.join(config.rewards.functions)}; engine: {config.rollout.engine}")
    print(found.table())
