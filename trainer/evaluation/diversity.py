"""Diversity of the completions of one prompt, and confidence intervals of means over prompts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


class Grams(NamedTuple):
    """The n-grams of n words in the completions of one prompt.

    Attributes:
        ids: [M] int64, equal for equal n-grams.
        owners: [M] int64, the number of the completion of each.
    """

    ids: Array
    owners: Array


def ngrams(completions: Sequence[str], most: int) -> list[Grams]:
    """The n-grams of 1, 2, ..., ``most`` words (lower case, without punctuation)."""
    texts = [re.findall(r"\w+", text.lower()) for text in completions]
    number: dict[str, int] = {}
    words = np.array([number.setdefault(word, len(number)) for tokens in texts for word in tokens], dtype=np.int64)
    owners = np.repeat(np.arange(len(texts)), list(map(len, texts)))
    ids, result = words, [Grams(words, owners)]
    for n in range(2, most + 1):  # an n-gram is an (n - 1)-gram and a word
        ids = np.unique(ids[:-1] * len(number) + words[n - 1 :], return_inverse=True)[1]
        inside = owners[: len(ids)] == owners[n - 1 :]
        result.append(Grams(ids[inside], owners[: len(ids)][inside]))
    return result


def distinct(grams: Grams) -> float:
    """Number of different n-grams over the number of all n-grams of the completions together
    (arXiv:1510.03055); 0 where there is none.
    """
    return len(np.unique(grams.ids)) / len(grams.ids) if len(grams.ids) else 0.0


def self_bleu(orders: Sequence[Grams]) -> float:
    """Mean BLEU of each completion against all others (arXiv:1802.01886): 1 when all are equal,
    near 0 without overlap; NaN for fewer than two completions with words. BLEU-4 where ``orders``
    are the n-grams of 1 to 4 words.

    Empty completions are left out. No match in an order counts as 0.1 matches, but no word in
    common is a BLEU of 0. For a completion of fewer words than orders the weights are spread over
    the orders it has.
    """
    lengths = np.bincount(orders[0].owners)
    if np.count_nonzero(lengths) < 2:
        return math.nan
    used = np.minimum(len(orders), lengths)
    logs = np.zeros(len(lengths))
    for n, grams in enumerate(orders):
        has, found = lengths > n, _matches(grams, len(lengths))
        logs[has] += np.log(np.where(found > 0, found, 0.1)[has] / (lengths - n)[has]) / used[has]
        if n == 0:
            logs[found == 0] = -np.inf
    scores = []
    for i in lengths.nonzero()[0]:
        others = np.delete(lengths, i)
        closest = min(others[others > 0], key=lambda length: (abs(length - lengths[i]), length))
        scores.append(math.exp(logs[i] + min(0.0, 1 - closest / lengths[i])))
    return float(np.mean(scores))


def _matches(grams: Grams, completions: int) -> Array:
    """[completions], for each the sum over its n-grams of min(its count, the largest count in
    another completion). Two largest counts of every n-gram suffice, so no pairs are compared.
    """
    if not len(grams.ids):
        return np.zeros(completions)
    pairs, counts = np.unique(grams.ids * completions + grams.owners, return_counts=True)  # ascending: by n-gram
    starts = np.flatnonzero(np.diff(pairs // completions, prepend=-1))
    number = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(pairs)))
    most = np.maximum.reduceat(counts, starts)[number]
    leads = counts == most
    alone = np.add.reduceat(leads, starts, dtype=np.int64)[number] == 1
    second = np.maximum.reduceat(np.where(leads, 0, counts), starts)[number]
    elsewhere = np.where(leads & alone, second, most)
    return np.bincount(pairs % completions, weights=np.minimum(counts, elsewhere), minlength=completions)


def dispersion(vectors: Tensor) -> float:
    """1 - mean cosine of all pairs of completions: 0 when all mean the same. vectors: [k, dim] unit
    sentence embeddings.
    """
    count = len(vectors)
    if count < 2:
        return math.nan
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


def bootstrap(values: Sequence[float], resamples: int, seed: int = 0) -> Estimate:
    """Mean of the finite ``values`` with a percentile bootstrap interval over them; NaN when there
    are none.
    """
    kept = np.asarray([value for value in values if math.isfinite(value)])
    if not len(kept):
        return Estimate(math.nan, math.nan, math.nan)
    draws = np.random.default_rng(seed).integers(len(kept), size=(resamples, len(kept)))
    low, high = np.quantile(kept[draws].mean(1), [0.025, 0.975])
    return Estimate(float(kept.mean()), float(low), float(high))
