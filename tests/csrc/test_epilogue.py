"""The epilogues of csrc/epilogue.h on the host, thread by thread, against the float64 oracle and
the swizzle of TMA.

``host.cpp`` fills the accumulators of all 128 threads of a warp group. Triton's ``finalize``
completes the sums.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from comparison import STATISTICS_FLOOR
from torch import Tensor

from eapo_kernels import reference
from eapo_kernels.ops.dispatch import RowStatistics
from eapo_kernels.ops.triton.online_softmax import PartialSums, finalize
from eapo_kernels.testing import assert_no_worse_than, eager_token_stats

pytestmark = pytest.mark.csrc

ROWS = 64
LOG2E = 1.4426950408889634
KINDS = {"logp": 0, "entropy": 1, "second moments": 2}


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def range_sums(
    host: ctypes.CDLL, raw: Tensor, scale: Tensor, targets: Tensor, *, kind: int = 2, block_v: int = 256,
    bias: Tensor | None = None, per_split: int = 1, pingpong: bool = False,
) -> Tensor:  # fmt: skip
    """[7, splits, 64] as ``stream_statistics`` stores them; in ping-pong two splits a range, one
    per warp group.
    """
    vocab, targets = raw.shape[1], targets.int()
    tiles = -(-vocab // block_v)
    parts = []
    for first in range(0, tiles, per_split):
        for group in range(2 if pingpong else 1):
            out = torch.full((7, ROWS), math.nan)
            host.range_sums(
                block_v, kind, pointer(raw), vocab, vocab, pointer(scale), pointer(targets), pointer(bias),
                first + group, min(first + per_split, tiles), 2 if pingpong else 1, pointer(out),
            )  # fmt: skip
            parts.append(out)
    return torch.stack(parts, 1)


def merged(sums: Tensor, kind: int = 2) -> RowStatistics:
    partial = PartialSums(sums[: (3, 4, 7)[kind]].contiguous(), entropy=kind > 0, second_moments=kind > 1)
    launch, final = finalize(partial)
    launch()
    return final.statistics()


def compare(actual: RowStatistics, raw: Tensor, scale: Tensor, targets: Tensor) -> None:
    eye = torch.eye(raw.shape[1])
    options = {"second_moments": actual.p2 is not None}
    exact = reference.token_stats(raw.double(), eye.double(), targets, inv_temperature=scale.double(), **options)
    eager = eager_token_stats(raw, eye, targets, inv_temperature=scale, **options)
    for name in ("logp", "entropy", "lse", "p2", "p2_logp", "varentropy"):
        got = getattr(actual, name)
        if got is not None:
            assert_no_worse_than(got, getattr(eager, name), getattr(exact, name), floor=STATISTICS_FLOOR, name=name)


def rows_of(vocab: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(raw logits [64, vocab], scales [64], targets [64]); targets include the first and the last
    column.
    """
    g = torch.Generator().manual_seed(seed)
    raw = torch.randn(ROWS, vocab, generator=g) * spread
    scale = torch.rand(ROWS, generator=g) * 2 + 0.3
    targets = torch.randint(vocab, (ROWS,), generator=g)
    targets[0], targets[1] = 0, vocab - 1
    return raw, scale, targets


@pytest.mark.parametrize("pingpong", [False, True])
@pytest.mark.parametrize("block_v", [128, 256])
@pytest.mark.parametrize("vocab", [1, 257, 1600])
def test_statistics(vocab: int, block_v: int, pingpong: bool, host: ctypes.CDLL) -> None:
    raw, scale, targets = rows_of(vocab, 4.0)
    sums = range_sums(host, raw, scale, targets, block_v=block_v, per_split=3, pingpong=pingpong)
    assert not sums.isnan().any()
    compare(merged(sums), raw, scale, targets)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_each_kind_computes_its_fields(kind: int, host: ctypes.CDLL) -> None:
    raw, scale, targets = rows_of(700, 3.0)
    sums, complete = (range_sums(host, raw, scale, targets, kind=k, per_split=2) for k in (kind, 2))
    torch.testing.assert_close(sums[:3], complete[:3], rtol=0, atol=0)
    if kind:
        torch.testing.assert_close(sums[3], complete[3], rtol=1e-5, atol=1e-5)
    compare(merged(sums, kind), raw, scale, targets)


