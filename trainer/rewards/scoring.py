"""The configured reward functions, and what a failed score does.

An exception, NaN, an infinite score or ``Failed(reason)`` is a failure of that completion. It is
reported, and the completion's group is left out of the step (the group mean would be wrong) or the
run stops (``rewards.on_failure``). A function that returns anything but one number for each
completion breaks its contract, and the run always stops.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..config import RewardsConfig
from ..errors import ConfigError, RewardError
from ..models.embedding import SentenceEmbedding
from ..records import Failure, Scores, Tick
from . import Completion, Failed, RewardFunction
from .builtin import Similarity, exact_match, rouge
from .calls import Arguments, Called, call_all, rows
from .math_answers import MathVerify
from .reward_model import RewardModel


class Rewards:
    """The configured functions and their weights.

    Raises:
        ConfigError: an import path that cannot be resolved, or a judge that cannot be reached.
        ModelError: an embedding or reward model that cannot be loaded.
    """

    def __init__(self, config: RewardsConfig, *, cache: str, device: torch.device) -> None:
        self.config = config
        check_functions(config)
        self.functions = {name: _function(name, config, cache, device) for name in config.functions}

    def score(
        self,
        columns: Mapping[str, Sequence[Any]],
        texts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        tick: Tick = lambda *_: None,
    ) -> Scores:
        """Score B completions, given as text. columns: those of the data, with ``prompt``.

        All ranks hold all completions and receive all scores. The completions of one prompt (and of
        its duplicates) are scored by one rank, because functions may compare them. tick: called by
        each rank while its async functions are running.

        Raises:
            RewardError: a function broke its contract, or failed while ``on_failure`` is "stop".
        """
        prompts = columns["prompt"]
        completions: list[Completion] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        others = {name: column for name, column in columns.items() if name != "prompt"}
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **others}
        found = self._shared(given, tick)

        parts = {name: [None if isinstance(s, Failed) else s for s in scores] for name, (scores, _) in found.items()}
        failures: list[Failure] = []
        total: list[float] = []
        for i, scores in enumerate(zip(*(own for own, _ in found.values()), strict=True)):
            reasons = [(name, score.reason) for name, score in zip(found, scores, strict=True) if isinstance(score, Failed)]
            weighted = [w * score for w, score in zip(self.config.weights, scores, strict=True) if isinstance(score, float)]
            if not reasons and not weighted:
                reasons = [("(all)", "no function scored it")]
            failures += [Failure(name, i, prompts[i], texts[i], reason) for name, reason in reasons]
            total.append(math.nan if reasons else sum(weighted))
        if failures and self.config.on_failure == "stop":
            raise RewardError(str(failures[0]))
        seconds = {name: seconds for name, (_, seconds) in found.items()}
        return Scores(torch.tensor(total, dtype=torch.float64), parts, failures, seconds)

    def _shared(self, arguments: Arguments, tick: Tick) -> dict[str, Called]:
        """The scores of every function, computed by the ranks together."""

        def call(given: Arguments) -> dict[str, Called]:
            own = self.config
            return call_all(self.functions, given, concurrency=own.concurrency, timeout=own.timeout, tick=tick)

        if ranks.size() == 1:
            return call(arguments)
        keys = [json.dumps(prompt, sort_keys=True) for prompt in arguments["prompts"]]
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        owners = [number[key] % ranks.size() for key in keys]
        own = [i for i, owner in enumerate(owners) if owner == ranks.rank()]
        parts = ranks.all_gather(lambda: call(rows(arguments, own)) if own else {})
        found: dict[str, Called] = {}
        for name in self.functions:
            scores = [iter(part[name][0] if part else ()) for part in parts]
            found[name] = [next(scores[owner]) for owner in owners], max(part[name][1] for part in parts if part)
        return found


def overlong_penalty(lengths: Sequence[int], most: int, window: int) -> Tensor:
    """[B] fp32 in [-1, 0]: 0 up to ``most - window`` tokens, then falling linearly to -1 at ``most``
    (DAPO, arXiv:2503.14476, eq. 13). window: 0 is a fifth of ``most``.
    """
    window = window or max(1, most // 5)
    return ((most - window - torch.tensor(lengths)) / window).clamp(-1.0, 0.0)


def _function(name: str, config: RewardsConfig, cache: str, device: torch.device) -> RewardFunction:
    """The function ``name``, ready to score."""
    if name == "similarity":
        return Similarity(SentenceEmbedding(config.embedding_model, cache, device), config.embedding_share)
    if name == "reward_model":
        return RewardModel(config.reward_model, cache, device)
    if name == "math_verify":
        return MathVerify()
    if name == "judge":
        from .judge import Judge  # openai takes a second to import

        judge = Judge(config)
        judge.check()
        return judge
    plain: dict[str, RewardFunction] = {"rouge": rouge, "exact_match": exact_match}
    return plain[name] if name in plain else import_function(name)


def check_functions(config: RewardsConfig) -> None:
    """Import the user's functions and look for the judge's key, without loading models.

    Raises:
        ConfigError: one is not there.
    """
    for name in config.functions:
        if name == "judge":
            from .judge import Judge

            Judge(config)
        elif ":" in name:
            import_function(name)


def import_function(path: str) -> RewardFunction:
    """The function behind ``module:function``.

    Raises:
        ConfigError: no such module or function, or not callable.
    """
    module, _, attribute = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rewards.functions: expected an importable {path!r}, got {error}") from error
    if not callable(function):
        raise ConfigError(f"rewards.functions: expected a function at {path!r}, got {function!r}")
    return function
