"""Diversity of the completions of one prompt, and confidence intervals of means over prompts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


def distinct(completions: Sequence[str], n: int) -> float:
    """Number of different n-grams of words (lower case, without punctuation) over the number of all
    n-grams of the completions together (arXiv:1510.03055); 0 where there is none.
    """
    texts = [re.findall(r"\w+", text.lower()) for text in completions]
    grams = [gram for words in texts for gram in zip(*(words[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


def dispersion(vectors: Tensor) -> float:
    """1 - mean cosine of all pairs of completions: 0 when all mean the same. vectors: [k, dim] unit
    sentence embeddings, k at least 2.
    """
    count = len(vectors)
    # |sum of vectors|^2 = count + twice the sum over pairs
    pairs = (vectors.double().sum(0).square().sum().item() - count) / (count * (count - 1))
    return 1.0 - pairs


def pass_at_k(rewards: Sequence[float], k: int) -> float:
    """Probability that at least one of ``k`` completions drawn without replacement is correct: 1 -
    C(n - c, k) / C(n, k), the unbiased estimate of pass@k from n completions of which c are correct
    (arXiv:2107.03374). NaN for n < k.

    rewards: n values of 0 or 1.
    """
    count, right = len(rewards), round(sum(rewards))
    return 1.0 - math.comb(count - right, k) / math.comb(count, k) if count >= k else math.nan


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: Sequence[float], resamples: int = 2000) -> Estimate:
    """Mean of the finite ``values`` with a percentile bootstrap interval over them; NaN when there
    are none.
    """
    kept = np.asarray([value for value in values if math.isfinite(value)])
    if not len(kept):
        return Estimate(math.nan, math.nan, math.nan)
    draws = np.random.default_rng(0).integers(len(kept), size=(resamples, len(kept)))
    low, high = np.quantile(kept[draws].mean(1), [0.025, 0.975])
    return Estimate(float(kept.mean()), float(low), float(high))
