"""Section rewards: how completions are scored."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from ..errors import check
from .section import Count, Natural, NonNegative, Positive, Section, Share

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


class JudgeConfig(Section):
    """The reward ``judge``: a language model behind an OpenAI-compatible endpoint scores every completion."""

    url: str = "http://localhost:8000/v1"
    """Requests go to <url>/chat/completions; the default is the address of ``vllm serve MODEL`` on this machine."""
    model: str = ""
    """The model's name as the endpoint knows it."""
    api_key_env: str = ""
    """Environment variable that holds the API key; empty sends the word none."""
    template: str = TEMPLATE
    """Message to the judge. {prompt}, {answer} (the reference) and {completion} are replaced, each marked as data."""
    score_pattern: str = r"score[\s*:=]*(-?\d+(?:\.\d+)?)"
    """Regular expression (case-insensitive) whose first group is the score; the last match in the reply counts."""
    score_range: tuple[float, float] = (0.0, 10.0)
    """Worst and best score, mapped linearly to a reward in [0, 1]. A score outside is a failure."""
    temperature: NonNegative = 0.0
    """Sampling temperature of the judge."""
    max_tokens: Count = 256
    """Most tokens of the judge's reply."""
    concurrency: Count = 16
    """Most concurrent requests."""
    timeout: Positive = 300.0
    """Seconds for one score, retries and pauses included. A try that stays silent for its share, timeout / (retries + 1), is
    repeated."""
    retries: Natural = 4
    """Retries after status 408, 409, 429 or 5xx, silence or a lost connection, with the pauses of the openai client:
    Retry-After, or 0.5 s doubled up to 8 s."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            parts, groups = urlsplit(self.url), re.compile(self.score_pattern).groups
        except re.error as error:
            raise ValueError(f"score_pattern: expected a regular expression ({error}), got {self.score_pattern!r}") from None
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
        check(good, "url", "a URL that starts with http:// or https://", self.url)
        check("{completion}" in self.template, "template", "text with {completion}", self.template)
        check(groups >= 1, "score_pattern", "a group around the score", self.score_pattern)
        check(self.score_range[0] < self.score_range[1], "score_range", "the worst score below the best", self.score_range)
        return self


class RewardModelConfig(Section):
    """The reward ``reward_model``: the output of a sequence classifier with one output."""

    path: str = ""
    """A folder in Hugging Face format for AutoModelForSequenceClassification, or an id of the hub."""
    batch: Count = 16
    """Most completions in one forward pass."""
    max_tokens: Count = 4096
    """Most tokens of prompt and completion together. A longer completion is a failure: truncation would score a different
    text."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and computation."""
    device: str = "auto"
    """auto (the trained model's device), cpu, cuda, or cuda:N."""


class RewardsConfig(Section):
    """How completions are scored. The reward is the weighted sum over the functions that scored the completion."""

    functions: Annotated[tuple[str, ...], Field(min_length=1)] = ("similarity",)
    """Built-in names (similarity, rouge, exact_match, math_verify, reward_model, judge; without reference answers agreement,
    majority) or import paths module:function with TRL's signature, async or not."""
    weights: tuple[float, ...] = (1.0,)
    """One weight for each function."""
    on_failure: Literal["exclude", "stop"] = "exclude"
    """What a missing, NaN, infinite or failed score does: exclude the group of that prompt from the step, or stop the run."""
    overlong: Literal["keep", "mask", "penalty"] = "keep"
    """What happens to truncated completions: they are trained on like the others; or left out of the loss (their rewards
    still count in the group's mean and in the metrics); or the reward falls linearly by up to 1 over the last
    overlong_window tokens (DAPO, arXiv:2503.14476, eq. 13)."""
    overlong_window: Natural = 0
    """Tokens before rollout.max_new_tokens over which the penalty grows; 0 is a fifth of them, as in DAPO."""
    concurrency: Count = 16
    """Most concurrent calls of one async function; a call covers all completions of one prompt."""
    timeout: Positive = 120.0
    """Seconds for one call of an async function. Ordinary functions have no time limit, because they cannot be cancelled."""
    embedding_model: str = "minilm-l6-v2"
    """Sentence embedding for similarity: an embedded name, a folder in Hugging Face format or an id of the hub."""
    embedding_share: Share = 0.5
    """Share of the embedding cosine in similarity; the rest is ROUGE-L, which a fluent wrong completion does not raise."""
    judge: JudgeConfig = JudgeConfig()
    reward_model: RewardModelConfig = RewardModelConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        check(len(set(self.functions)) == len(self.functions), "functions", "no name twice", self.functions)
        expected = f"as many as rewards.functions ({len(self.functions)})"
        check(len(self.weights) == len(self.functions), "weights", expected, self.weights)
        if "judge" in self.functions:
            check(bool(self.judge.model), "judge.model", "the model's name at the endpoint", self.judge.model)
        if "reward_model" in self.functions:
            check(bool(self.reward_model.path), "reward_model.path", "a directory", self.reward_model.path)
        return self
