"""Reward functions that tests name by import path."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def low_numbers(completions: list[str], **_: Any) -> list[float]:
    """Share of the words that are n0 to n9: something a tiny model learns in a few steps."""
    return [sum(word in {f"n{i}" for i in range(10)} for word in text.split()) / 6 for text in completions]


def same(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def far_numbers(completions: list[str], **_: Any) -> list[float]:
    """The number of words n0 to n9, far beyond the integers of fp32."""
    return [1e9 + 6 * share for share in low_numbers(completions)]


def near_numbers(completions: list[str], **_: Any) -> list[float]:
    """``far_numbers`` where fp32 holds them."""
    return [6 * share for share in low_numbers(completions)]


def has_a_low_number(completions: list[str], **_: Any) -> list[float]:
    """1 where a word is n0 to n9, else 0."""
    return [float(any(word in {f"n{i}" for i in range(10)} for word in text.split())) for text in completions]


def share_of_the_longest(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Compares the completions of a prompt, which must therefore come together."""
    longest: dict[str, int] = {}
    for prompt, text in zip(prompts, completions, strict=True):
        longest[prompt] = max(len(text), longest.get(prompt, 1))
    return [len(text) / longest[prompt] for prompt, text in zip(prompts, completions, strict=True)]


def nan_for_number_1(completions: list[str], number: list[int], **_: Any) -> list[float]:
    """The last completion to prompt 1 has no valid score."""
    last = max((i for i, n in enumerate(number) if n == 1), default=None)
    return [math.nan if i == last else float(len(text)) for i, text in enumerate(completions)]


def raises_for_number_1(completions: list[str], number: list[int], **_: Any) -> list[float]:
    if 1 in number:
        raise RuntimeError("number 1 is broken")
    return [float(len(text)) for text in completions]


def always_raises(completions: list[str], **_: Any) -> list[float]:
    raise OSError("the judge is away")


def too_few(completions: list[str], **_: Any) -> list[float]:
    return [1.0]


def only_even(completions: list[str], number: list[int], **_: Any) -> list[float | None]:
    return [1.0 if n % 2 == 0 else None for n in number]


def slow(completions: list[str], **_: Any) -> list[float]:
    Path(os.environ["SLOW_REWARD_STARTED"]).touch()
    time.sleep(60)
    return [0.0 for _ in completions]


STOPS: list[signal.Signals | None] = []
"""What the next calls of ``stops`` send to this process."""


def stops(completions: list[str], **_: Any) -> list[float]:
    number = STOPS.pop(0) if STOPS else None
    if number:
        signal.raise_signal(number)
    return low_numbers(completions)


CALLS_LEFT: list[int] = []
"""Number of calls until ``breaks`` raises; empty: it never does."""


def breaks(completions: list[str], **_: Any) -> list[float]:
    if CALLS_LEFT:
        CALLS_LEFT[0] -= 1
        if CALLS_LEFT[0] < 0:
            raise OSError("the judge is away")
    return noisy(completions)


def noisy(completions: list[str], **_: Any) -> list[float]:
    """Draws from every global generator."""
    noise = (random.random() + np.random.random() + torch.rand(()).item() for _ in completions)
    return [value + 0.01 * extra for value, extra in zip(low_numbers(completions), noise, strict=True)]


def raises_on_the_second_rank(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * (len(completions) - (os.environ.get("RANK") == "1"))
