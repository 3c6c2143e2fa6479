"""The entropy ratio: E9, its bounds, its memory, its checkpoint."""

from __future__ import annotations

import math

import pytest
import torch

from eapo_kernels import EapoError, EntropyRatio


def test_ratio_of_sums() -> None:
    w = EntropyRatio()
    assert w.weight == 1
    assert w.initial_entropy.isnan()
    assert w.update(300.0, 100) == 1
    assert w.initial_entropy == 3
    assert w.update(torch.tensor(150.0), torch.tensor(100)) == 0.5
    assert w.update(900.0, 200) == 1.5
    assert w.initial_entropy == 3
    assert w.ratio == 1.5


def test_falling_entropy_lowers_and_rising_entropy_raises_the_weight() -> None:
    w = EntropyRatio(kappa=2.0, scale=0.5)
    w.update(2.0, 1)
    assert w.update(1.0, 1) == 0.5 * 0.25
    assert w.update(4.0, 1) == 0.5 * 4


def test_clamp() -> None:
    w = EntropyRatio(low=0.8, high=1.1)
    w.update(1.0, 1)
    assert w.update(0.1, 1) == pytest.approx(0.8)
    assert w.update(9.0, 1) == pytest.approx(1.1)


def test_kappa_zero_is_a_constant() -> None:
    w = EntropyRatio(kappa=0.0, scale=0.3)
    w.update(1.0, 1)
    assert w.update(0.1, 1) == pytest.approx(0.3)


def test_moving_average() -> None:
    w = EntropyRatio(ema=0.75)
    w.update(2.0, 1)
    assert w.update(1.0, 1) == pytest.approx((0.75 * 2 + 0.25 * 1) / 2)
    assert w.initial_entropy == 2


def test_survives_a_checkpoint(tmp_path) -> None:
    w = EntropyRatio(ema=0.5)
    w.update(2.0, 1)
    w.update(1.0, 1)
    torch.save(w.state_dict(), tmp_path / "state.pt")
    fresh = EntropyRatio(ema=0.5)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert (fresh.weight, fresh.initial_entropy) == (w.weight, w.initial_entropy)
    assert fresh.update(1.3, 1) == w.update(1.3, 1)


def test_state_of_other_settings_is_refused() -> None:
    with pytest.raises(EapoError, match=r"EntropyRatio settings: expected .*'kappa': 2.0.* got .*'kappa': 1.0"):
        EntropyRatio(kappa=2.0).load_state_dict(EntropyRatio().state_dict())
    with pytest.raises(EapoError, match="EntropyRatio state: expected keys"):
        EntropyRatio().load_state_dict({"weight": 1.0})
    with pytest.raises(EapoError, match="EntropyRatio state: expected 0-dim numbers and a finite weight >= 0"):
        EntropyRatio().load_state_dict(EntropyRatio().state_dict() | {"weight": math.nan})


@pytest.mark.parametrize(
    ("entropy", "count", "message"),
    [
        (1.0, 0, "token_count: expected a positive number, got 0.0"),
        (math.nan, 1, "entropy_sum: expected a positive finite number of nats, got nan"),
        (0.0, 1, "entropy_sum: expected a positive finite number of nats, got 0.0"),
        (torch.tensor(math.inf), 1, "got inf"),
        (torch.tensor([1.0]), 1, r"entropy_sum: expected a number or a 0-dim tensor, got float32 \[1\] cpu"),
        ("3", 1, "entropy_sum: expected a number or a 0-dim tensor, got '3'"),
    ],
)
def test_bad_updates(entropy: float, count: int, message: str) -> None:
    with pytest.raises(EapoError, match=message):
        EntropyRatio().update(entropy, count)


@pytest.mark.parametrize(
    "settings",
    [
        {"kappa": math.nan},
        {"kappa": "1"},
        {"low": math.inf},
        {"scale": -1.0},
        {"low": -0.1},
        {"low": 2.0, "high": 1.0},
        {"ema": 1.0},
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, float]) -> None:
    with pytest.raises(EapoError, match="expected"):
        EntropyRatio(**settings)
