"""A kernel with operands of one shape: its launches for any tile, and the torch backend's results to compare with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from triton.errors import TritonError
from triton.tools.tensor_descriptor import TensorDescriptor

from eapo_kernels.ops import chunking, gemm, torch_backend
from eapo_kernels.ops.chunking import workspace_bytes
from eapo_kernels.ops.dispatch import LogitCotangents, RowStatistics, TargetRows
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.ops.triton import report
from eapo_kernels.ops.triton.backend import logit_gradient
from eapo_kernels.ops.triton.common import LOG2E, Launch, workspace
from eapo_kernels.ops.triton.logit_grad import row_gradient
from eapo_kernels.ops.triton.online_softmax import finalize, row_statistics, stream_statistics
from eapo_kernels.ops.triton.scaled_exp import (
    ScaledExpSums,
    add_target_rows,
    collect_rescue_ids,
    row_offsets,
    scaled_exp_finalize,
    scaled_exp_gemm,
)
from eapo_kernels.ops.triton.tiles import PRODUCTS, Tile

from .candidates import Search, flaw

FAILURES = (RuntimeError, TritonError)
"""What compiling or launching a tile may raise: the compiler's passes and the driver raise RuntimeErrors."""

FLOOR = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Allowed difference from the torch backend, of the largest value: rounding to the dtype twice, or fp32 sums."""

_WHOLE = ("stream_statistics", "logit_gradient")
"""Kernels that see all rows at once; the others see a chunk of the one-pass schedule."""

_OUTPUTS = {
    "stream_statistics": ("sums",),
    "logit_gradient": ("out",),
    "scaled_exp_gemm": ("matrix", "sums"),
    "row_statistics": ("sums",),
    "row_gradient": ("out",),
    "finalize": ("out",),
    "row_offsets": ("offsets",),
    "collect_rescue_ids": (),
    "target_rows": (),
    "scaled_exp_finalize": ("out",),
}
"""Arguments that a launch must write whole."""

Results = Iterator[tuple[str, Tensor, Tensor]]
"""(name, result, what the torch backend says)."""


class Problem:
    """The operands of a search on one device, and ``search.Contest`` for its kernel.

    budget: bytes of workspace, as in ``Options``; None: the device's default.
    """

    def __init__(self, search: Search, device: str, budget: int | None = None) -> None:
        self.search, self._budget = search, workspace_bytes(budget, torch.device(device))
        dtype = getattr(torch, search.dtype)
        g = torch.Generator(device).manual_seed(0)
        self.n = search.n if search.kernel in _WHOLE else self._chunk_rows(dtype)
        hidden = torch.randn(self.n, search.d, generator=g, device=device).mul_(3).to(dtype)
        weight = torch.randn(search.v, search.d, generator=g, device=device, dtype=dtype).mul_(search.d**-0.5)
        self.projection = Projection(hidden, weight)
        self.targets = torch.randint(search.v, (self.n,), generator=g, device=device)
        self.cotangents = LogitCotangents(*torch.randn(3, self.n, generator=g, device=device))

    def _chunk_rows(self, dtype: torch.dtype) -> int:
        raw = 0 if self.search.kernel in PRODUCTS or self.search.kernel.startswith(("exp", "list")) else 4
        return chunking.row_chunk(self.search.n, chunking.padded(self.search.v) * (raw + dtype.itemsize), self._budget)

    @functools.cached_property
    def statistics(self) -> RowStatistics:
        """By the torch backend."""
        return torch_backend.BACKEND.statistics(
            self.projection, self.targets, entropy=True, second_moments=False, budget=self._budget
        )

    @functools.cached_property
    def raw(self) -> Tensor:
        """[N, V] fp32, hidden @ weight.T with padded rows."""
        out = workspace(self.projection, torch.float32)
        return gemm.project_(out, self.projection.hidden, self.projection.weight)

    @functools.cached_property
    def matrix(self) -> Tensor:
        """[N, V] or [N, columns of the slab], the output of every launch: those of hundreds of tiles would not fit together."""
        p = self.projection
        slab = self.search.kernel == "logit_gradient"
        return workspace(replace(p, weight=p.weight[self.columns]) if slab else p, p.operand_dtype)

    @functools.cached_property
    def columns(self) -> slice:
        """The slab of the backward pass that has the first target in it."""
        _, width = chunking.slab(self.n, self.search.v, self.projection.operand_dtype.itemsize, self._budget)
        start = int(self.targets[0]) // width * width
        return slice(start, min(start + width, self.search.v))

    @functools.cached_property
    def gradient(self) -> Tensor:
        """dL/d(raw logits) of the slab (of all columns for the row kernels), by the torch backend."""
        columns = self.columns if self.search.kernel == "logit_gradient" else slice(0, self.search.v)
        out = torch.empty(self.n, columns.stop - columns.start, dtype=self.projection.operand_dtype, device=self.targets.device)
        torch_backend.BACKEND.logit_gradient(
            out, self.projection, self.targets, columns, self.statistics, self.cotangents, None
        )
        return out

    def _exponentials(self, tile: Tile | None = None) -> tuple[ScaledExpSums, Tensor]:
        """Sums with their offsets, as near the truth as an old policy's, and an unwritten matrix, for a tile of scaled_exp_gemm."""
        sums = ScaledExpSums.empty(self.projection, True, tile=tile)
        row_offsets(self.projection, self.targets, self.statistics.logp, sums)()
        return sums, self.matrix

    def _expected_exponentials(self, sums: ScaledExpSums) -> Tensor:
        """[N, V] fp32, 0 for the target."""
        bits = self.raw * float(LOG2E.value) - sums.offsets[0].unsqueeze(1)
        return bits.exp2_().scatter_(1, self.targets.unsqueeze(1), 0.0)

    def launch(self, tile: Tile) -> tuple[Launch, Callable[[], Results]]:
        """A launch with ``tile``, and what to compare after it ran."""
        p, targets = self.projection, self.targets
        match self.search.kernel:
            case "stream_statistics":
                launch, partial = stream_statistics(
                    p, targets, entropy=True, second_moments=False, budget=self._budget, tile=tile
                )
                return launch, lambda: self._finalized(finalize(partial))
            case "logit_gradient":
                slab = self.matrix[:, : self.columns.stop - self.columns.start]
                launch = logit_gradient(slab, p, targets, self.columns, self.statistics, self.cotangents, None, tile=tile)
                return launch, lambda: iter([("gradient", slab, self.gradient)])
            case "row_statistics":
                launch, partial = row_statistics(self.raw, p, targets, entropy=True, tile=tile)
                return launch, lambda: self._finalized(finalize(partial))
            case "row_gradient":
                out = self.matrix
                launch = row_gradient(out, self.raw, p, targets, self.statistics, self.cotangents, tile=tile)
                return launch, lambda: iter([("gradient", out, self.gradient)])
            case "finalize":
                first, partial = row_statistics(self.raw, p, targets, entropy=True)
                first()
                final = finalize(partial, tile=tile)
                return final[0], lambda: self._statistics(final[1].statistics)
        return self._launch_exponentials(tile)

    def _launch_exponentials(self, tile: Tile) -> tuple[Launch, Callable[[], Results]]:
        """``launch`` for the kernels of the scaled-exponential form."""
        p, targets, kernel = self.projection, self.targets, self.search.kernel
        sums, matrix = self._exponentials(tile if kernel == "scaled_exp_gemm" else None)
        if kernel == "row_offsets":
            logp_guess = self.statistics.logp
            y = (p.hidden.float() * p.weight[targets].float()).sum(1)
            k = (y - logp_guess) * float(LOG2E.value)
            return row_offsets(p, targets, logp_guess, sums, tile=tile), lambda: iter(
                [("offsets", sums.offsets, torch.stack([k, y]))]
            )
        if kernel == "target_rows":
            factor, out = self.cotangents.logp, torch.zeros_like(p.weight, dtype=torch.float32)
            expected = out.double().index_add_(0, targets, p.hidden.double() * factor.double().unsqueeze(1))
            launch = add_target_rows(out, 0, TargetRows.sort(targets, p.hidden, factor), tile=tile)
            return launch, lambda: iter([("rows", out, expected)])
        first = scaled_exp_gemm(p, targets, sums, matrix, tile=tile if kernel == "scaled_exp_gemm" else None)
        if kernel == "scaled_exp_gemm":

            def compared() -> Results:
                yield "exponentials", matrix.clone(), self._expected_exponentials(sums)
                launch, final, _ = scaled_exp_finalize(p, sums)
                launch()
                yield from self._statistics(final.statistics)

            return first, compared
        first()
        if kernel == "collect_rescue_ids":
            return collect_rescue_ids(p, sums, tile=tile), lambda: iter(
                [("rescue_ids", sums.n_rescue, torch.zeros_like(sums.n_rescue))]
            )
        if kernel == "scaled_exp_finalize":
            launch, final, _ = scaled_exp_finalize(p, sums, tile=tile)
            return launch, lambda: self._statistics(final.statistics)
        raise ValueError(f"kernel: expected one of candidates.SPACES, got {kernel!r}")

    def _finalized(self, final: tuple[Launch, object]) -> Results:
        final[0]()
        return self._statistics(final[1].statistics)  # type: ignore[attr-defined]

    def _statistics(self, got: RowStatistics) -> Results:
        for name in ("logp", "entropy", "lse"):
            yield name, getattr(got, name), getattr(self.statistics, name)

    def prepare(self, tile: Tile) -> Callable[[], str | None]:
        """See ``search.Contest``. The launch is made now, compiled later."""
        launch, _ = self.launch(tile)
        architecture = report.ARCHITECTURES[self.search.family]

        def compiled() -> str | None:
            try:
                usage = report.usage(launch, architecture)
            except FAILURES as error:
                return f"{type(error).__name__} of the compiler"
            return flaw(self.search, tile, usage)

        return compiled

    def spills_with_every_switch(self, tile: Tile) -> str | None:
        """Why the tile is not taken for launches with bias, soft-cap and temperatures, or None."""
        try:
            usage = report.usage(report.example(self.search.entry(tile), "full"), report.ARCHITECTURES[self.search.family])
        except FAILURES as error:
            return f"{type(error).__name__} of the compiler"
        return flaw(self.search, tile, usage, plain=False)

    def _outputs(self, launch: Launch) -> Iterator[Tensor]:
        """What a launch must write whole; it is NaN before a check, so that old results do not pass for new ones."""
        for name in _OUTPUTS[self.search.kernel]:
            output = launch.arguments[name]
            yield output.base if isinstance(output, TensorDescriptor) else output

    def check(self, tile: Tile) -> str | None:
        """See ``search.Contest``. An error that leaves the device unusable is raised again by the next call to it."""
        try:
            launch, results = self.launch(tile)
            for output in self._outputs(launch):
                output.fill_(torch.nan)
            launch()
            return next((why for result in results() if (why := difference(*result)) is not None), None)
        except FAILURES as error:
            if self.targets.is_cuda:
                torch.cuda.synchronize()
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def runner(self, tile: Tile) -> Callable[[], object]:
        """See ``search.Contest``."""
        return self.launch(tile)[0]


def difference(name: str, got: Tensor, expected: Tensor) -> str | None:
    """Where ``got`` is farther from ``expected`` than ``FLOOR`` of its largest value, in words, or None. NaN is far."""
    error = float((got.float() - expected.float()).abs().max())
    allowed = FLOOR.get(got.dtype, 0.0) * float(expected.abs().max())
    return None if error <= allowed else f"{name}: off by {error:.2e}, allowed {allowed:.2e}"
