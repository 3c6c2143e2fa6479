"""Prompts from files, folders and hub datasets, the chat template, and the sampler."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError
from pydantic_core import PydanticSerializationError, to_json
from transformers import PreTrainedTokenizerBase

from . import ranks
from .config import DataConfig
from .errors import DataError

Prompt = str | list[dict[str, Any]]
"""Text, or chat messages with the keys role and content. The content is text, a list of text parts, or
None beside tool calls."""
WRITTEN = {".jsonl", ".json", ".csv"}
"""Files whose values are taken as they are written: ``datasets`` would make dates of texts that look
like one, and numbers of CSV's texts."""
TAKEN = ("prompts", "completions", "completion_ids")
"""Arguments of reward functions that no column may be named like."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts and their other columns.

    Attributes:
        rows: one mapping a prompt, column name -> value; always with ``prompt`` and ``answer``.
        setting: data.train or data.eval, for messages.
        ids: the prompts' token ids, once they are encoded.
    """

    rows: Sequence[Mapping[str, Any]]
    setting: str
    ids: Sequence[list[int]] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> PromptSet:
        """The encoded prompts ``indices``, in that order."""
        return PromptSet([self.rows[i] for i in indices], self.setting, [self.ids[i] for i in indices])

    def columns(self, repeats: int = 1) -> dict[str, list[Any]]:
        """The columns, each row ``repeats`` times in a row, as reward functions receive them."""
        return {name: [row[name] for row in self.rows for _ in range(repeats)] for name in self.rows[0]}

    def encoded(
        self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, report: Callable[[str], None] = print
    ) -> PromptSet:
        """These prompts with their token ids, without those longer than ``max_prompt_tokens``, which
        are reported in one line.

        Raises:
            DataError: as ``encode``, or none is short enough.
        """
        found, most = encode([row["prompt"] for row in self.rows], tokenizer, config), config.max_prompt_tokens
        kept = [i for i, ids in enumerate(found) if 0 < len(ids) <= most]
        if not kept:
            expected = f"at least one prompt of {self.setting} with 1 to that many tokens"
            raise DataError(f"data.max_prompt_tokens: expected {expected}, got {most} and {min(map(len, found))} or more")
        if left := len(found) - len(kept):
            longest = max(map(len, found))
            report(f"{self.setting}: {left} of {len(found)} prompts left out: more than {most} tokens (longest: {longest})")
        return replace(self, ids=found).take(kept)


def load_prompts(config: DataConfig, which: Literal["train", "eval"], limit: int | None = None) -> PromptSet:
    """Read ``data.train`` or ``data.eval``. limit: keep the first rows, 0 for all; None is the
    setting ``<which>_limit``. With several processes rank 0 reads, and downloads, for all.

    Raises:
        DataError: nothing to read there, no rows, a missing column, or a value that is no prompt.
    """
    source, key = getattr(config, which), f"data.{which}"
    limit = getattr(config, f"{which}_limit") if limit is None else limit
    rows = list(islice(ranks.run_on_main(lambda: _read(source, key)), limit or None))
    if not rows:
        raise DataError(f"{key}: expected at least one row, got none in {source}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in set(TAKEN) & set(names):
        raise DataError(f"{key}: expected no column with a name that reward functions use already, got {name!r} in {source}")
    found = []
    for number, row in enumerate(rows):
        where = f"{key}: row {number} of {source}"
        prompt, answer = _at(row, config.columns.prompt, where, "prompt"), ""
        if config.columns.answer:
            answer = _at(row, config.columns.answer, where, "answer")
            if answer is None or answer != answer:
                expected = f"an answer in {config.columns.answer!r} (--data.columns.answer= where the data have none)"
                raise DataError(f"{where}: expected {expected}, got {answer!r}")
        if not _is_prompt(prompt):
            expected = "a prompt (text, or messages with role and content, in text parts at most)"
            raise DataError(f"{where}: expected {expected}, got {prompt!r:.200}")
        try:
            to_json([prompt, answer], serialize_unknown=True, bytes_mode="base64")
        except PydanticSerializationError as error:
            raise DataError(f"{where}: expected text that UTF-8 can hold, got {[prompt, answer]!r:.200} ({error})") from None
        if config.answer_after:
            _, marker, answer = str(answer).rpartition(config.answer_after)
            if not marker:
                raise DataError(f"{where}: expected {config.answer_after!r} (data.answer_after) in its answer, got none")
            answer = answer.strip()
        found.append({**{name: row.get(name) for name in names}, "prompt": prompt, "answer": answer})
    return PromptSet(found, key)


def _read(source: str, key: str) -> Sequence[Mapping[str, Any]]:
    """The rows of a file, a folder or a hub dataset."""
    path = Path(source).expanduser()
    try:
        if not source:
            raise ValueError("nothing")
        if path.is_file() and path.suffix in WRITTEN:
            return _written(path, path.suffix)
        name, *parts = re.split(r":(?![^\[]*\])", str(path))  # train[:200] is one part
        if not Path(name).exists() and (path.suffix in {*WRITTEN, ".parquet"} or path.is_absolute()):  # no id of the hub
            raise FileNotFoundError(f"there is no {Path(name).absolute()}")
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised as well
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        split = parts[-1] if parts else "train"
        builder = datasets.load_dataset_builder(name, *parts[:-1])
        files = builder.config.data_files or {}
        if builder.name not in ("json", "csv") or not {Path(file).suffix for own in files.values() for file in own} <= WRITTEN:
            return datasets.load_dataset(name, *parts[:-1], split=split)
        download = datasets.DownloadManager().download
        rows = {
            name: [row for file in own for row in _written(Path(download(file)), Path(file).suffix)]
            for name, own in files.items()
            if str(name) in split
        }
        chosen = datasets.ReadInstruction.from_spec(split).to_absolute({str(n): len(own) for n, own in rows.items()})
        return [row for own in chosen for row in rows[own.splitname][own.from_ : own.to]]
    except (ValueError, TypeError, OSError, csv.Error, ImportError, RecursionError) as error:
        reason = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
        expected = "a JSONL, JSON, CSV or Parquet file, a folder, or a reachable hub dataset (ID, ID:SPLIT, ID:CONFIG:SPLIT)"
        raise DataError(f"{key}: expected {expected}, got {source!r} ({reason})") from error


def _written(path: Path, suffix: str) -> list[dict[str, Any]]:
    """The rows of a JSON, JSON lines or CSV file. suffix: of the name before a download."""
    rows: Any
    if suffix == ".csv":
        limit = csv.field_size_limit(2**31 - 1)
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, strict=True)
                _once([name for name in reader.fieldnames or () if name])
                rows = list(reader)
        finally:
            csv.field_size_limit(limit)
    else:
        with path.open("rb") as lines:
            listed = suffix == ".json" and lines.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
            lines.seek(0)
            rows = json.load(lines, parse_float=_finite, object_pairs_hook=_object) if listed else list(json_lines(lines))
    if not isinstance(rows, list) or not all(isinstance(row, dict) and None not in row for row in rows):
        raise ValueError("expected one object a row")
    return rows


