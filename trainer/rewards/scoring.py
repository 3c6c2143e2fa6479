"""The configured reward functions, and what a failed score does.

The reward of a completion is the weighted sum over the functions that scored it. An exception, NaN,
an infinite score or ``Failed(reason)`` is a failure of that completion. It is reported, and the
completion's group is left out of the step (the group mean would be wrong) or the run stops
(``rewards.on_failure``). A function that returns anything but one number for each completion breaks
its contract, and the run always stops.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import ranks
from ..config import RewardsConfig
from ..errors import ConfigError, RewardError
from ..models.embedding import SentenceEmbedding
from ..records import Failure, Scores, Tick
from . import Completion, Failed, RewardFunction, Score
from .builtin import BUILT_IN, Similarity
from .calls import Arguments, call_all, rows

Columns = Mapping[str, Sequence[Any]]
Found = dict[str, tuple[list[Score], dict[str, float]]]
"""For every function its B scores and its measurements: ``seconds`` and those of its ``metrics()``."""


class Rewards:
    """The configured functions and their weights.

    Raises:
        ConfigError: an import path that cannot be resolved, or a judge that cannot be reached.
        ModelError: an embedding or reward model that cannot be loaded.
    """

    def __init__(self, config: RewardsConfig, *, cache: str, device: torch.device) -> None:
        self.config = config
        check_functions(config)
        self.functions: dict[str, RewardFunction] = {}
        for name in config.functions:
            self.functions[name] = _function(name, config, cache, device)

    def score(
        self,
        columns: Columns,
        texts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        tick: Tick = lambda *_: None,
    ) -> Scores:
        """Score B completions, given as text. columns: those of the data, with ``prompt``.

        All ranks hold all completions and receive all scores. The completions of one prompt (and of
        its duplicates) are scored by one rank, because functions may compare them. A measurement of
        the calls is the largest over the ranks. tick: called by each rank while its async functions
        are running.

        Raises:
            RewardError: a function broke its contract, or failed while ``on_failure`` is "stop".
        """
        prompts, found = columns["prompt"], self._shared(_arguments(columns, texts, completion_ids), tick)
        failures = [
            Failure(name, i, prompts[i], texts[i], score.reason)
            for name, (scores, _) in found.items()
            for i, score in enumerate(scores)
            if isinstance(score, Failed)
        ]
        parts = {name: [None if isinstance(s, Failed) else s for s in scores] for name, (scores, _) in found.items()}
        total = self._sum(parts)
        total[[failure.index for failure in failures]] = math.nan
        known = {failure.index for failure in failures}
        unscored = [i for i in total.isnan().nonzero().flatten().tolist() if i not in known]
        failures += [Failure("(all)", i, prompts[i], texts[i], "no function scored it") for i in unscored]
        if failures and self.config.on_failure == "stop":
            raise RewardError(str(failures[0]))
        measured = {f"{name}/{metric}": number for name, (_, own) in found.items() for metric, number in own.items()}
        return Scores(total, parts, sorted(failures, key=lambda failure: failure.index), measured)

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
        found = self._call(_arguments(columns, texts, [tokenizer(text)["input_ids"] for text in texts]), lambda *_: None)
        total = self._sum({name: [math.nan if isinstance(s, Failed) else s for s in own] for name, (own, _) in found.items()})
        off = torch.minimum(total.abs(), (total - 1).abs()).nan_to_num(0.0)
        worst = int(off.argmax())
        if off[worst] > 0:
            raise ConfigError(
                f"rewards.functions: expected rewards of 0 or 1 with method {method!r} (exact_match or one of your own), "
                f"got {total[worst]:.3g} from {', '.join(self.functions)} for the completion {texts[worst][:80]!r}"
            )

    def _sum(self, parts: Mapping[str, Sequence[float | None]]) -> Tensor:
        """[B] fp64: the weighted sum of each completion's numbers, NaN where it has none."""
        weighted = [
            [w * value for w, value in zip(self.config.weights, row, strict=True) if value is not None]
            for row in zip(*parts.values(), strict=True)
        ]
        return torch.tensor([sum(own) if own else math.nan for own in weighted], dtype=torch.float64)

    def _shared(self, arguments: Arguments, tick: Tick) -> Found:
        """``_call`` with the work shared among the ranks."""
        if ranks.size() == 1:
            return self._call(arguments, tick)
        keys = [json.dumps(prompt, sort_keys=True) for prompt in arguments["prompts"]]
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        owners = [number[key] % ranks.size() for key in keys]
        own = [i for i, owner in enumerate(owners) if owner == ranks.rank()]
        parts = ranks.all_gather(lambda: self._call(rows(arguments, own), tick) if own else {})
        found: Found = {}
        for name in self.functions:
            scores = [iter(part[name][0] if part else ()) for part in parts]
            measured = [part[name][1] for part in parts if part]
            largest = {metric: max(other[metric] for other in measured) for metric in measured[0]}
            found[name] = [next(scores[owner]) for owner in owners], largest
        return found

    def _call(self, arguments: Arguments, tick: Tick) -> Found:
        config = self.config
        called = call_all(self.functions, arguments, concurrency=config.concurrency, timeout=config.timeout, tick=tick)
        own = {name: f.metrics() for name, f in self.functions.items() if hasattr(f, "metrics")}
        return {name: (scores, {"seconds": seconds, **own.get(name, {})}) for name, (scores, seconds) in called.items()}


def _arguments(columns: Columns, texts: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> Arguments:
    """The arguments of reward functions."""
    completions: list[Completion] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(columns["prompt"], texts, strict=True)
    ]
    others = {name: column for name, column in columns.items() if name != "prompt"}
    return {"prompts": columns["prompt"], "completions": completions, "completion_ids": completion_ids, **others}


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
        from .reward_model import RewardModel

        return RewardModel(config.reward_model, cache, device)
    if name == "math_verify":
        from .math_answers import MathVerify

        return MathVerify()
    if name == "judge":
        from .judge import Judge

        judge = Judge(config.judge)
        judge.check()
        return judge
    return BUILT_IN[name] if name in BUILT_IN else import_function(name)


LOADED = ("similarity", "math_verify", "reward_model", "judge")
"""Names of ``_function`` beside ``BUILT_IN``."""
PACKAGES = {"judge": "openai", "math_verify": "math_verify"}


def check_functions(config: RewardsConfig) -> None:
    """Look for the configured functions, their packages and the judge's key, without loading models.

    Raises:
        ConfigError: one is not there.
    """
    for name in config.functions:
        if name in PACKAGES and find_spec(PACKAGES[name]) is None:
            expected = f"the package {PACKAGES[name]} (pip install '.[train]')"
            raise ConfigError(f"rewards.functions: expected {expected} for {name}, got none")
        if name == "judge":
            from .judge import Judge

            Judge(config.judge)
        elif name not in (*BUILT_IN, *LOADED):
            import_function(name)


def import_function(path: str) -> RewardFunction:
    """The function behind ``module:function``.

    Raises:
        ConfigError: another form, no such module or function, or not callable.
    """
    module, _, attribute = path.partition(":")
    if not attribute:
        names = ", ".join([*BUILT_IN, *LOADED])
        raise ConfigError(f"rewards.functions: expected one of {names} or module:function, got {path!r}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rewards.functions: expected an importable {path!r}, got {error}") from error
    if not callable(function):
        raise ConfigError(f"rewards.functions: expected a function at {path!r}, got {function!r}")
    return function
