"""Statistics within classes, against one class at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from eapo_kernels.objectives.token_weights.partition import OrderedPartition


def _case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """keys (some negative, in no order), values (with ties), and which members count."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randint(-3, 9, (60,), generator=g) * 7
    values = (torch.randn(60, generator=g) * 4).round() / 4
    return keys, values, torch.rand(60, generator=g) > 0.2


def _rank(values: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(values), dtype=torch.int64).scatter_(0, values.argsort(stable=True), torch.arange(len(values)))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("ours", "alone"),
    [
        (lambda p, v: p.sum(v), lambda v: v.sum()),
        (lambda p, v: p.mean(v), lambda v: v.mean()),
        (lambda p, v: p.max(v), lambda v: v.max()),
        (lambda p, v: p.min(v), lambda v: v.min()),
        (lambda p, v: p.counts, lambda v: torch.tensor(float(len(v)))),
        (lambda p, v: p.quantile(v, 0.3), lambda v: v.quantile(0.3)),
        (lambda p, v: p.quantile(v, 1.0), lambda v: v.max()),
        (lambda p, v: p.rank(v), _rank),
    ],
    ids=["sum", "mean", "max", "min", "counts", "quantile", "last quantile", "rank"],
)
def test_each_class_by_itself(seed: int, ours: Callable, alone: Callable) -> None:
    keys, values, valid = _case(seed)
    result = ours(OrderedPartition(keys, valid), values)
    for key in keys[valid].unique():
        own = valid & (keys == key)
        torch.testing.assert_close(result[own].double(), alone(values[own].double()).double().expand(int(own.sum())))


def test_over_the_classes() -> None:
    keys, values, valid = _case(2)
    partition = OrderedPartition(keys, valid)
    means = {int(k): float(values[valid & (keys == k)].mean()) for k in keys[valid].unique()}
    assert float(partition.mean_of_classes(partition.mean(values))) == pytest.approx(sum(means.values()) / len(means))
    ordered = sorted(means)
    following = partition.following(partition.mean(values), -99.0)
    for place, key in enumerate(ordered):
        expected = means[ordered[place + 1]] if place + 1 < len(ordered) else -99.0
        assert following[valid & (keys == key)].tolist() == pytest.approx([expected] * int((valid & (keys == key)).sum()))


def test_no_members_and_no_valid_members() -> None:
    empty = OrderedPartition(torch.zeros(0, dtype=torch.int64))
    assert empty.sum(torch.zeros(0)).tolist() == []
    assert float(empty.mean_of_classes(torch.zeros(0))) == 0
    none_valid = OrderedPartition(torch.tensor([1, 2]), torch.tensor([False, False]))
    assert float(none_valid.mean_of_classes(torch.tensor([5.0, 6.0]))) == 0
    assert none_valid.following(torch.tensor([5.0, 6.0]), -1.0).tolist() == [-1.0, -1.0]


@pytest.mark.filterwarnings("error")
def test_the_index_is_the_number_of_smaller_keys() -> None:
    """Also for strided keys; members that do not count come last."""
    keys, _, valid = _case(3)
    strided = torch.stack([keys, keys], 1)[:, 0]
    smaller = (keys.unsqueeze(0) < keys.unsqueeze(1)).sum(1)
    assert torch.equal(OrderedPartition(strided).index, smaller)
    among = ((keys.unsqueeze(0) < keys.unsqueeze(1)) & valid).sum(1)
    partition = OrderedPartition(strided, valid)
    assert torch.equal(partition.index, torch.where(valid, among, valid.sum()))
    assert partition.counts[valid].tolist() == [float((valid & (keys == key)).sum()) for key in keys[valid]]
