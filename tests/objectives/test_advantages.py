"""Advantages, splits and rewards without labels, against hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch

from eapo_kernels import EapoError, ShapeError
from eapo_kernels.objectives.advantages import ADVANTAGES, split_responses
from eapo_kernels.objectives.grouping import Groups
from eapo_kernels.objectives.semantic import majority_rewards, semantic_rewards

REWARDS = torch.tensor([1.0, 2.0, 3.0, 0.5, 0.5])
GROUPS = torch.tensor([9, 9, 9, -4, -4])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("group_norm", [-1 / (1 + 1e-6), 0.0, 1 / (1 + 1e-6), 0.0, 0.0]),
        ("group_mean", [-1.0, 0.0, 1.0, 0.0, 0.0]),
        ("sign", [-1.0, 0.0, 1.0, 0.0, 0.0]),
        ("batch_norm", [(r - 1.4) / (math.sqrt(4.7 / 4) + 1e-6) for r in (1, 2, 3, 0.5, 0.5)]),
    ],
)
def test_by_hand(name: str, expected: list[float]) -> None:
    torch.testing.assert_close(ADVANTAGES[name](REWARDS, GROUPS), torch.tensor(expected))


def test_order_of_responses_does_not_matter() -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    for advantage in (ADVANTAGES["group_norm"], ADVANTAGES["sign"]):
        torch.testing.assert_close(advantage(REWARDS[order], GROUPS[order]), advantage(REWARDS, GROUPS)[order])


def test_a_mean_that_fp32_cannot_hold_is_still_a_tie() -> None:
    rewards = torch.tensor([0.1, 0.2, 0.3] * 50)
    groups = torch.arange(150) // 3
    for name in ("sign", "group_norm"):
        assert (ADVANTAGES[name](rewards, groups).reshape(-1, 3)[:, 1] == 0).all()
    assert (ADVANTAGES["sign"](torch.full((7,), 0.1), torch.zeros(7, dtype=torch.int64)) == 0).all()


def test_close_rewards_are_not_ties() -> None:
    rewards = torch.tensor([1000.0, 1000.0005, 1000.001, 1000.0015])
    assert ADVANTAGES["sign"](rewards, torch.zeros(4, dtype=torch.int64)).tolist() == [-1, -1, 1, 1]


@pytest.mark.parametrize("far", [1e9, -1e9, 2.0**31])
def test_rewards_beyond_the_integers_of_fp32_keep_their_order(far: float) -> None:
    """Given in fp64 they are centred before the cast; 1e9 + i is one number in fp32."""
    near = torch.tensor([0.0, 1.0, 2.0, 3.0, 7.0, 7.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    for name in ("group_norm", "group_mean", "sign", "batch_norm"):
        torch.testing.assert_close(ADVANTAGES[name](near + far, groups), ADVANTAGES[name](near.float(), groups))
    positive = split_responses(near.float(), Groups(near + far, groups)).positive()
    assert positive.tolist() == [False, False, True, True, False, False]
    thirds = torch.tensor([0.1, 0.2, 0.3] * 50, dtype=torch.float64)
    assert (ADVANTAGES["sign"](thirds, torch.arange(150) // 3).reshape(-1, 3)[:, 1] == 0).all(), "a tie in fp64 too"


def test_binary() -> None:
    rewards = torch.tensor([1.0, 0.0, 1.0])
    assert ADVANTAGES["binary"](rewards, torch.zeros(3, dtype=torch.int64)).tolist() == [1, -1, 1]
    with pytest.raises(EapoError, match=r"expected 0 or 1 .* got 0.5"):
        ADVANTAGES["binary"](torch.tensor([1.0, 0.5]), torch.zeros(2, dtype=torch.int64))


def test_splits() -> None:
    advantages = torch.tensor([-1.0, 0.0, 1.0, 2.0, 0.0])
    expected = {
        "group": [False, False, True, False, False],
        "batch": [False, True, True, False, False],
        "advantage": [False, False, True, True, False],
    }
    groups = {"group": Groups(REWARDS, GROUPS), "batch": Groups(REWARDS, None), "advantage": None}
    for name, positive in expected.items():
        assert split_responses(advantages, groups[name]).positive().tolist() == positive


def test_semantic_rewards() -> None:
    """Groups interleaved; all clusters different: zeros; no cluster (negative): zero, and not a cluster of its own."""
    groups = torch.tensor([9, 4, 9, 4, 9, 4, 7])
    clusters = torch.tensor([0, 5, 1, -1, 2, 5, 0])
    torch.testing.assert_close(semantic_rewards(clusters, groups), torch.tensor([0, 2 / 3, 0, 0, 0, 2 / 3, 0]))
    nothing = torch.full((4,), -1)
    assert semantic_rewards(nothing, torch.zeros(4, dtype=torch.int64)).tolist() == [0, 0, 0, 0]
    with pytest.raises(ShapeError, match=r"cluster_ids: expected int64 \[4\] cpu, got float32 \[4\] cpu"):
        semantic_rewards(torch.zeros(4), torch.zeros(4, dtype=torch.int64))


def test_majority_rewards() -> None:
    """arXiv 2504.16084: 1 for the most frequent answer of the group; ties all win; no answer never does."""
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    clusters = torch.tensor([1, 2, 1, 3, 4, 5, -1, -1, -1])
    assert majority_rewards(clusters, groups).tolist() == [1, 0, 1, 0, 1, 1, 0, 0, 0]


def test_cluster_ids_may_be_any_int64() -> None:
    """The largest one is a cluster too, and no two groups' clusters become one number."""
    last = 2**63 - 1
    assert majority_rewards(torch.tensor([last, last, 1]), torch.tensor([0, 0, 0])).tolist() == [1, 1, 0]
    assert semantic_rewards(torch.tensor([last, last, 1]), torch.tensor([0, 0, 0])).tolist() == pytest.approx(
        [2 / 3, 2 / 3, 1 / 3]
    )
    clusters, groups = torch.tensor([2**62, 0, 0, 0, 4, 0]), torch.tensor([0, 0, 0, 0, 0, 1])
    assert majority_rewards(clusters, groups).tolist() == [0, 1, 1, 1, 0, 1]
    for bad in (None, [0, 1], torch.tensor([0.0, 1.0])):
        with pytest.raises(ShapeError, match=r"group_ids: expected int64 \[B\]"):
            semantic_rewards(torch.tensor([0, 1]), bad)  # type: ignore[arg-type]
