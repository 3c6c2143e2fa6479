"""Configurations and methods refuse what they do not know."""

from __future__ import annotations

import pytest

from eapo_kernels import METHODS, EAPOConfig, EapoError, get_method


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "surrogate",
            "trpo",
            "surrogate: expected one of reinforce, ppo_clip, unclipped, balanced_clip, cispo, gspo or a function, got 'trpo'",
        ),
        ("advantage", "gae", "advantage: expected one of group_norm"),
        ("split", "median", "split: expected one of group, batch, advantage, got 'median'"),
        ("reduction", "mean", "reduction: expected one of token_mean"),
        ("kl_estimator", "k4", "kl_estimator: expected one of k1, k2, k3"),
        ("clip_low", 1.5, r"clip_low: expected a finite number in \[0, 1\], got 1.5"),
        ("clip_high", -0.1, "clip_high: expected a finite number >= 0, got -0.1"),
        ("dual_clip", 0.5, "dual_clip: expected a finite number >= 1, got 0.5"),
        ("importance_cap", float("nan"), "importance_cap: expected a finite number >= 0, got nan"),
        ("kl_coef", "0.1", "kl_coef: expected a finite number >= 0, got '0.1'"),
        ("entropy_coef", float("inf"), "entropy_coef: expected a finite number, got inf"),
        ("dual_clip", 1.0, "dual_clip: expected a finite number > 1, got 1.0"),
        ("split", lambda *a: a, "split: expected one of group, batch, advantage, got <function"),
        ("drop_zero_weight", "no", "drop_zero_weight: expected True or False, got 'no'"),
        ("fixed_length", True, "fixed_length: expected a positive int, got True"),
        ("fixed_length", 0, "fixed_length: expected a positive int, got 0"),
        ("negative_weight", -1, "negative_weight: expected a finite number >= 0, got -1"),
    ],
)
def test_bad_fields(field: str, value: object, message: str) -> None:
    with pytest.raises(EapoError, match=message):
        EAPOConfig(**{field: value})


def test_get_method_changes_fields() -> None:
    method = get_method("dr_grpo", fixed_length=64, clip_high=0.3)
    assert (method.config.fixed_length, method.config.clip_high) == (64, 0.3)
    assert get_method("w_reinforce", positive_weight=0.5).positive_weight == 0.5
    assert METHODS["dr_grpo"].config.fixed_length is None
    with pytest.raises(EapoError, match=r"config: expected fields among .*clip_low.*, got clip_hgih"):
        get_method("grpo", clip_hgih=0.3)
    with pytest.raises(EapoError, match="method: expected a name or a Method, got 3"):
        get_method(3)  # type: ignore[arg-type]
