"""How reward functions are called: ordinary functions one after the other, then all async functions
concurrently.

An ordinary function receives all completions in one call. When it raises, it is called again for
each completion alone, to find those it fails on. An async function is called once for all
completions of one prompt (neighbours with equal prompts), so that it may compare them, with at most
``concurrency`` concurrent calls and ``timeout`` seconds for each. A call that raises or times out
is a failure of all its completions: their group is left out of the step, as it would be with a
single failure. An async function with a true attribute ``limits_itself`` is called once with
everything.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch

from ..errors import RewardError
from ..records import Tick
from .signature import Failed, RewardFunction, Score, WithMetrics

Arguments = Mapping[str, Sequence[Any]]
WATCH_SECONDS = 0.2
"""Interval between two checks for a stop request while calls are running."""


@dataclass(frozen=True)
class CallResult:
    """Results of one function on B completions.

    Attributes:
        values: B scores; None where it did not score the completion or failed on it.
        reasons: index of a completion -> why it failed.
        measured: metric -> number; ``seconds`` is the time from the start of the first call to the
            end of the last.
    """

    values: list[float | None]
    reasons: dict[int, str]
    measured: dict[str, float]


def call_all(
    functions: Mapping[str, RewardFunction], arguments: Arguments, *, concurrency: int, timeout: float, tick: Tick
) -> dict[str, CallResult]:
    """Call every function on the B completions in ``arguments``. tick: called while async functions
    are running.

    Raises:
        RewardError: a function broke its contract.
    """
    found = {name: _timed(name, f, arguments) for name, f in functions.items() if not is_async(f)}
    waiting = {name: f for name, f in functions.items() if is_async(f)}
    if waiting:
        found |= asyncio.run(_side_by_side(waiting, arguments, concurrency, timeout, tick))
    return {name: found[name] for name in functions}


def is_async(function: RewardFunction) -> bool:
    """Whether a call returns an awaitable: an ``async def``, or an object whose ``__call__`` is
    one.
    """
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _called(function: RewardFunction, scores: list[Score], seconds: float) -> CallResult:
    """Separate failures from scores, and add the measurements."""
    values: list[float | None] = []
    reasons: dict[int, str] = {}
    for i, score in enumerate(scores):
        if isinstance(score, Failed):
            reasons[i] = score.reason
        elif score is not None and not math.isfinite(score):
            reasons[i] = f"expected a finite number, got {score}"
        values.append(None if i in reasons else cast("float | None", score))
    own: Mapping[str, float] = function.metrics() if isinstance(function, WithMetrics) else {}
    return CallResult(values, reasons, {"seconds": seconds, **own})


def _timed(name: str, function: RewardFunction, arguments: Arguments) -> CallResult:
    begun = time.monotonic()
    scores = _ordinary(name, function, arguments)
    return _called(function, scores, time.monotonic() - begun)


def _ordinary(name: str, function: RewardFunction, arguments: Arguments) -> list[Score]:
    indices = range(len(arguments["completions"]))

    def on(rows: Sequence[int]) -> list[Score]:
        return _checked(name, function(**_rows(arguments, rows)), len(rows))

    try:
        return on(indices)
    except RewardError:
        raise
    except Exception as first:  # users' code may raise anything; retried below for each completion
        scores: list[Score] = []
        failures = 0
        for i in indices:
            try:
                scores += on([i])
            except RewardError:
                raise
            except Exception as error:
                scores.append(Failed(f"{type(error).__name__}: {error}"))
                failures += 1
        if not failures:
            raise RewardError(
                f"reward {name}: expected the same result for one completion as for many, got {type(first).__name__}: {first} "
                f"on {len(indices)} completions together and none on each alone"
            ) from first
        return scores


async def _side_by_side(
    functions: Mapping[str, RewardFunction], arguments: Arguments, concurrency: int, timeout: float, tick: Tick
) -> dict[str, CallResult]:
    async def timed(name: str, function: RewardFunction) -> CallResult:
        begun = time.monotonic()
        if getattr(function, "limits_itself", False):
            indices = range(len(arguments["completions"]))
            scores = _checked(name, await _awaitable(function(**arguments)), len(indices))
        else:
            scores = await _by_prompt(name, function, arguments, concurrency, timeout)
        return _called(function, scores, time.monotonic() - begun)

    tasks = {name: asyncio.create_task(timed(name, function)) for name, function in functions.items()}
    pending = set(tasks.values())
    while pending:  # when tick or a task raises, asyncio.run cancels the others
        done, pending = await asyncio.wait(pending, timeout=WATCH_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        tick(len(tasks) - len(pending), len(tasks))
    return {name: task.result() for name, task in tasks.items()}


async def _by_prompt(
    name: str, function: RewardFunction, arguments: Arguments, concurrency: int, timeout: float
) -> list[Score]:
    gate = asyncio.Semaphore(concurrency)
    prompts = arguments["prompts"]

    async def on(rows: list[int]) -> list[Score]:
        async with gate:
            try:
                async with asyncio.timeout(timeout) as limit:
                    scores = await _awaitable(function(**_rows(arguments, rows)))
            except Exception as error:  # users' code may raise anything
                late = f"no scores within {timeout:g} s (rewards.timeout)"
                reason = late if limit.expired() else f"{type(error).__name__}: {error}"
                return [Failed(reason)] * len(rows)
        return _checked(name, scores, len(rows))

    groups = [list(rows) for _, rows in groupby(range(len(prompts)), key=lambda i: prompts[i])]
    found = await asyncio.gather(*map(on, groups))
    return [score for scores in found for score in scores]


def _awaitable(result: object) -> Awaitable[object]:
    return cast(Awaitable[object], result)


def _rows(arguments: Arguments, rows: Sequence[int]) -> dict[str, list[Any]]:
    return {key: [column[i] for i in rows] for key, column in arguments.items()}


def _checked(name: str, values: object, count: int) -> list[Score]:
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
        got = f"{len(values)} of them" if isinstance(values, Sequence) else repr(values)
        raise RewardError(f"reward {name}: expected a list of {count} numbers or None, got {got}")
    try:
        return [value if value is None or isinstance(value, Failed) else float(value) for value in values]
    except (TypeError, ValueError):
        raise RewardError(f"reward {name}: expected numbers or None, got {list(values)!r:.200}") from None
