"""AdvantageWeight and scale_positive: weighting, measurement, ranks, checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from eapo_kernels import EapoError, EntropyRatio, ShapeError
from eapo_kernels.integrations import AdvantageWeight, require_version, scale_positive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weight", [0.0, 0.3, torch.tensor(0.3, dtype=torch.float64), 2])
def test_only_positive_advantages_are_scaled(dtype: torch.dtype, weight: float | torch.Tensor) -> None:
    advantages = torch.tensor([[1.5, -1.0], [0.0, float("nan")]], dtype=dtype, requires_grad=True)
    scaled = scale_positive(advantages, weight)
    assert scaled.dtype == dtype
    assert not scaled.requires_grad
    expected = torch.tensor([[1.5 * float(weight), -1.0], [0.0, float("nan")]])
    torch.testing.assert_close(scaled.float(), expected, equal_nan=True, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_weight_one_changes_no_bit() -> None:
    advantages = torch.randn(1000)
    assert torch.equal(scale_positive(advantages, EntropyRatio().weight), advantages)


@pytest.mark.parametrize("weight", [-0.1, math.inf, "1", torch.ones(2), torch.tensor(-1.0)])
def test_an_invalid_weight_is_refused(weight: object) -> None:
    with pytest.raises(EapoError, match="weight"):
        scale_positive(torch.ones(2), weight)  # type: ignore[arg-type]


def test_advantages_must_be_floating() -> None:
    with pytest.raises(ShapeError, match="advantages"):
        scale_positive(torch.ones(2, dtype=torch.int64), 1.0)


def test_micro_batches_are_summed_under_the_mask() -> None:
    weight = AdvantageWeight(EntropyRatio())
    first = torch.tensor([[2.0, 2.0, float("nan")]])
    weight.observe(first, torch.tensor([[1, 1, 0]]))
    assert float(weight.step()) == 1.0
    assert float(weight.controller.initial_entropy) == 2.0
    weight.observe(torch.tensor([3.0, 9.0]), torch.tensor([True, False]))
    weight.observe(torch.tensor([1.0, 1.0, 1.0]), torch.ones(3))
    assert weight.pending
    assert float(weight.step()) == (3.0 + 3.0) / 4 / 2.0
    assert torch.equal(weight.apply(torch.tensor([4.0, -4.0])), torch.tensor([3.0, -4.0]))
    assert weight.metrics().keys() == {"eapo/entropy", "eapo/entropy_init", "eapo/entropy_ratio", "eapo/positive_weight"}


def test_a_step_without_tokens_changes_nothing() -> None:
    weight = AdvantageWeight(EntropyRatio(scale=0.7))
    weight.observe(torch.tensor([1.0]), torch.tensor([False]))
    assert float(weight.step()) == 0.7
    assert math.isnan(float(weight.controller.initial_entropy))


def test_mistakes_say_what_was_expected() -> None:
    weight = AdvantageWeight()
    with pytest.raises(EapoError, match="expected observe"):
        weight.step()
    with pytest.raises(ShapeError, match="mask"):
        weight.observe(torch.ones(2), torch.ones(3))
    with pytest.raises(EapoError, match="controller"):
        AdvantageWeight(0.5)  # type: ignore[arg-type]
    weight.observe(torch.tensor([float("nan")]), torch.ones(1))
    with pytest.raises(EapoError, match="entropy_sum"):
        weight.step()


def test_state_survives_a_checkpoint(tmp_path: Path) -> None:
    weight = AdvantageWeight(EntropyRatio(kappa=0.5, high=math.inf))
    for entropy in (2.0, 1.1):
        weight.observe(torch.tensor([entropy / 3] * 7), torch.ones(7))
        weight.step()
    weight.save(tmp_path)
    again = AdvantageWeight(EntropyRatio(kappa=0.5))
    again.load(tmp_path)
    for name in ("initial_entropy", "entropy", "weight"):
        assert torch.equal(getattr(again.controller, name), getattr(weight.controller, name)), "bit for bit"
    with pytest.raises(EapoError, match="settings"):
        AdvantageWeight(EntropyRatio(kappa=1.0)).load(tmp_path)
    with pytest.raises(EapoError, match="expected eapo_state"):
        again.load(tmp_path / "elsewhere")
    fresh = AdvantageWeight()
    fresh.save(tmp_path)
    AdvantageWeight().load(tmp_path)


def test_require_version_says_expected_and_got() -> None:
    require_version("torch", ">=2.0,<99")
    with pytest.raises(EapoError, match=r"torch: expected version >=99,<100, got 2"):
        require_version("torch", ">=99,<100")
    with pytest.raises(EapoError, match="expected version >=1, got none"):
        require_version("no-such-package", ">=1")
