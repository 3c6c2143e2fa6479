"""Section rewards: how completions are scored."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from .checks import check

TEMPLATE = """\
Grade an answer to a question against a reference answer.

Question:
{prompt}

Reference answer:
{answer}

Answer to grade:
{completion}

Judge only whether its content is correct and complete, not its length or style. Give one short reason, then end with a line
"Score: N", where N is a number from 0 (wrong or empty) to 10 (as good as the reference)."""


@dataclass(frozen=True)
class JudgeConfig:
    """The reward ``judge``: a language model behind an OpenAI-compatible endpoint scores every
    completion.
    """

    url: str = "http://localhost:8000/v1"
    """Requests go to <url>/chat/completions; the default is the address of ``vllm serve MODEL`` on
    this machine."""
    model: str = ""
    """The model's name as the endpoint knows it."""
    api_key_env: str = ""
    """Environment variable that holds the API key; empty sends the word none."""
    template: str = TEMPLATE
    """Message to the judge. {prompt}, {answer} (the reference) and {completion} are replaced, each
    marked as data."""
    score_pattern: str = r"score[\s*:=]*(-?\d+(?:\.\d+)?)"
    """Regular expression (case-insensitive) whose first group is the score; the last match in the
    reply counts."""
    score_range: tuple[float, float] = (0.0, 10.0)
    """Worst and best score, mapped linearly to a reward in [0, 1]. A score outside is a failure."""
    temperature: float = 0.0
    """Sampling temperature of the judge."""
    max_tokens: int = 256
    """Most tokens of the judge's reply."""
    concurrency: int = 16
    """Most concurrent requests."""
    timeout: float = 300.0
    """Seconds for one score, retries and pauses included. A try that stays silent for its share,
    timeout / (retries + 1), is repeated."""
    retries: int = 4
    """Retries after status 408, 409, 429 or 5xx, silence or a lost connection, with the pauses of
    the openai client: Retry-After, or 0.5 s doubled up to 8 s."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
        check(good, "rewards.judge.url", "a URL that starts with http:// or https://", self.url)
        check("{completion}" in self.template, "rewards.judge.template", "text with {completion}", self.template)
        try:
            groups = re.compile(self.score_pattern).groups
        except re.error as error:
            groups = 0
            check(False, "rewards.judge.score_pattern", f"a regular expression ({error})", self.score_pattern)
        check(groups >= 1, "rewards.judge.score_pattern", "a group around the score", self.score_pattern)
        low, high = self.score_range
        check(low < high, "rewards.judge.score_range", "the worst score below the best", self.score_range)
        check(self.temperature >= 0, "rewards.judge.temperature", "at least 0", self.temperature)
        check(self.max_tokens >= 1, "rewards.judge.max_tokens", "at least 1", self.max_tokens)
        check(self.concurrency >= 1, "rewards.judge.concurrency", "at least 1", self.concurrency)
        check(self.timeout > 0, "rewards.judge.timeout", "a positive number", self.timeout)
        check(self.retries >= 0, "rewards.judge.retries", "at least 0", self.retries)


@dataclass(frozen=True)
class RewardModelConfig:
    """The reward ``reward_model``: the output of a sequence classifier with one output."""

    path: str = ""
    """A directory in Hugging Face format for AutoModelForSequenceClassification."""
    batch: int = 16
    """Most completions in one forward pass."""
    max_tokens: int = 4096
    """Most tokens of prompt and completion together. A longer completion is a failure: truncation
    would score a different text."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and computation."""
    device: str = "auto"
    """auto (the trained model's device), cpu, cuda, or cuda:N."""

    def __post_init__(self) -> None:
        check(self.batch >= 1, "rewards.reward_model.batch", "at least 1", self.batch)
        check(self.max_tokens >= 1, "rewards.reward_model.max_tokens", "at least 1", self.max_tokens)


@dataclass(frozen=True)
class RewardsConfig:
    """How completions are scored. The reward is the weighted sum over the functions that scored the
    completion.
    """

    functions: tuple[str, ...] = ("similarity",)
    """Built-in names (similarity, rouge, exact_match, math_verify, reward_model, judge; without
    reference answers agreement, majority) or import paths module:function with TRL's signature, async or
    not."""
    weights: tuple[float, ...] = (1.0,)
    """One weight for each function."""
    on_failure: Literal["exclude", "stop"] = "exclude"
    """What a missing, NaN, infinite or failed score does: exclude the group of that prompt from the
    step, or stop the run."""
    concurrency: int = 16
    """Most concurrent calls of one async function; a call covers all completions of one prompt."""
    timeout: float = 120.0
    """Seconds for one call of an async function. Ordinary functions have no time limit, because
    they cannot be cancelled."""
    embedding_model: str = "minilm-l6-v2"
    """Sentence embedding for similarity: an embedded name or a directory in Hugging Face format."""
    embedding_share: float = 0.5
    """Share of the embedding cosine in similarity; the rest is ROUGE-L, which a fluent wrong
    completion does not raise."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)

    def __post_init__(self) -> None:
        check(len(self.functions) > 0, "rewards.functions", "at least one function", self.functions)
        check(len(set(self.functions)) == len(self.functions), "rewards.functions", "no name twice", self.functions)
        expected = f"as many as rewards.functions ({len(self.functions)})"
        check(len(self.weights) == len(self.functions), "rewards.weights", expected, self.weights)
        check(0 <= self.embedding_share <= 1, "rewards.embedding_share", "in [0, 1]", self.embedding_share)
        check(self.concurrency >= 1, "rewards.concurrency", "at least 1", self.concurrency)
        check(self.timeout > 0, "rewards.timeout", "a positive number", self.timeout)
        if "judge" in self.functions:
            check(bool(self.judge.model), "rewards.judge.model", "the model's name at the endpoint", self.judge.model)
        if "reward_model" in self.functions:
            check(bool(self.reward_model.path), "rewards.reward_model.path", "a directory", self.reward_model.path)
