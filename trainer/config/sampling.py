"""Section rollout: how answers are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import check


@dataclass(frozen=True)
class RolloutConfig:
    """How answers are sampled."""

    engine: Literal["transformers"] = "transformers"
    """The engine that generates."""
    prompts: int = 4
    """Questions a step."""
    responses: int = 8
    """Answers to each question; together they form one group."""
    max_new_tokens: int = 128
    """An answer that has not ended by then is truncated."""
    temperature: float = 1.0
    """Sampling temperature. Log-probs, entropy and loss use the same one."""
    top_p: float = 1.0
    """Nucleus sampling; below 1 the engine's log-probs are those of the cut distribution, so a mismatch is logged."""
    batch: int = 64
    """Most answers generated at once."""

    def __post_init__(self) -> None:
        check(self.prompts >= 1, "rollout.prompts", "at least 1", self.prompts)
        check(self.responses >= 2, "rollout.responses", "at least 2 (a group of one has no signal)", self.responses)
        check(self.max_new_tokens >= 1, "rollout.max_new_tokens", "at least 1", self.max_new_tokens)
        check(self.temperature > 0, "rollout.temperature", "a positive number", self.temperature)
        check(0 < self.top_p <= 1, "rollout.top_p", "in (0, 1]", self.top_p)
        check(self.batch >= 1, "rollout.batch", "at least 1", self.batch)
