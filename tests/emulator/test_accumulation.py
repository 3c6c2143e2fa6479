"""The emulator adds as Hopper's tensor cores do, and what that costs a logit."""

from __future__ import annotations

import emulated_cuda
import pytest
import torch
from torch import Tensor

from eapo_kernels.ops.cuda import launch
from eapo_kernels.ops.cuda.tiles import TILES
from eapo_kernels.ops.lm_head import Projection

pytestmark = pytest.mark.csrc

N, V = 64, 8


def unit(x: Tensor, places: int) -> Tensor:
    """The value of the ``places``-th binary place after the leading one."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 1 - places)


def truncated(hidden: Tensor, weight: Tensor) -> Tensor:
    """16 products and the sum so far: aligned to the largest, truncated two bits below fp32, added,
    truncated to fp32.
    """
    total = torch.zeros(hidden.shape[0], dtype=torch.float64)
    for a, b in zip(hidden.double().split(16, 1), weight.double().split(16, 1), strict=True):
        terms = torch.cat([total[:, None], a * b], 1)
        step = unit(terms.abs().amax(1), 25)
        total = (terms / step[:, None]).trunc().sum(1) * step
        total = (total / unit(total, 23)).trunc() * unit(total, 23)
    return total


@pytest.mark.parametrize("dim", [64, 4096])
def test_sums_are_truncated(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits near 40 of the targets, as stored from the accumulators. With D = 4096 they are 1.7e-4
    too small on average.
    """
    monkeypatch.setattr(launch, "slots", lambda device, tile: 1)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, dim, generator=g).bfloat16()
    targets = torch.randint(V, (N,), generator=g)
    hidden = (torch.randn(N, dim, generator=g) * (4 / dim**0.5) + weight[targets] * (40 / dim)).bfloat16()
    (tile,) = (one for one in TILES if one.name == "shared_alone")
    one, sums = launch.stream_statistics(
        Projection(hidden, weight), targets, entropy=False, second_moments=False, tile=tile, splits=1
    )
    emulated_cuda.run(one)
    got = sums.values[1, 0].double()
    assert torch.equal(got, truncated(hidden, weight[targets]))
    exact = (hidden.double() * weight[targets].double()).sum(1)
    assert ((exact - got).mean() - 4.2e-8 * dim).abs() < 1e-8 * dim
