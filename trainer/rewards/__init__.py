"""Rewards of completions.

A reward function has TRL's signature, ``f(prompts, completions, completion_ids, **columns) ->
list[float | None]``, and may be ``async``. ``columns`` are the other columns of the data, repeated
like the prompts. For chat prompts ``completions`` are lists of messages, for text prompts they are
text. None means that the function does not apply to the completion; it is left out of the sum.
"""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

Completion = str | list[dict[str, str]]


@dataclass(frozen=True)
class Failed:
    """Returned instead of a score: why the completion could not be scored. It is reported and never
    trained on.
    """

    reason: str


Score = float | Failed | None
RewardFunction = Callable[..., Sequence[Score] | Coroutine[Any, Any, Sequence[Score]]]


def text_of(completion: Completion) -> str:
    """The text of a completion in either form."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def reference_of(answer: object) -> str | Failed:
    """A reference answer as text. What is missing, empty or no single value is not compared with."""
    kinds = (str, int, float, decimal.Decimal, datetime.date, datetime.time)
    if isinstance(answer, kinds) and answer == answer and (text := str(answer)).strip():
        return text
    return Failed(f"expected a reference answer (text, number or date), got {answer!r:.120}")
