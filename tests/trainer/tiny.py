"""A tiny language model and its tokenizer, both made in code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.config import (
    Config,
    DataConfig,
    EntropyWeightConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RewardsConfig,
    RolloutConfig,
)  # fmt: skip
from trainer.models.policy import Policy
from trainer.records import Rollouts, Sampling, Tick

WORDS = ["<pad>", "<eos>", "<unk>", "user:", "assistant:", "what", "is", "after", "?", *(f"n{i}" for i in range(40))]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


# Three steps show nothing of a weight that is anchored for ten.
PAPER = EntropyWeightConfig(ema=0, low=0, high=math.inf, anchor_steps=1)


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = TEMPLATE if chat else None
    return fast


def make_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    ids = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    torch.manual_seed(seed)
    # A larger spread than the default, so that the random model is not uniform and mistakes show.
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **ids, "initializer_range": 0.2, **changes})).eval()


def tiny_config(model: Path, prompts: Path, out: Path) -> Config:
    """Three steps on a tiny model with a held-out set."""
    return Config(
        name="tiny",
        out=str(out),
        steps=3,
        diagnose_every=1,
        model=ModelConfig(path=str(model), device="cpu"),
        data=DataConfig(train=str(prompts), eval=str(prompts), train_limit=8, eval_limit=2),
        rollout=RolloutConfig(prompts=3, responses=4, max_new_tokens=6),
        rewards=RewardsConfig(functions=("reward_functions:low_numbers",)),
        eapo=PAPER,
        optim=OptimConfig(lr=1e-2),
        eval=EvalConfig(responses=3),
    )


def without_report(patch: pytest.MonkeyPatch) -> None:
    """The loop draws no report, which takes longer than the steps of a tiny model."""
    patch.setattr("trainer.loop.write_report", lambda *_, **__: (Path("curves.png"), Path("report.md")))
    patch.setattr("trainer.loop.summary_table", lambda *_, **__: "")


@contextmanager
def raised_by(target: str, call: int, error: Exception) -> Iterator[None]:
    """``error`` at call number ``call`` (from 1) of the function ``target``."""
    real, left = resolve_name(target), call

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise error
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, counted)
        yield


def no_tick(done: int, total: int) -> None:
    """Ignore progress."""


class GivenCompletions:
    """A rollout engine whose completions depend on the seed alone, with a log-prob of 0 for every
    token.

    Sampling from a model turns a rounding difference into another token. With given tokens every
    logged number is a continuous function of the weights.
    """

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, tick: Tick) -> Rollouts:
        random = np.random.default_rng(sampling.seed)
        repeated = [prompt for prompt in prompts for _ in range(sampling.responses)]
        lengths = random.integers(1, sampling.max_new_tokens, size=len(repeated), endpoint=True)
        ids = [random.integers(WORDS.index("n0"), len(WORDS), size=length).tolist() for length in lengths]
        return Rollouts(repeated, ids, [torch.zeros(length) for length in lengths], [True] * len(ids))

    def sync_weights(self, policy: Policy) -> None: ...

    def close(self) -> None: ...
