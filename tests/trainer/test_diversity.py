"""Diversity and confidence intervals against values computed by hand."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from trainer.evaluation.diversity import bootstrap, dispersion, distinct, pass_at_k


def test_distinct() -> None:
    completions = ["A cat, a dog.", "a cat"]  # words: a cat a dog / a cat; bigrams: a-cat cat-a a-dog / a-cat
    assert [distinct(completions, n) for n in (1, 2)] == pytest.approx([3 / 6, 3 / 4])
    assert [distinct(["one", ""], n) for n in (1, 2)] == [1.0, 0.0]
    assert [distinct(["?"], n) for n in (1, 2)] == [0.0, 0.0]


def test_dispersion_is_one_minus_the_mean_cosine_of_the_pairs() -> None:
    assert dispersion(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])) == pytest.approx(1 - (0 + 0.6 + 0.8) / 3)
    assert dispersion(torch.tensor([[0.6, 0.8]] * 4)) == pytest.approx(0.0, abs=1e-7)


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
