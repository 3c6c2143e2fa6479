"""Prompts from JSONL or Parquet, the chat template, and the sampler."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from datasets import logging as datasets_logging
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from .config import DataConfig
from .errors import DataError

Prompt = str | list[dict[str, str]]
"""Text, or chat messages with the keys role and content."""


@dataclass(frozen=True)
class PromptSet:
    """Rows of a data file.

    Attributes:
        rows: one mapping a prompt, column name -> value; always with ``prompt`` and ``answer``.
        source: the file they were read from, for messages.
    """

    rows: Sequence[Mapping[str, Any]]
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    def head(self, count: int) -> PromptSet:
        """The first ``count`` prompts."""
        return PromptSet(self.rows[:count], self.source)

    def columns(self, indices: Sequence[int], repeats: int) -> dict[str, list[Any]]:
        """Columns of the chosen rows, each row ``repeats`` times in a row, as reward functions
        receive them.
        """
        chosen = [self.rows[i] for i in indices for _ in range(repeats)]
        return {name: [row[name] for row in chosen] for name in chosen[0]}


def load_prompts(path: str, limit: int = 0) -> PromptSet:
    """Read ``path`` (.jsonl, .json or .parquet; ``limit`` > 0 keeps the first rows).

    Raises:
        DataError: the file is missing, empty, unreadable or of another format, or lacks a column.
    """
    file = Path(path)
    readers = {".jsonl": Dataset.from_json, ".json": Dataset.from_json, ".parquet": Dataset.from_parquet}
    if not file.is_file():
        raise DataError(f"data: expected a file, got {path}")
    if file.suffix not in readers:
        raise DataError(f"data: expected a file ending in {', '.join(readers)}, got {path}")
    if file.stat().st_size == 0:
        raise DataError(f"data: expected at least one row, got the empty file {path}")
    disable_progress_bars()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)  # its errors are raised as well
    try:
        table = readers[file.suffix](str(file))
    except (DatasetsError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"data: expected rows that datasets can read, got {path} ({reason})") from error
    for column in ("prompt", "answer"):
        if column not in table.column_names:
            raise DataError(f"data: expected a column {column!r} in {path}, got {', '.join(table.column_names)}")
    for column in {"prompts", "completions", "completion_ids"} & set(table.column_names):
        raise DataError(f"data: expected no column with a name that reward functions use already, got {column!r} in {path}")
    rows = list(table.select(range(min(limit, len(table)))) if limit else table)
    if not rows:
        raise DataError(f"data: expected at least one row, got none in {path}")
    for number, row in enumerate(rows):
        if not _is_prompt(row["prompt"]):
            expected = "text or messages with role and content"
            raise DataError(f"data: row {number} of {path}: prompt: expected {expected}, got {row['prompt']!r}")
    return PromptSet(rows, path)


def _is_prompt(prompt: object) -> bool:
    if isinstance(prompt, str):
        return bool(prompt)
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt)
    )


def teacher_prompt(prompt: Prompt, answer: object, template: str) -> Prompt:
    """Insert a prompt and its reference answer into ``template`` ({prompt}, {answer}). In chat
    messages the last message is replaced.
    """
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    changed = template.replace("{prompt}", text).replace("{answer}", str(answer))
    return changed if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": changed}]


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[int]:
    """Token ids of a prompt, up to where the completion starts.

    Messages go through the chat template. Text becomes one user message where the tokenizer has a
    template; without one it is encoded as it is, with the tokenizer's special tokens.

    Raises:
        DataError: messages without a chat template, or a prompt longer than ``max_prompt_tokens``.
    """
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        ids = tokenizer(config.system_prompt + prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise DataError("data: expected text prompts (this tokenizer has no chat template), got chat messages")
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if isinstance(prompt, str) and config.system_prompt:
            messages = [{"role": "system", "content": config.system_prompt}, *messages]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not 0 < len(ids) <= config.max_prompt_tokens:
        expected = f"1 to {config.max_prompt_tokens} tokens (data.max_prompt_tokens)"
        raise DataError(f"data: prompt: expected {expected}, got {len(ids)}: {str(prompt)[:80]!r}")
    return list(ids)


def fingerprint(prompts: Sequence[Sequence[int]]) -> str:
    """A hash of encoded prompts in their order."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


class PromptSampler:
    """Endless batches of row numbers. Every epoch is a permutation that depends on the seed and the
    number of the epoch alone.

    A batch holds a row twice only where it spans two epochs. ``state_dict`` is enough to continue
    with the next batch.
    """

    def __init__(self, size: int, batch: int, seed: int) -> None:
        if batch > size:
            raise DataError(f"rollout.prompts: expected at most the {size} training prompts, got {batch}")
        self.size, self.batch, self.seed = size, batch, seed
        self.epoch = self.position = 0

    def next(self) -> list[int]:
        """The next ``batch`` row numbers."""
        chosen: list[int] = []
        while len(chosen) < self.batch:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
            taken = order[self.position : self.position + self.batch - len(chosen)]
            chosen += taken.tolist()
            self.position += len(taken)
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
        return chosen

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
