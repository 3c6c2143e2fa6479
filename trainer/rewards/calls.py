"""How reward functions are called: ordinary functions one after the other, then all async functions
concurrently.

An ordinary function receives all completions in one call, and when it raises each of them alone, to
find those it fails on. An async function receives the completions of one prompt (neighbours with
equal prompts) in each call, and a call that raises or times out is a failure of them all.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from ..errors import RewardError
from ..records import Tick
from . import Failed, RewardFunction, Score

Arguments = Mapping[str, Sequence[Any]]
Called = tuple[list[Score], float]
"""One score for each completion, and the seconds from the start of the first call to the end of the
last."""
WATCH_SECONDS = 0.2
"""Interval between two checks for a stop request while calls are running."""


def call_all(
    functions: Mapping[str, RewardFunction], arguments: Arguments, *, concurrency: int, timeout: float, tick: Tick
) -> dict[str, Called]:
    """Call every function on the B completions in ``arguments``. tick: called while async functions
    are running.

    Raises:
        RewardError: a function broke its contract.
    """
    waiting = {name: f for name, f in functions.items() if _is_async(f)}
    found = {name: _ordinary(name, f, arguments) for name, f in functions.items() if name not in waiting}
    if waiting:
        found |= asyncio.run(_side_by_side(waiting, arguments, concurrency, timeout, tick))
    return {name: found[name] for name in functions}


def _is_async(function: RewardFunction) -> bool:
    """Whether it is an ``async def``, or an object whose ``__call__`` is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _ordinary(name: str, function: RewardFunction, arguments: Arguments) -> Called:
    begun, count = time.monotonic(), len(arguments["completions"])

    def alone(i: int) -> Score:
        try:
            values = function(**rows(arguments, [i]))
        except Exception as error:  # users' code may raise anything
            return Failed(f"{type(error).__name__}: {error}")
        return _checked(name, values, 1)[0]

    try:
        values = function(**arguments)
    except Exception as error:
        scores = [alone(i) for i in range(count)]
        if not any(isinstance(score, Failed) for score in scores):
            raise RewardError(
                f"reward {name}: expected the same result for one completion as for many, got {type(error).__name__}: {error} "
                f"on {count} completions together and none on each alone"
            ) from error
    else:
        scores = _checked(name, values, count)
    return scores, time.monotonic() - begun


async def _side_by_side(
    functions: Mapping[str, RewardFunction], arguments: Arguments, concurrency: int, timeout: float, tick: Tick
) -> dict[str, Called]:
    prompts = arguments["prompts"]
    by_prompt = [list(group) for _, group in groupby(range(len(prompts)), key=prompts.__getitem__)]

    async def called(name: str, function: Any) -> Called:
        begun, gate = time.monotonic(), asyncio.Semaphore(concurrency)

        async def on(chosen: list[int]) -> list[Score]:
            async with gate:
                try:
                    async with asyncio.timeout(timeout) as limit:
                        values = await function(**rows(arguments, chosen))
                except Exception as error:  # users' code may raise anything
                    late = f"no scores within {timeout:g} s (rewards.timeout)"
                    reason = late if limit.expired() else f"{type(error).__name__}: {error}"
                    return [Failed(reason)] * len(chosen)
            return _checked(name, values, len(chosen))

        found = await asyncio.gather(*map(on, by_prompt))
        return [score for scores in found for score in scores], time.monotonic() - begun

    tasks = {name: asyncio.create_task(called(name, function)) for name, function in functions.items()}
    pending = set(tasks.values())
    while pending:  # when tick or a task raises, asyncio.run cancels the others
        done, pending = await asyncio.wait(pending, timeout=WATCH_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        tick(len(tasks) - len(pending), len(tasks))
    return {name: task.result() for name, task in tasks.items()}


def rows(arguments: Arguments, chosen: Sequence[int]) -> dict[str, list[Any]]:
    """The arguments of some completions."""
    return {key: [column[i] for i in chosen] for key, column in arguments.items()}


def _checked(name: str, values: object, count: int) -> list[Score]:
    """The values of one call as scores; a number that is not finite is a failure."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
        got = f"{len(values)} of them" if isinstance(values, Sequence) else repr(values)
        raise RewardError(f"reward {name}: expected a list of {count} numbers or None, got {got}")
    try:
        scores = [value if value is None or isinstance(value, Failed) else float(value) for value in values]
    except (TypeError, ValueError):
        raise RewardError(f"reward {name}: expected numbers or None, got {list(values)!r:.200}") from None
    return [
        Failed(f"expected a finite number, got {score}") if isinstance(score, float) and not math.isfinite(score) else score
        for score in scores
    ]
