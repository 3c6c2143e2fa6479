"""Few entries in the place of rows of scaled exponentials, through the one-pass schedule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eapo_kernels import Options
from eapo_kernels.ops import gradients, sparsify
from eapo_kernels.ops.dispatch import Chunk, Coefficients, LogitCotangents
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.ops.triton.backend import BACKEND
from eapo_kernels.types import SUMS

pytestmark = pytest.mark.usefixtures("poisoned")

N, D, V = 48, 24, 2051


@pytest.mark.parametrize("plan", ["one_chunk", "chunks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_exponentials(dtype: torch.dtype, plan: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a row of d_hidden is at most the tolerance times 2 (1 - p) |c| max |weight|, but for its
    rounding; rows without a cotangent have no entries."""
    monkeypatch.setattr(sparsify, "_MOST_KEPT", (1 / 32, 1 / 32))
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=draw), torch.randn(V, D, generator=draw)
    logp = torch.log_softmax(hidden @ weight.T, 1)
    targets = torch.multinomial(logp.exp(), 1, generator=draw).squeeze(1)
    c = torch.randn(N, generator=draw) / N
    c[::4] = 0
    tolerance, rest = 0.02, 1 - logp.gather(1, targets[:, None]).squeeze(1).exp()
    projection, targets, c = Projection(hidden.to(device, dtype), weight.to(device, dtype)), targets.to(device), c.to(device)

    def run(options: Options) -> tuple[list[Tensor], sparsify.Sparsity | None]:
        def coefficients(chunk: Chunk, rows: slice) -> Coefficients:
            chunk.statistics()
            return Coefficients(LogitCotangents(c[rows]), c.new_zeros(len(SUMS)))

        def open_chunk(rows: slice) -> Chunk:
            return BACKEND.open_chunk(projection.rows(rows), targets[rows], entropy=False, entropy_gradient=False)

        _, finish, _, report = gradients.one_pass(
            projection, targets, BACKEND, open_chunk, coefficients, row_bytes=BACKEND.chunk_row_bytes(projection, False),
            needs=(True, True, False), options=options,
        )  # fmt: skip
        return [g.cpu().double() for g in finish(c.new_tensor(0.5), projection) if g is not None], report

    exact, none = run(Options(plan=plan))
    found, report = run(Options(plan=plan, gradient_tolerance=tolerance))
    assert none is None
    assert report is not None
    assert 0.1 < float(report.dense_share) < 0.8, "rows of both kinds"
    assert 0 < float(report.dropped_mass_mean) < float(report.dropped_mass_max) <= 2 * tolerance
    norms = 0.5 * 2 * rest.double() * c.cpu().double().abs()
    allowed = (tolerance + 2e-3) * norms + tolerance * norms.mean() / 16
    for difference, size in (
        ((found[0] - exact[0]).abs().amax(1) / weight.abs().amax(), allowed),
        ((found[1] - exact[1]).abs().sum(0).amax() / hidden.abs().amax(), allowed.sum() + 0.02 * norms.sum()),
    ):
        assert bool((difference <= size).all())
    assert not found[0][::4].any()
    assert float((found[1] - exact[1]).abs().max()) > 0
