"""Every tile of the compiled products of csrc on the emulator: statistics and gradients against the
float64 oracle.
"""

from __future__ import annotations

import functools

import emulated_gpu
import pytest
import torch
from comparison import STATISTICS_FLOOR, cotangents, dense
from exponential_rows import out_of_range

from eapo_kernels import reference
from eapo_kernels.ops.cuda import backend, launch, tiles
from eapo_kernels.ops.cuda.tiles import TILES, Tile
from eapo_kernels.ops.dispatch import LogitCotangents, RowStatistics
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.testing import Inputs, assert_no_worse_than, eager_token_stats, make_inputs

pytestmark = [
    pytest.mark.csrc,
    pytest.mark.aot,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/ops/cuda runs the kernels on the GPU"),
]

BF16, FP16 = torch.bfloat16, torch.float16
EVERY_TILE = pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)


class Case:
    """Inputs with a temperature per row."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, *, bias: bool) -> None:
        self.inputs: Inputs = make_inputs(*shape, dtype=dtype, bias=bias)
        self.bias = None if self.inputs.bias is None else self.inputs.bias.detach()
        self.temperature = 0.5 + torch.rand(shape[0], generator=torch.Generator().manual_seed(3))
        hidden, weight = self.inputs.hidden.detach(), self.inputs.weight.detach()
        self.projection = Projection(hidden, weight, self.bias, row_inv_temperature=self.temperature)

    def check(self, got: RowStatistics, *, second_moments: bool) -> None:
        wide, i = self.inputs.to(torch.float64), self.inputs
        exact = reference.token_stats(
            wide.hidden, wide.weight, wide.targets, bias=wide.bias, inv_temperature=self.temperature.double(),
            second_moments=second_moments,
        )  # fmt: skip
        eager = eager_token_stats(
            i.hidden, i.weight, i.targets, bias=self.bias, inv_temperature=self.temperature, second_moments=second_moments
        )
        for name in ("logp", "entropy", "lse", "p2", "p2_logp", "varentropy"):
            value = getattr(got, name)
            if value is not None:
                assert_no_worse_than(value, getattr(eager, name), getattr(exact, name), floor=2 * STATISTICS_FLOOR, name=name)


@EVERY_TILE
@pytest.mark.parametrize(
    ("shape", "dtype", "bias", "entropy", "second_moments", "splits"),
    [
        ((1, 8, 257), FP16, False, False, False, 1),
        ((63, 72, 1031), BF16, True, True, True, 3),
        ((130, 136, 515), BF16, False, True, False, 2),
        ((300, 64, 2050), FP16, True, True, True, None),
    ],
    ids=str,
)
def test_statistics(
    shape: tuple[int, int, int], dtype: torch.dtype, bias: bool, entropy: bool, second_moments: bool, splits: int | None,
    tile: Tile, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Launcher, order of tiles, epilogue, partial sums, finalize. Scratch memory is NaN, so
    unwritten sums would show.

    splits: number of ranges of the vocabulary; None: those of a launch.
    """
    emulated_gpu.pretend(monkeypatch)
    monkeypatch.setattr(backend, "stream_statistics", functools.partial(launch.stream_statistics, tile=tile, splits=splits))
    case = Case(shape, dtype, bias=bias)
    got = backend.statistics(case.projection, case.inputs.targets, entropy=entropy, second_moments=second_moments, budget=2**30)
    case.check(got, second_moments=second_moments)


@EVERY_TILE
@pytest.mark.parametrize(
    ("shape", "dtype", "bias", "off"),
    [
        ((1, 8, 257), BF16, False, 0.3),
        ((63, 72, 1031), FP16, True, 20.0),
        ((130, 136, 515), FP16, False, 0.3),
        ((300, 64, 2050), BF16, True, 80.0),
    ],
    ids=str,
)
def test_chunk(
    shape: tuple[int, int, int], dtype: torch.dtype, bias: bool, off: float, tile: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk of the scaled-exponential form: statistics and gradient, for a ``logp_guess`` that is
    wrong by ``off`` nats.

    Far off, Triton's kernels rescue the rows.
    """
    emulated_gpu.pretend(monkeypatch)
    monkeypatch.setattr(tiles, "find", lambda kernel, n_rows, dim: tile)
    case = Case(shape, dtype, bias=bias)
    p, targets = case.projection, case.inputs.targets
    z = reference.logits(
        p.hidden.double(), p.weight.double(), bias=None if case.bias is None else case.bias.double(),
        inv_temperature=case.temperature.double(),
    ).requires_grad_()  # fmt: skip
    logp = z.log_softmax(1).gather(1, targets[:, None])[:, 0]
    logp_guess = logp.detach().float() + off
    chunk = backend.open_chunk(p, targets, entropy=True, entropy_gradient=False, logp_guess=logp_guess)
    assert int(chunk.sums.n_rescue) == int(out_of_range(p, targets, logp_guess, tile.block_v).sum())
    if dtype == BF16:
        assert int(chunk.sums.n_rescue) == (shape[0] if off > 33 else 0)
    case.check(chunk.statistics(), second_moments=False)
    a = cotangents(shape[0], "logp")[0]
    gradient = chunk.gradient(LogitCotangents(a))
    (exact,) = torch.autograd.grad(logp, [z], a.double())
    exact = exact * case.temperature.double()[:, None]
    assert gradient.entries is not None
    assert gradient.row_scale is not None
    error = (dense(gradient) - exact).norm(dim=1)
    least = 2**-25 * shape[2] ** 0.5 * gradient.row_scale.double().abs() if dtype == FP16 else 1e-30  # subnormal E
    assert (error <= torch.finfo(dtype).eps / 2 * exact.norm(dim=1) + least).all()


def test_an_entropy_gradient_takes_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_gpu.pretend(monkeypatch)
    case = Case((5, 8, 40), BF16, bias=False)
    opened = functools.partial(backend.open_chunk, case.projection, case.inputs.targets, entropy=True)
    assert type(opened(entropy_gradient=False)).__name__ == "ScaledExpChunk"
    assert type(opened(entropy_gradient=True)).__name__ == "LogitChunk"
