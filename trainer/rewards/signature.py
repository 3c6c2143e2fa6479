"""TRL's signature of a reward function, ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

RewardFunction = Callable[..., Sequence[float | None]]
Completion = str | list[dict[str, str]]


def text_of(completion: Completion) -> str:
    """The text of an answer, whichever form it has."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)
