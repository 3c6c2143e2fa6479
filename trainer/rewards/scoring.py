"""Rewards with TRL's signature, and what happens when one of them fails.

A reward function is ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``, one number for each
answer. ``columns`` are the data file's other columns, repeated like the prompts. For chat prompts ``completions`` are
lists of messages, for text prompts they are text. None means "not for this function": it is left out of the sum.

An exception, NaN or an infinite score is a failure of that answer: it is reported with the answer, and the answer's
whole group is left out of the step (its mean would be wrong without it) or the run stops (``rewards.on_failure``). A
function that returns something else than one number for each answer is broken for all of them: the run always stops.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..config import RewardsConfig
from ..errors import ConfigError, RewardError
from ..models.embedding import SentenceEmbedding
from .builtin import BUILT_IN, Similarity
from .signature import Completion, RewardFunction, text_of


@dataclass(frozen=True)
class Failure:
    """One answer that one reward function could not score."""

    function: str
    index: int
    prompt: Any
    completion: Completion
    reason: str

    def __str__(self) -> str:
        sample = f"prompt {self.prompt!r}, answer {text_of(self.completion)[:120]!r}"
        return f"reward {self.function} failed on answer {self.index}: {self.reason}; {sample}"


@dataclass(frozen=True)
class Scores:
    """Scores of B answers.

    Attributes:
        total: [B] fp32 CPU, the weighted sum; NaN where the answer must not be trained on.
        parts: function name -> its B scores; None where it did not score the answer or failed on it.
        failures: one entry for each failed score.
    """

    total: torch.Tensor
    parts: dict[str, list[float | None]]
    failures: list[Failure]

    def complaints(self, most: int = 3) -> list[str]:
        """The failures as lines to print: the first ones and how many more there are."""
        more = len(self.failures) - most
        return [str(failure) for failure in self.failures[:most]] + ([f"... and {more} more failures"] if more > 0 else [])


class Rewards:
    """The configured functions and their weights.

    Raises:
        ConfigError: an import path that leads nowhere.
    """

    def __init__(self, config: RewardsConfig, *, cache: str, device: torch.device) -> None:
        self.config = config
        self.functions: dict[str, RewardFunction] = {}
        for name in config.functions:
            if name == "similarity":
                embedding = SentenceEmbedding(config.embedding_model, cache, device)
                self.functions[name] = Similarity(embedding, config.embedding_share)
            else:
                self.functions[name] = BUILT_IN[name] if name in BUILT_IN else import_function(name)

    def score(
        self, columns: Mapping[str, Sequence[Any]], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> Scores:
        """Score B answers, given as text, to the questions in ``columns`` (the data file's, with ``prompt``).

        Raises:
            RewardError: a function broke its contract, or failed while ``on_failure`` is "stop".
        """
        prompts = columns["prompt"]
        calls, completions = _arguments(columns, texts, completion_ids)
        parts: dict[str, list[float | None]] = {}
        failures: list[Failure] = []
        total = torch.zeros(len(completions), dtype=torch.float64)
        scored = torch.zeros(len(completions), dtype=torch.bool)
        for (name, function), weight in zip(self.functions.items(), self.config.weights, strict=True):
            values, reasons = _call(name, function, calls)
            for i, reason in reasons.items():
                failures.append(Failure(name, i, prompts[i], completions[i], reason))
                total[i] = math.nan
            for i, value in enumerate(values):
                if value is not None:
                    total[i] += weight * value
                    scored[i] = True
            parts[name] = values
        for i in (~scored & ~total.isnan()).nonzero().flatten().tolist():
            failures.append(Failure("(all)", i, prompts[i], completions[i], "no function scored it"))
            total[i] = math.nan
        if failures and self.config.on_failure == "stop":
            raise RewardError(str(failures[0]))
        return Scores(total.float(), parts, failures)

    def check_binary(self, method: str, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse rewards that are not 0 or 1, before anything is generated: tried on right and on wrong reference answers.

        A function that fails on them is left to the first step.

        Raises:
            ConfigError: a reward that ``method`` cannot use.
        """
        answers = [str(row["answer"]) for row in rows]
        texts = [*answers, *answers[1:], answers[0]]
        columns = {name: [row[name] for row in rows] * 2 for name in rows[0]}
        calls, _ = _arguments(columns, texts, [tokenizer(text)["input_ids"] for text in texts])
        total = torch.zeros(len(texts), dtype=torch.float64)
        for (name, function), weight in zip(self.functions.items(), self.config.weights, strict=True):
            values, _ = _call(name, function, calls)
            total += torch.tensor([math.nan if value is None else weight * value for value in values])
        off = torch.minimum(total.abs(), (total - 1).abs()).nan_to_num(0.0)
        worst = int(off.argmax())
        if off[worst] > 0:
            raise ConfigError(
                f"rewards.functions: expected rewards of 0 or 1 with method {method!r} (exact_match or one of your own), "
                f"got {total[worst]:.3g} from {', '.join(self.functions)} for the answer {texts[worst][:80]!r}"
            )


def _arguments(
    columns: Mapping[str, Sequence[Any]], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
) -> tuple[dict[str, Sequence[Any]], list[Completion]]:
    """What reward functions are called with, and the completions among it."""
    prompts = columns["prompt"]
    completions: list[Completion] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    others = {name: column for name, column in columns.items() if name != "prompt"}
    return {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **others}, completions


def _call(
    name: str, function: RewardFunction, arguments: Mapping[str, Sequence[Any]]
) -> tuple[list[float | None], dict[int, str]]:
    """Scores, and index -> reason of the failed ones (whose score is None)."""

    def on(rows: Sequence[int]) -> list[float | None]:
        return _checked(name, function(**{key: [column[i] for i in rows] for key, column in arguments.items()}), len(rows))

    everyone = range(len(arguments["completions"]))
    reasons: dict[int, str] = {}
    try:
        values = on(everyone)
    except RewardError:
        raise
    except Exception as whole:  # users' code may raise anything; one call for each answer finds the culprit
        values = []
        for i in everyone:
            try:
                values += on([i])
            except RewardError:
                raise
            except Exception as error:
                values.append(None)
                reasons[i] = f"{type(error).__name__}: {error}"
        if not reasons:
            raise RewardError(
                f"reward {name}: expected the same for one answer as for many, got {type(whole).__name__}: {whole} "
                f"on {len(everyone)} answers together and none on each alone"
            ) from whole
    for i, value in enumerate(values):
        if value is not None and not math.isfinite(value):
            values[i], reasons[i] = None, f"expected a finite number, got {value}"
    return values, reasons


def _checked(name: str, values: object, count: int) -> list[float | None]:
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
        got = f"{len(values)} of them" if isinstance(values, Sequence) else repr(values)
        raise RewardError(f"reward {name}: expected a list of {count} numbers or None, got {got}")
    try:
        return [None if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        raise RewardError(f"reward {name}: expected numbers or None, got {list(values)!r:.200}") from None


def import_function(path: str) -> RewardFunction:
    """The function behind ``module:function``.

    Raises:
        ConfigError: not of that form, no such module or function, or not callable.
    """
    module, _, attribute = path.partition(":")
    if not attribute:
        names = ", ".join([*BUILT_IN, "similarity"])
        raise ConfigError(f"rewards.functions: expected one of {names} or module:function, got {path!r}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rewards.functions: expected an importable {path!r}, got {error}") from error
    if not callable(function):
        raise ConfigError(f"rewards.functions: expected a function at {path!r}, got {function!r}")
    return function
