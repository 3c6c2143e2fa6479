"""What a model's tables hold, compared with the tokens that a run will put into it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..dataset import PromptSet
from ..errors import DataError, ModelError


def load_tokenizer(directory: Path, key: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer of a model's directory.

    Raises:
        ModelError: there is none that transformers can load.
    """
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (ImportError, ValueError, OSError, KeyError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{key}: expected a tokenizer in {directory}, got: {reason}") from error


def token_rows(model: Any) -> int:
    """Rows of the input embedding: token ids must be smaller."""
    return int(model.get_input_embeddings().weight.shape[0])


def positions(model: Any) -> tuple[int | None, int | None]:
    """Longest sequences of a transformers model: what its tables of learned positions hold (None: it has
    none), and what its configuration states (None: nothing).
    """
    config = model.config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not stated:
        return None, None
    held = []
    tables = [(name, m.weight, m.padding_idx) for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    tables += [(name, buffer, None) for name, buffer in model.named_buffers()]  # GPT-J's
    for name, table, padding in tables:
        named = re.search(r"pos|wpe", name.rsplit(".", 1)[-1])
        if named and table.ndim == 2 and table.is_floating_point() and 0 <= table.shape[0] - stated <= 8:
            held.append(stated if padding is None else min(stated, table.shape[0] - padding - 1))  # RoBERTa's start later
    return min(held, default=None), stated


def number(config: Any, name: str, default: int) -> int:
    """A number of a model's configuration, of several layers the largest."""
    value = getattr(config, name, None) or default
    return int(max(value) if isinstance(value, list | tuple) else value)


def heads_of(config: Any) -> tuple[int, int]:
    """Attention heads of a layer, and the width of one. A state-space model counts as one head."""
    heads = number(config, "num_attention_heads", 1)
    return heads, number(config, "head_dim", config.hidden_size // heads)


def check_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    new_tokens: int,
    report: Callable[[str], None],
) -> None:
    """Compare encoded prompts, and their completions of ``new_tokens``, with what ``model`` holds. Positions
    beyond those that the configuration states are reported in one line.

    Raises:
        DataError: an id beyond the embedding, or more tokens than learned positions.
    """
    rows, setting = token_rows(model), prompts.setting
    for number, ids in enumerate(prompts.ids):
        if (most := max(ids)) >= rows:
            expected = f"token ids below the {rows} rows of the model's embedding"
            what = f"{most} ({tokenizer.convert_ids_to_tokens(most)!r}) in prompt {number}"
            cure = "a token was added to the tokenizer: resize the model (resize_token_embeddings) and save both"
            raise DataError(f"{setting}: expected {expected}, got {what}; {cure}")
    longest = max(map(len, prompts.ids))
    held, stated = positions(model)
    if held is not None and longest + new_tokens > held:
        expected = f"prompt and completion within the {held} learned positions of {type(model).__name__}"
        raise DataError(f"{setting}: expected {expected}, got {longest} tokens and rollout.max_new_tokens = {new_tokens}")
    if stated is not None and longest + new_tokens > stated:
        report(
            f"advice: {setting}: {longest} tokens of a prompt and rollout.max_new_tokens = {new_tokens} exceed the {stated} "
            "positions of the model's configuration; beyond them it was not trained"
        )
