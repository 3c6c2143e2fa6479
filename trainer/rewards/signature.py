"""TRL's signature of a reward function, ``f(prompts, completions, completion_ids, **columns) ->
list[float | None]``.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

Completion = str | list[dict[str, str]]


@dataclass(frozen=True)
class Failed:
    """Returned instead of a score: why the completion could not be scored. It is reported and never
    trained on.
    """

    reason: str


Score = float | Failed | None
RewardFunction = Callable[..., Sequence[Score] | Coroutine[Any, Any, Sequence[Score]]]


@runtime_checkable
class WithMetrics(Protocol):
    """A reward function with measurements: those of its latest call are logged as
    ``reward/<function>/<name>``.
    """

    def metrics(self) -> Mapping[str, float]: ...


def text_of(completion: Completion) -> str:
    """The text of a completion in either form."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)
