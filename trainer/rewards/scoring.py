"""Rewards with TRL's signature, and what a failed score does.

A reward function is ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``,
one number for each completion, ``async`` or not (see ``calls``). ``columns`` are the other columns
of the data file, repeated like the prompts. For chat prompts ``completions`` are lists of messages,
for text prompts they are text. None means that the function does not apply to the completion; it is
left out of the sum.

An exception, NaN, an infinite score or ``Failed(reason)`` is a failure of that completion. It is
reported, and the completion's group is left out of the step (the group mean would be wrong) or the
run stops (``rewards.on_failure``). A function that returns anything but one number for each
completion breaks its contract, and the run always stops.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..config import RewardsConfig
from ..errors import ConfigError, RewardError
from ..models.embedding import SentenceEmbedding
from ..records import Failure, Scores, Tick
from .builtin import BUILT_IN, Similarity
from .calls import CallResult, call_all
from .signature import Completion, RewardFunction


class Rewards:
    """The configured functions and their weights.

    Raises:
        ConfigError: an import path that cannot be resolved, or a judge that cannot be reached.
        ModelError: an embedding or reward model that cannot be loaded.
    """

    def __init__(self, config: RewardsConfig, *, cache: str, device: torch.device) -> None:
        self.config = config
        self.functions: dict[str, RewardFunction] = {}
        for name in config.functions:
            self.functions[name] = _function(name, config, cache, device)

    def score(
        self,
        columns: Mapping[str, Sequence[Any]],
        texts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        tick: Tick = lambda *_: None,
    ) -> Scores:
        """Score B completions, given as text. columns: those of the data file, with ``prompt``.

        tick: called while async functions are running.

        Raises:
            RewardError: a function broke its contract, or failed while ``on_failure`` is "stop".
        """
        prompts = columns["prompt"]
        calls, completions = _arguments(columns, texts, completion_ids)
        parts: dict[str, list[float | None]] = {}
        failures: list[Failure] = []
        measured: dict[str, float] = {}
        total = torch.zeros(len(completions), dtype=torch.float64)
        scored = torch.zeros(len(completions), dtype=torch.bool)
        for (name, called), weight in zip(self._call(calls, tick).items(), self.config.weights, strict=True):
            for i, reason in called.reasons.items():
                failures.append(Failure(name, i, prompts[i], texts[i], reason))
                total[i] = math.nan
            for i, value in enumerate(called.values):
                if value is not None:
                    total[i] += weight * value
                    scored[i] = True
            parts[name] = called.values
            measured |= {f"{name}/{metric}": number for metric, number in called.measured.items()}
        for i in (~scored & ~total.isnan()).nonzero().flatten().tolist():
            failures.append(Failure("(all)", i, prompts[i], texts[i], "no function scored it"))
            total[i] = math.nan
        if failures and self.config.on_failure == "stop":
            raise RewardError(str(failures[0]))
        return Scores(total.float(), parts, failures, measured)

    def _call(self, calls: Mapping[str, Sequence[Any]], tick: Tick) -> dict[str, CallResult]:
        return call_all(self.functions, calls, concurrency=self.config.concurrency, timeout=self.config.timeout, tick=tick)

    def check_binary(self, method: str, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
        """Score correct and shuffled reference answers before anything is generated, and refuse
        rewards other than 0 or 1.

        A function that fails on them is not refused here.

        Raises:
            ConfigError: a reward that ``method`` cannot use.
        """
        references = [str(row["answer"]) for row in rows]
        texts = [*references, *references[1:], references[0]]
        columns = {name: [row[name] for row in rows] * 2 for name in rows[0]}
        calls, _ = _arguments(columns, texts, [tokenizer(text)["input_ids"] for text in texts])
        total = torch.zeros(len(texts), dtype=torch.float64)
        for called, weight in zip(self._call(calls, lambda *_: None).values(), self.config.weights, strict=True):
            total += torch.tensor([math.nan if value is None else weight * value for value in called.values])
        off = torch.minimum(total.abs(), (total - 1).abs()).nan_to_num(0.0)
        worst = int(off.argmax())
        if off[worst] > 0:
            raise ConfigError(
                f"rewards.functions: expected rewards of 0 or 1 with method {method!r} (exact_match or one of your own), "
                f"got {total[worst]:.3g} from {', '.join(self.functions)} for the completion {texts[worst][:80]!r}"
            )


def _arguments(
    columns: Mapping[str, Sequence[Any]], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
) -> tuple[dict[str, Sequence[Any]], list[Completion]]:
    """The arguments of reward functions, and the completions among them."""
    prompts = columns["prompt"]
    completions: list[Completion] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    others = {name: column for name, column in columns.items() if name != "prompt"}
    return {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **others}, completions


def _function(name: str, config: RewardsConfig, cache: str, device: torch.device) -> RewardFunction:
    """The function ``name``, ready to score."""
    if name == "similarity":
        return Similarity(SentenceEmbedding(config.embedding_model, cache, device), config.embedding_share)
    if name == "reward_model":
        from .reward_model import RewardModel

        return RewardModel(config.reward_model, device)
    if name == "judge":
        try:
            from .judge import Judge
        except ModuleNotFoundError as error:
            expected = f"the package {error.name} (pip install '.[train]')"
            raise ConfigError(f"rewards.functions: expected {expected} for judge, got none") from error
        judge = Judge(config.judge)
        judge.check()
        return judge
    return BUILT_IN[name] if name in BUILT_IN else import_function(name)


def import_function(path: str) -> RewardFunction:
    """The function behind ``module:function``.

    Raises:
        ConfigError: another form, no such module or function, or not callable.
    """
    module, _, attribute = path.partition(":")
    if not attribute:
        names = ", ".join([*BUILT_IN, "similarity", "reward_model", "judge"])
        raise ConfigError(f"rewards.functions: expected one of {names} or module:function, got {path!r}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rewards.functions: expected an importable {path!r}, got {error}") from error
    if not callable(function):
        raise ConfigError(f"rewards.functions: expected a function at {path!r}, got {function!r}")
    return function