@pytest.mark.parametrize("per_split", [1, 2])
def test_the_cut_of_the_vocabulary_changes_little(per_split: int, host: ctypes.CDLL) -> None:
    raw, scale, targets = rows_of(1700, 5.0)
    uncut = merged(range_sums(host, raw, scale, targets, per_split=100))
    cut = merged(range_sums(host, raw, scale, targets, per_split=per_split))
    for name in ("logp", "entropy", "p2"):
        torch.testing.assert_close(getattr(cut, name), getattr(uncut, name), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("case", ["large", "one hot", "flat", "one hot elsewhere", "falling", "rising"])
def test_extreme_rows(case: str, host: ctypes.CDLL) -> None:
    raw, scale, targets = rows_of(777, 1.0)
    scale = torch.exp2(torch.floor(torch.log2(scale)))  # z_target is fp32: see the next test
    if case == "large":
        raw = raw * 1e4
    elif case == "flat":
        raw = torch.full_like(raw, -3e3)
    elif case == "one hot":
        raw = torch.zeros_like(raw).scatter_(1, targets[:, None], 1e4)
    elif case == "one hot elsewhere":
        raw = torch.zeros_like(raw).scatter_(1, (targets[:, None] + 300) % 777, 90.0)
    else:
        raw = torch.linspace(0, 200, 777).expand(ROWS, 777).contiguous() * (-1 if case == "falling" else 1)
    actual = merged(range_sums(host, raw, scale, targets, per_split=2))
    exact = reference.token_stats(
        raw.double(), torch.eye(777).double(), targets, inv_temperature=scale.double(), second_moments=True
    )
    for name in ("logp", "entropy", "lse", "p2", "p2_logp", "varentropy"):  # 2.5e-7: two ulp of a sum near 1
        torch.testing.assert_close(getattr(actual, name).double(), getattr(exact, name), rtol=2e-6, atol=2.5e-7)


def test_large_logits_lose_no_more_than_the_targets_rounding(host: ctypes.CDLL) -> None:
    """The sums match the rounded row_max; the error is that of the target's logit, half an ulp of
    fp32.
    """
    _, scale, targets = rows_of(777, 1.0)
    raw = torch.full((ROWS, 777), -3e3)
    logp = merged(range_sums(host, raw, scale, targets, per_split=2)).logp.double()
    half_ulp = (raw[:, 0] * scale).abs().double() * 2**-24
    assert ((logp + math.log(777)).abs() <= half_ulp + 1e-6).all()


def test_removed_columns(host: ctypes.CDLL) -> None:
    """Columns with a bias of -inf, a whole range of them, and a target among them: its logp is
    -inf, the rest is unaffected.
    """
    raw, scale, targets = rows_of(900, 3.0)
    bias = torch.randn(900)
    bias[256:512] = -math.inf
    bias[torch.rand(900) < 0.2] = -math.inf
    targets[0] = 300
    sums = range_sums(host, raw, scale, targets, bias=bias)
    assert (sums[0, 1] == -math.inf).all(), "a range whose columns are all removed"
    assert (sums[2:, 1] == 0).all()
    assert not sums.isnan().any()
    kept = ~torch.isinf(bias[targets])
    actual = merged(sums)
    assert (actual.logp[~kept] == -math.inf).all()
    exact = reference.token_stats(
        raw.double(), torch.eye(900).double(), targets, inv_temperature=scale.double(), bias=bias.double()
    )
    torch.testing.assert_close(actual.logp[kept].double(), exact.logp[kept], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(actual.entropy.double(), exact.entropy, rtol=2e-6, atol=2e-6)


def test_a_row_without_any_column_and_a_target_elsewhere(host: ctypes.CDLL) -> None:
    raw, scale, targets = rows_of(300, 1.0)
    nothing = merged(range_sums(host, raw, scale, targets, bias=torch.full((300,), -math.inf)))
    assert nothing.logp.isnan().all()
    sums = range_sums(host, raw, scale, torch.full_like(targets, -1))
    assert (sums[1] == 0).all()
    every = (sums[2] * sums[0].exp()).sum(0)
    torch.testing.assert_close(every, (raw * scale[:, None]).exp().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("columns", [slice(17, 18), slice(256, 512)], ids=["one column", "a whole range"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_nan_makes_its_row_nan_and_no_other(kind: int, columns: slice, host: ctypes.CDLL) -> None:
    """A maximum ignores NaN: that of a range of NaN stays LOWEST, as if every column had a bias of
    -inf.
    """
    raw, scale, targets = rows_of(800, 1.0)
    targets[:] = 3
    raw[7, columns] = math.nan
    got = merged(range_sums(host, raw, scale, targets, kind=kind), kind)
    for name in ("logp", "lse", "entropy", "p2", "p2_logp", "varentropy"):
        value = getattr(got, name)
        if value is not None:
            assert value.isnan().nonzero().flatten().tolist() == [7], name


@pytest.mark.parametrize("block_v", [128, 256])
@pytest.mark.parametrize("vocab", [256, 300, 1031])
def test_exponentials(block_v: int, vocab: int, host: ctypes.CDLL) -> None:
    """E and its sums. E is read back from shared memory by TMA's swizzle, as a box store would
    write it to the matrix.
    """
    raw, scale, targets = rows_of(vocab, 4.0)
    logits = raw.double() * scale.double()[:, None]
    offset = (logits.logsumexp(1) + torch.randn(ROWS)).float() * LOG2E
    targets = targets.int()
    for tile in range(-(-vocab // block_v)):
        slices = torch.full((block_v // 64, 4096), math.nan)
        rest, x_exp = torch.full((ROWS,), math.nan), torch.full((ROWS,), math.nan)
        host.exp_tile(
            block_v, pointer(raw), vocab, vocab, pointer(scale), pointer(offset), pointer(targets), tile, pointer(slices),
            pointer(rest), pointer(x_exp),
        )  # fmt: skip
        address = 2 * torch.arange(4096)
        plain = slices[:, (address ^ (address >> 7 & 7) << 4) // 2]
        e = plain.view(-1, ROWS, 64).transpose(0, 1).reshape(ROWS, block_v).double()
        columns = torch.arange(tile * block_v, (tile + 1) * block_v)
        counts = (columns < vocab) & (columns != targets[:, None])
        x = logits[:, columns.clamp_max(vocab - 1)] * LOG2E - offset.double()[:, None]
        exact = torch.where(counts, torch.exp2(x), 0.0)
        assert (e[~counts] == 0).all()
        torch.testing.assert_close(e, exact, rtol=1e-5, atol=1e-30)
        torch.testing.assert_close(rest.double(), exact.sum(1), rtol=3e-6, atol=1e-30)
        assert ((x_exp - (x * exact).sum(1)).abs() <= 5e-6 * ((x.abs() + 1) * exact).sum(1) + 1e-30).all()