def json_lines(file: Iterable[bytes]) -> Iterator[Any]:
    """The values of JSON lines. A line ends at a line feed only: U+2028, U+2029 and U+0085 may stand in
    a text as they are.

    Raises:
        ValueError: a line that is not JSON in UTF-8; names it.
    """
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield json.loads(line, parse_float=_finite, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        _once([name for name, _ in pairs])
    return found


def _once(names: Sequence[str]) -> None:
    """Raise where a name is there twice: one of its values would be lost."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"expected every name once, got {twice[0]!r} {names.count(twice[0])} times")


def _finite(text: str) -> float:
    value = float(text)
    if value in (np.inf, -np.inf):
        raise ValueError(f"expected a number below 1.8e308, got {text}")
    return value


def _at(row: Mapping[str, Any], column: str, where: str, key: str) -> Any:
    """The value of a column; a dot leads into a nested one."""
    value: Any = row
    for part in [column] if column in row else column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            names = ", ".join(name if str(name).isprintable() else repr(name) for name in row)
            raise DataError(f"{where}: expected the column {column!r} (data.columns.{key}), got {names}")
        value = value[part]
    return value


def _is_prompt(prompt: object) -> bool:
    if isinstance(prompt, str):
        return bool(prompt)
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(own, dict) and _is_message(own) for own in prompt)


def _is_message(message: dict[str, Any]) -> bool:
    content = message.get("content")
    if content is None:
        good = bool(message.get("tool_calls"))
    elif isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        good = 0 < len(parts) == len(content) and all(isinstance(text, str) for text in parts)
    else:
        good = isinstance(content, str)
    return good and isinstance(message.get("role"), str)


def content_of(message: Mapping[str, Any]) -> str:
    """The text of a chat message, its parts joined; empty where it has tool calls only."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


def plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its text parts joined: templates of text models write a list as Python does."""
    return {**message, "content": content_of(message)} if isinstance(message["content"], list) else {**message}


def fill(template: str, prompt: Prompt, answer: object = "") -> Prompt:
    """``template`` with {prompt} and {answer} replaced. In chat messages it becomes the last message."""
    values = {"{prompt}": prompt if isinstance(prompt, str) else content_of(prompt[-1]), "{answer}": str(answer)}
    text = re.sub(r"\{prompt\}|\{answer\}", lambda found: values[found[0]], template)
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


def encode(prompts: Iterable[Prompt], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[list[int]]:
    """Token ids of prompts in ``data.prompt_template``, up to where the completion starts.

    Messages go through the chat template. Text becomes one user message where the tokenizer has a
    template; without one it is encoded as it is, with the tokenizer's special tokens.

    Raises:
        DataError: messages without a chat template, or that the template refuses.
    """
    bare, texts = tokenizer.chat_template is None, []
    for number, prompt in enumerate(prompts):
        asked = fill(config.prompt_template, prompt)
        if isinstance(asked, str) and bare:
            texts.append(f"{config.system_prompt}\n\n{asked}" if config.system_prompt else asked)
            continue
        if bare:
            raise DataError("data: expected text prompts (this tokenizer has no chat template), got chat messages")
        system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
        messages = [*system, {"role": "user", "content": asked}] if isinstance(asked, str) else asked
        messages = [*map(plain, messages)]
        try:
            options = {"add_generation_prompt": True, "tokenize": False, **config.chat_template_kwargs}
            texts.append(tokenizer.apply_chat_template(messages, **options))
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise DataError(
                f"data: prompt {number}: expected messages that the chat template accepts, got {messages!r:.200} ({error})"
            ) from error
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=bare)["input_ids"]]


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
