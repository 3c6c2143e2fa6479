"""Diversity and confidence intervals against values computed by hand."""

from __future__ import annotations

import math
import time
from itertools import combinations

import numpy as np
import pytest
import torch

from trainer.evaluation.diversity import bootstrap, dispersion, distinct, ngrams, pass_at_k, self_bleu


def bleu(completions: list[str]) -> float:
    return self_bleu(ngrams(completions, 4))


def test_distinct() -> None:
    completions = ["A cat, a dog.", "a cat"]  # words: a cat a dog / a cat; bigrams: a-cat cat-a a-dog / a-cat
    assert list(map(distinct, ngrams(completions, 2))) == pytest.approx([3 / 6, 3 / 4])
    assert list(map(distinct, ngrams(["one", ""], 2))) == [1.0, 0.0]
    assert list(map(distinct, ngrams(["?"], 2))) == [0.0, 0.0]


def test_self_bleu() -> None:
    assert bleu(["a b c d e", "a b c d e"]) == pytest.approx(1.0)
    assert bleu(["a b c d", "e f g h"]) == 0.0
    # "a b" against "a c" with weights 1/2: precisions 1/2 and smoothed 0.1/1, no brevity penalty; both ways alike.
    assert bleu(["a b", "a c"]) == pytest.approx(math.sqrt(0.5 * 0.1))
    # "a b c" inside "a b c d": three of three n-grams match, brevity penalty exp(1 - 4/3). The other way round:
    # precisions 3/4, 2/3, 1/2 and 0.1/1.
    short, long = math.exp(1 - 4 / 3), (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25
    assert bleu(["a b c", "a b c d"]) == pytest.approx((short + long) / 2)
    assert math.isnan(bleu(["only one", ""]))


@pytest.mark.parametrize("seed", range(20))
def test_self_bleu_is_that_of_nltk(seed: int) -> None:
    """Against every pair of completions, counted anew for each (n-grams without a match as in its
    method 1).
    """
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    random = np.random.default_rng(seed)
    lengths = random.choice([0, 1, 2, 3, 4, 7, 40], size=random.integers(2, 7))
    texts = [[f"w{word}" for word in random.integers(0, 6, size=length)] for length in (*lengths, 5, 5)]
    filled, smoothing, scores = [text for text in texts if text], nltk.SmoothingFunction().method1, []
    for i, text in enumerate(filled):
        order = min(4, len(text))
        others = filled[:i] + filled[i + 1 :]
        scores.append(nltk.sentence_bleu(others, text, weights=(1 / order,) * order, smoothing_function=smoothing))
    assert bleu([" ".join(text) for text in texts]) == pytest.approx(np.mean(scores), rel=1e-9)


def test_measures_of_long_completions_take_no_time() -> None:
    """16 x 4000 words, which compared in pairs took seconds. The bound leaves a slow machine ten
    times what it needs: 500 prompts within a minute or two.
    """
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in random.zipf(1.3, size=4000) % 5000) for _ in range(16)]
    began = time.process_time()
    grams = ngrams(texts, 4)
    assert 0 < self_bleu(grams) < 1
    assert 0 < distinct(grams[1]) < 1
    assert time.process_time() - began < 1.0


def test_dispersion_is_one_minus_the_mean_cosine_of_the_pairs() -> None:
    assert dispersion(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])) == pytest.approx(1 - (0 + 0.6 + 0.8) / 3)
    assert dispersion(torch.tensor([[0.6, 0.8]] * 4)) == pytest.approx(0.0, abs=1e-7)
    assert math.isnan(dispersion(torch.ones(1, 1)))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_pass_at_k_is_the_share_of_the_draws_with_a_right_completion(k: int) -> None:
    rewards = [0.0, 1.0, 0.0, 0.0, 1.0]
    draws = list(combinations(rewards, k))
    assert pass_at_k(rewards, k) == pytest.approx(sum(map(max, draws)) / len(draws))
    assert pass_at_k([0.0] * 5, k) == 0.0
    assert math.isnan(pass_at_k([1.0] * (k - 1), k))


def test_bootstrap_covers_the_mean_and_skips_what_is_missing() -> None:
    values = np.random.default_rng(0).normal(5.0, 1.0, 100)
    found = bootstrap([*values, math.nan], resamples=2000)
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 10
    assert found.low == pytest.approx(values.mean() - half, abs=0.05)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05)
    assert bootstrap([*values, math.nan], resamples=2000) == found
    assert math.isnan(bootstrap([math.nan], resamples=10).mean)
