"""One table of the kernels, Triton's and CUDA's: how to launch each on made-up operands, and what
its results should be.

The test that compiles every kernel (tests/aot), the smoke test of ``python -m benchmarks.gpu`` and
the tuner all read ``KERNELS``. This is the only file of the benchmarks that imports launchers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from eapo_kernels import EapoError, Options, reference
from eapo_kernels.ops import chunking
from eapo_kernels.ops.chunking import workspace_bytes
from eapo_kernels.ops.dispatch import LogitCotangents, RowStatistics, SurrogateTerms, WeightedRows
from eapo_kernels.ops.gemm import project_
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.ops.triton import tiles
from eapo_kernels.ops.triton.common import INTERPRETED, Launch, workspace
from eapo_kernels.ops.triton.logit_grad import logit_gradient, row_gradient
from eapo_kernels.ops.triton.online_softmax import PartialSums, finalize, row_statistics, stream_statistics
from eapo_kernels.ops.triton.scaled_exp import (
    ScaledExpSums,
    collect_rescue_ids,
    row_maxima,
    row_offsets,
    scaled_exp_finalize,
    scaled_exp_gemm,
    window,
)
from eapo_kernels.ops.triton.sparse import add_rows, logits_at
from eapo_kernels.ops.triton.surrogate import Finalized
from eapo_kernels.ops.triton.tiles import PRODUCTS, TABLE, Entry, Tile, family, find
from eapo_kernels.testing import make_inputs

__all__ = ["INTERPRETED", "KERNELS", "PRODUCTS", "TABLE", "Entry", "Tile", "family", "find", "tiles"]

FLOOR = {torch.float32: 2e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
"""Allowed difference from float64, of the largest value: fp32 sums, or rounding to the dtype (after
offsets in fp32)."""

FAILURES = (RuntimeError, EapoError, OSError, TritonError)
"""What compiling or launching a kernel may raise: the compilers' passes and the driver raise
RuntimeErrors."""

_EVERYTHING, _BLOCK = 2**27, 2**25
"""Elements up to which all of a matrix is compared, and of a block of float64 logits: 256 MiB."""

Results = Iterator[tuple[str, Tensor, Tensor]]
"""(name, result, expected in float64)."""

Space = dict[str, tuple[Any, ...]]


class Operands:
    """Operands [N, D] x [V, D] on one device, and the float64 reference of everything that kernels
    make of them.

    Attributes:
        full: with a bias, a temperature per row and, where the kernel has one, a soft-cap; second
            moments, all three cotangents and a surrogate too. Else none of these.
        rescue: whether ``wrong_guess`` is wrong in a third of the rows.
        budget: bytes of workspace.
        projection, targets, cotangents: what the launchers take. On the device "meta" nothing has
            storage.
    """

    def __init__(
        self,
        n: int,
        d: int,
        v: int,
        dtype: torch.dtype,
        device: str,
        *,
        full: bool = False,
        softcap: bool = True,
        budget: int | None = None,
        rescue: bool = True,
    ) -> None:
        self.full, self.rescue = full, rescue
        self.meta = device == "meta"
        self.budget = 2**30 if self.meta else workspace_bytes(Options(budget), torch.device(device))
        if self.meta:
            hidden, weight = self._meta(n, d, dtype=dtype), self._meta(v, d, dtype=dtype)
            bias, self.targets = self._meta(v, dtype=dtype), self._meta(n, dtype=torch.int64)
            temperature, noise = self._meta(n), self._meta(3, n)
        else:
            made = make_inputs(n, d, v, dtype=dtype, bias=True, device=device)
            hidden, weight, bias = made.hidden, made.weight, made.bias
            self.targets = made.targets
            g = torch.Generator().manual_seed(3)
            temperature, noise = (0.5 + torch.rand(n, generator=g)).to(device), torch.randn(3, n, generator=g).to(device)
        self.projection = Projection(
            hidden,
            weight,
            bias=bias if full else None,
            row_inv_temperature=temperature if full else None,
            softcap=30.0 if full and softcap else None,
        )
        self.cotangents = LogitCotangents(noise[0], *((noise[1], noise[2]) if full else (None, None)))

    @staticmethod
    def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    @property
    def n(self) -> int:
        return self.projection.n_rows

    @cached_property
    def _weight64(self) -> Tensor:
        return self.projection.weight.double()

    @cached_property
    def sample(self) -> Tensor:
        """Numbers of the rows of a matrix that are compared: all, of large ones 512 and the last,
        evenly spaced."""
        rows = torch.arange(self.n, device=self.targets.device)
        if self.n * self.projection.vocab <= _EVERYTHING:
            return rows
        return torch.cat([rows[:: max(1, self.n // 512)], rows[-1:]]).unique()

    def blocks(self, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        """Row numbers (default: ``sample``), a few at a time."""
        return (self.sample if rows is None else rows).split(max(1, _BLOCK // self.projection.vocab))

    def _terms(self, rows: Tensor) -> dict[str, Any]:
        p = self.projection
        given: dict[str, Any] = {"softcap": p.softcap}
        if p.row_inv_temperature is not None:
            given["inv_temperature"] = p.row_inv_temperature[rows].double()
        return given | ({} if p.bias is None else {"bias": p.bias.double()})

    def logits(self, rows: Tensor) -> Tensor:
        """[rows, V] float64."""
        return reference.logits(self.projection.hidden[rows].double(), self._weight64, **self._terms(rows))

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """Statistics of every row in float64, by name, and ``row_max``."""
        parts: dict[str, list[Tensor]] = {}
        for rows in self.blocks(torch.arange(self.n, device=self.targets.device)):
            z = self.logits(rows)
            for name, value in _statistics(z, self.targets[rows]).items():
                parts.setdefault(name, []).append(value)
        return {name: torch.cat(values) for name, values in parts.items()}

    @cached_property
    def support(self) -> Tensor:
        """[N, 8] int64 ids: the target, others at random, and in half of the places id 0."""
        if self.meta:
            return self._meta(self.n, 8, dtype=torch.int64)
        g, vocab = torch.Generator().manual_seed(7), self.projection.vocab
        others = torch.where(torch.rand(self.n, 7, generator=g) < 0.5, 0, torch.randint(vocab, (self.n, 7), generator=g))
        return torch.cat([self.targets.unsqueeze(1), others.to(self.targets.device)], 1)

    @property
    def rows_of_support(self) -> Tensor:
        """[8 N] int64, the row of each id."""
        rows = torch.arange(self.n, device=self.targets.device)
        return rows.unsqueeze(1).expand(-1, 8).flatten()

    @cached_property
    def statistics(self) -> RowStatistics:
        """The fp32 statistics that gradient kernels read: rounded from float64."""
        if self.meta:
            return RowStatistics(*[self._meta(self.n)] * 6)
        e = self.expected
        row_max = e["row_max"].float()
        log_sum = e["lse"] - row_max.double()
        parts = (e["logp"], e["entropy"], e["lse"], row_max, log_sum, log_sum - e["entropy"])
        return RowStatistics(*(part.float() for part in parts))

    @cached_property
    def logp_guess(self) -> Tensor:
        """[N] fp32, log-probs of an old policy."""
        return self._meta(self.n) if self.meta else (self.expected["logp"] + 0.3).float()

    @cached_property
    def wrong_guess(self) -> Tensor:
        """The same, off by 60 nats in every third row: more than any dtype's window allows."""
        if self.meta:
            return self.logp_guess
        return self.logp_guess.index_add(0, self.rescued, torch.full_like(self.logp_guess[self.rescued], -60.0))

    @property
    def rescued(self) -> Tensor:
        """Row numbers of the wrong guesses."""
        return torch.arange(0, self.n if self.rescue else 0, 3, device=self.targets.device)

    @cached_property
    def raw(self) -> Tensor:
        """[N, V] fp32, hidden @ weight.T with padded rows."""
        out = workspace(self.projection, torch.float32)
        return out if self.meta else project_(out, self.projection.hidden, self.projection.weight)

    @cached_property
    def matrix(self) -> Tensor:
        """[N, V] in the dtype of the products, the output of every launch: those of hundreds of
        tiles would not fit together."""
        return workspace(self.projection, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """What the products multiply. Meta tensors stand for a GPU's."""
        return self.projection.hidden.dtype if self.meta else self.projection.operand_dtype

    @cached_property
    def columns(self) -> slice:
        """A slab of the vocabulary of the backward pass, with the first target in it."""
        if self.meta:
            start = 4096 if self.projection.vocab > 8192 else 0
            return slice(start, min(start + 2048 - (3 if self.full else 0), self.projection.vocab))
        _, width = chunking.slab(self.n, self.projection.vocab, self.dtype.itemsize, self.budget)
        start = int(self.targets[0]) // width * width
        return slice(start, min(start + width, self.projection.vocab))

    @cached_property
    def slab(self) -> Tensor:
        """[N, columns], with padded rows."""
        width = self.columns.stop - self.columns.start
        columns = 2048 if self.meta and width > 1024 else chunking.padded(width)
        return self.projection.hidden.new_empty(self.n, columns, dtype=self.dtype)[:, :width]

    def gradient(self, rows: Tensor) -> Tensor:
        """dL/d(hidden @ weight.T) [rows, V] float64 by autograd, L the statistics of the rows times
        the cotangents."""
        p, c = self.projection, self.cotangents
        raw = (p.hidden[rows].double() @ self._weight64.T).requires_grad_()
        terms = self._terms(rows)
        z = raw + terms["bias"] if "bias" in terms else raw
        if p.softcap is not None:
            z = p.softcap * torch.tanh(z / p.softcap)
        if "inv_temperature" in terms:
            z = z * terms["inv_temperature"][:, None]
        stats = _statistics(z, self.targets[rows])
        loss = sum((stats[name] * t[rows].double()).sum() for name, t in c._asdict().items() if t is not None)
        return torch.autograd.grad(loss, raw)[0]

    def exponentials(self, sums: ScaledExpSums, rows: Tensor) -> Tensor:
        """[rows, V] float64: E with the offsets of ``sums``, 0 at the targets."""
        bits = self.logits(rows) / math.log(2) - sums.offsets[0, rows].double().unsqueeze(1)
        return bits.exp2_().scatter_(1, self.targets[rows].unsqueeze(1), 0.0)

    @cached_property
    def terms(self) -> SurrogateTerms | None:
        """A clipped surrogate of four sequences with full operands, else None."""
        if not self.full:
            return None
        if self.meta:
            row = self._meta(self.n)
            return SurrogateTerms(self.targets, row, row, row, row, row, self._meta(), 1.0, 0.2, 0.2, 3.0)
        device, g = self.targets.device, torch.Generator().manual_seed(5)
        numbers = torch.randn(3, 4, generator=g).to(device)
        gap, scale = torch.randn(self.n, generator=g).to(device), torch.rand(self.n, generator=g).to(device) / self.n
        ids = torch.arange(self.n, device=device) * 4 // self.n
        old, weight = (self.expected["logp"] + 0.5 * gap).float(), torch.full((), 0.7, device=device)
        return SurrogateTerms(ids, old, scale, *numbers, weight, 1.0, 0.2, 0.2, 3.0)

    def compare(self, final: Finalized, rows: Tensor | None = None) -> Results:
        """Statistics of all rows (or ``rows``), and of the surrogate the loss and the coefficients
        of logp, beside float64."""
        rows = torch.arange(self.n, device=self.targets.device) if rows is None else rows
        for name in ("logp", "entropy", "lse", "p2", "p2_logp", "varentropy"):
            value = getattr(final.statistics(), name)
            if value is not None:
                yield name, value[rows], self.expected[name][rows]
        if self.terms is not None and final.coefficient is not None:
            # At the kernel's own log-probs: a ratio that is a rounding away from a clip bound lies on one side of it for both.
            loss, coefficient = _surrogate(final.statistics().logp, self.terms)
            yield "coefficient", final.coefficient, coefficient
            yield "loss", final.coefficients().sums[:1], loss[None]


def _statistics(z: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """E2-E4 of logits [N, V] by name, and ``row_max``; differentiable."""
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    return {
        "logp": log_p.gather(1, targets[:, None])[:, 0],
        "entropy": entropy,
        "lse": torch.logsumexp(z, -1),
        "p2": (p * p).sum(-1),
        "p2_logp": (p * p * log_p).sum(-1),
        "varentropy": (p * (log_p + entropy[:, None]).square()).sum(-1),
        "row_max": z.amax(-1),
    }


def _surrogate(logp: Tensor, t: SurrogateTerms) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d logp) of E9 and E10 in float64; PPO arXiv 1707.06347, dual clip arXiv
    1912.09729."""
    logp = logp.double().detach().requires_grad_()
    weight = torch.where(t.rewards > t.thresholds, t.positive_weight.double(), t.negative_weight)[t.sequence_ids]
    advantage = t.advantages.double()[t.sequence_ids]
    ratio = (logp - t.old_logp.double()).clamp(-60, 60).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - t.clip_low, 1 + t.clip_high) * advantage)
    if t.dual_clip is not None:
        gain = torch.where(advantage < 0, torch.maximum(gain, t.dual_clip * advantage), gain)
    loss = -(t.scale.double() * weight * gain).sum()
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Run:
    """A launch on operands.

    Attributes:
        launch: of the kernel.
        written: outputs of which it must write every element; they are filled with NaN before.
        results: after the launch, its results beside the reference.
        before: launches that fill its inputs, to be made once.
        reset: what must be done before every launch but filling ``written``.
        outputs: after the launch, tensors that must have the same bits in every run; default:
            ``written``.
    """

    launch: Callable[[], None]
    written: tuple[Tensor, ...]
    results: Callable[[], Results]
    before: tuple[Callable[[], object], ...] = ()
    reset: Callable[[], object] = _nothing
    outputs: Callable[[], list[Tensor]] | None = None

    def prepare(self) -> None:
        """Fill the inputs of the launch."""
        for one in self.before:
            one()

    def __call__(self) -> list[Tensor]:
        """Launch once over NaN, and return copies of what must be the same bits in every run."""
        for tensor in self.written:
            tensor.fill_(torch.nan)
        self.reset()
        self.launch()
        return [tensor.clone() for tensor in (self.written if self.outputs is None else self.outputs())]


def _stream_statistics(o: Operands, tile: Tile | None) -> Run:
    launch, sums = stream_statistics(
        o.projection, o.targets, entropy=True, second_moments=o.full, tile=tile
    )  # fmt: skip
    return Run(launch, (sums.values,), lambda: _finalized(o, sums))


def _finalized(o: Operands, sums: PartialSums) -> Results:
    last, final = finalize(sums)
    last()
    return o.compare(final)


def _logit_gradient(o: Operands, tile: Tile | None) -> Run:
    launch = logit_gradient(o.slab, o.projection, o.targets, o.columns, o.statistics, o.cotangents, tile=tile)
    return Run(launch, (o.slab,), lambda: _gradients(o, o.slab, o.columns))


def _gradients(o: Operands, got: Tensor, columns: slice) -> Results:
    return (("gradient", got[rows], o.gradient(rows)[:, columns]) for rows in o.blocks())


def _row_statistics(o: Operands, tile: Tile | None) -> Run:
    launch, sums = row_statistics(o.raw, o.projection, o.targets, entropy=True, tile=tile)
    return Run(launch, (sums.values,), lambda: _finalized(o, sums))


def _row_gradient(o: Operands, tile: Tile | None) -> Run:
    # In place with full operands, as where the products' operands are fp32; else into the narrow matrix.
    raw = (o.raw if o.meta else o.raw.clone()) if o.full else o.raw
    out = raw if o.full else (workspace(o.projection, torch.bfloat16) if o.meta else o.matrix)
    launch = row_gradient(out, raw, o.projection, o.targets, o.statistics, o.cotangents, tile=tile)
    restore = (lambda: raw.copy_(o.raw)) if o.full else _nothing
    columns = slice(0, o.projection.vocab)
    return Run(launch, () if o.full else (out,), lambda: _gradients(o, out, columns), reset=restore, outputs=lambda: [out])


def _finalize(o: Operands, tile: Tile | None) -> Run:
    if o.meta:
        first, sums = _nothing, PartialSums.empty(o.projection, 8, True, o.full)
    else:
        first, sums = stream_statistics(o.projection, o.targets, entropy=True, second_moments=o.full)
    launch, final = finalize(sums, o.terms, tile=tile)
    return Run(launch, (launch.arguments["out"],), lambda: o.compare(final), before=(first,))


def _row_offsets(o: Operands, tile: Tile | None) -> Run:
    sums, guess = ScaledExpSums.empty(o.projection, True, tile=_any_tile(o)), o.logp_guess if o.full else None
    launch = row_offsets(o.projection, o.targets, guess, sums, tile=tile)

    def results() -> Results:
        limits, target = window(o.projection.operand_dtype), o.expected["logp"] + o.expected["lse"]
        below = limits.without_guess if guess is None else guess.double() / math.log(2) + limits.with_guess
        yield "offsets", sums.offsets[0], target / math.log(2) - below

    return Run(launch, (sums.offsets,), results)


def _any_tile(o: Operands) -> Tile | None:
    """Of the sums of kernels that follow the product: on a device the product's own."""
    return Tile(0, 256) if o.meta else None


def _sums(o: Operands, guess: Tensor, tile: Tile | None) -> tuple[ScaledExpSums, Callable[[], None]]:
    """Sums for a tile, and the launch that fills their offsets."""
    sums = ScaledExpSums.empty(o.projection, True, tile=tile)
    return sums, row_offsets(o.projection, o.targets, guess, sums)


def _exponentials(o: Operands, sums: ScaledExpSums, finish: Callable[..., Any]) -> Results:
    for rows in o.blocks():
        yield "E", o.matrix[rows], o.exponentials(sums, rows)
    last, final, _ = finish(o.projection, sums)
    last()
    yield from o.compare(final)


def _scaled_exp_gemm(o: Operands, tile: Tile | None) -> Run:
    sums, offsets = _sums(o, o.logp_guess, tile)
    launch = scaled_exp_gemm(o.projection, o.targets, sums, o.matrix, tile=tile)
    return Run(launch, (o.matrix, sums.values), lambda: _exponentials(o, sums, scaled_exp_finalize), before=(offsets,))


def _collect_rescue_ids(o: Operands, tile: Tile | None) -> Run:
    sums, offsets = _sums(o, o.wrong_guess, _any_tile(o))
    launch = collect_rescue_ids(o.projection, sums, tile=tile)
    before = () if o.meta else (offsets, scaled_exp_gemm(o.projection, o.targets, sums, o.matrix))

    def listed() -> Tensor:
        return sums.rescue_ids[: int(sums.n_rescue)].sort().values

    def results() -> Results:
        yield "n_rescue", sums.n_rescue, torch.full_like(sums.n_rescue, len(o.rescued), dtype=torch.float64)
        if int(sums.n_rescue) == len(o.rescued):
            yield "rescue_ids", listed(), o.rescued.double()

    return Run(launch, (), results, before=before, reset=sums.n_rescue.zero_, outputs=lambda: [listed()])


def _row_maxima(o: Operands, tile: Tile | None) -> Run:
    sums, offsets = _sums(o, o.wrong_guess, _any_tile(o))
    launch = row_maxima(o.projection, sums, tile=tile)
    before = () if o.meta else (offsets, *_listing(o, sums))

    def results() -> Results:
        peak = window(o.projection.operand_dtype).peak
        yield "offsets", sums.offsets[0, o.rescued], o.expected["row_max"][o.rescued] / math.log(2) - peak

    def reset() -> None:
        sums.offsets[0, o.rescued] = -torch.inf

    return Run(launch, (), results, before=before, reset=reset, outputs=lambda: [sums.offsets[0]])


def _listing(o: Operands, sums: ScaledExpSums) -> tuple[Callable[[], None], ...]:
    return scaled_exp_gemm(o.projection, o.targets, sums, o.matrix), collect_rescue_ids(o.projection, sums)


def _scaled_exp_rescue(o: Operands, tile: Tile | None) -> Run:
    """On a device with the columns of the first run, whatever ``tile`` says: both fill the same
    sums."""
    sums, offsets = _sums(o, o.wrong_guess, tile if o.meta else None)
    launch = scaled_exp_gemm(o.projection, o.targets, sums, o.matrix, rescue_ids=True, tile=tile if o.meta else None)
    before = () if o.meta else (offsets, *_listing(o, sums), row_maxima(o.projection, sums))

    def results() -> Results:
        for rows in o.blocks(o.sample[o.sample % 3 == 0]):
            yield "E", o.matrix[rows], o.exponentials(sums, rows)
        last, final, _ = scaled_exp_finalize(o.projection, sums)
        last()
        yield from o.compare(final, o.rescued)

    return Run(
        launch,
        (o.matrix, sums.values),
        results,
        before=before,
        outputs=lambda: [o.matrix[o.rescued], sums.values[..., o.rescued]],
    )


def _scaled_exp_finalize(o: Operands, tile: Tile | None) -> Run:
    sums, offsets = _sums(o, o.logp_guess, _any_tile(o))
    launch, final, _ = scaled_exp_finalize(o.projection, sums, o.terms, tile=tile)
    before = () if o.meta else (offsets, scaled_exp_gemm(o.projection, o.targets, sums, o.matrix))
    return Run(launch, (launch.arguments["out"],), lambda: o.compare(final), before=before)


def _logits_at(o: Operands, tile: Tile | None) -> Run:
    p, ids = o.projection, o.support
    launch, out = logits_at(p, o.rows_of_support, ids.flatten(), tile=tile)

    def results() -> Results:
        for got, column in zip(out.view(ids.shape).unbind(1), ids.unbind(1), strict=True):
            yield "logits", got, (p.hidden.double() * p.weight[column].double()).sum(1)

    return Run(launch, (out,), results)


def _entries(o: Operands, **tile: Tile | None) -> tuple[Tensor, tuple[Launch, ...], Callable[[], Results]]:
    """(d_weight [V, D], the two launches that add a support's entries to it, results after both)."""
    values, hidden, ids = o.cotangents.logp, o.projection.hidden, o.support
    assert values is not None
    out = torch.empty_like(o.projection.weight, dtype=torch.float32)
    rows = o.rows_of_support
    entries = WeightedRows.sort(ids.flatten(), rows, values[rows], hidden)

    def results() -> Results:
        expected = torch.zeros_like(out, dtype=torch.float64)
        for column in ids.unbind(1):
            expected.index_add_(0, column, hidden.double() * values.double().unsqueeze(1))
        yield "rows", out, expected

    return out, add_rows(out, 0, entries, **tile), results


def _add_rows(o: Operands, tile: Tile | None) -> Run:
    out, (launch, carries), both = _entries(o, tile=tile)

    def results() -> Results:
        carries()
        return both()

    return Run(launch, (), results, reset=out.zero_, outputs=lambda: [out])


def _add_carries(o: Operands, tile: Tile | None) -> Run:
    out, (first, launch), results = _entries(o, carries_tile=tile)

    def reset() -> None:
        out.zero_()
        first()

    return Run(launch, (), results, reset=reset, outputs=lambda: [out])


def _cuda_stream_statistics(o: Operands, tile: Any) -> Run:
    from eapo_kernels.ops.cuda import launch as cuda_launch

    launch, sums = cuda_launch.stream_statistics(
        o.projection, o.targets, entropy=True, second_moments=o.full, tile=tile
    )  # fmt: skip
    return Run(launch, (sums.values,), lambda: _finalized(o, sums))


def _cuda_scaled_exp_gemm(o: Operands, tile: Any) -> Run:
    from eapo_kernels.ops.cuda import launch as cuda_launch

    sums = cuda_launch.scaled_exp_sums(o.projection, True, tile)
    offsets = row_offsets(o.projection, o.targets, o.logp_guess, sums)
    launch = cuda_launch.scaled_exp_gemm(o.projection, o.targets, sums, o.matrix, tile=tile)
    return Run(launch, (o.matrix, sums.values), lambda: _exponentials(o, sums, scaled_exp_finalize), before=(offsets,))


_PRODUCT: Space = {
    "block_n": (64, 128, 256),
    "block_v": (64, 128, 256),
    "block_d": (32, 64, 128),
    "group_n": (8, 16, 32),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5),
    "descriptors": (True, False),
    "resident": (1, 2),
    "slices": (1, 2, 4, 8),
}
_ROWS: Space = {"block_n": (1, 2, 4), "block_v": (1024, 2048, 4096, 8192, 16384), "warps": (4, 8, 16)}
_MERGE: Space = {"block_n": (8, 16, 32, 64, 128), "block_v": (16, 32, 64, 128), "warps": (1, 2, 4, 8)}
_VECTORS: Space = {
    "block_n": (1, 2, 4, 8, 16, 32),
    "block_v": (0,),
    "block_d": (128, 256, 512, 1024, 2048),
    "warps": (1, 2, 4, 8),
}
_CUDA: Space = {"stagger": (0, 2, 3), "group_n": (4, 8, 16), "cluster": (2, 1)}
"""Steps before a tile's end at which the second warp group waits (1 is behind 2 in csrc/README.md's
prediction), row tiles that sweep the vocabulary together, programs of a cluster; each with every
shape of ``ops.cuda.tile.TILES``."""


@dataclass(frozen=True)
class Kernel:
    """A line of ``KERNELS``.

    Attributes:
        run: a launch with a tile on operands; tile None: the table's.
        space: values of the fields of ``Tile`` that the tuner combines, other fields keep their
            defaults; empty: not tuned.
        chunked: it sees a chunk of the one-pass schedule, not all rows.
        scaled_exp: of the scaled-exponential form, which knows no soft-cap.
        typed: the table has lines for 2 and for 4 bytes an operand; else one line, of 4 bytes.
    """

    run: Callable[[Operands, Any], Run]
    space: Space = field(default_factory=dict)
    chunked: bool = True
    scaled_exp: bool = False
    typed: bool = False

    def rows(self, n: int, v: int, dtype: torch.dtype, budget: int) -> int:
        """Rows of a launch in a step of ``n`` rows."""
        raw = 0 if self.typed or self.scaled_exp else 4
        return chunking.row_chunk(n, chunking.padded(v) * (raw + dtype.itemsize), budget) if self.chunked else n


KERNELS: dict[tuple[str, str], Kernel] = {
    ("triton", "stream_statistics"): Kernel(_stream_statistics, _PRODUCT, chunked=False, typed=True),
    ("triton", "logit_gradient"): Kernel(_logit_gradient, _PRODUCT, chunked=False, typed=True),
    ("triton", "row_statistics"): Kernel(_row_statistics, _ROWS),
    ("triton", "row_gradient"): Kernel(_row_gradient, _ROWS),
    ("triton", "finalize"): Kernel(
        _finalize, {"block_n": (32, 64, 128, 256, 512, 1024), "block_v": (0,), "warps": (1, 2, 4, 8)}
    ),
    ("triton", "row_offsets"): Kernel(_row_offsets, _VECTORS, scaled_exp=True, typed=True),
    ("triton", "scaled_exp_gemm"): Kernel(
        _scaled_exp_gemm, _PRODUCT | {"persistent": (False, True), "stores": (False, True)}, scaled_exp=True, typed=True
    ),
    ("triton", "collect_rescue_ids"): Kernel(_collect_rescue_ids, _MERGE, scaled_exp=True),
    ("triton", "row_maxima"): Kernel(_row_maxima, scaled_exp=True, typed=True),
    ("triton", "scaled_exp_rescue"): Kernel(_scaled_exp_rescue, scaled_exp=True, typed=True),
    ("triton", "scaled_exp_finalize"): Kernel(_scaled_exp_finalize, _MERGE, scaled_exp=True),
    ("triton", "logits_at"): Kernel(_logits_at, _VECTORS, scaled_exp=True, typed=True),
    ("triton", "add_rows"): Kernel(_add_rows, _VECTORS, scaled_exp=True, typed=True),
    ("triton", "add_carries"): Kernel(_add_carries, _VECTORS, scaled_exp=True),
    ("cuda", "stream_statistics"): Kernel(_cuda_stream_statistics, _CUDA, chunked=False, typed=True),
    ("cuda", "scaled_exp_gemm"): Kernel(_cuda_scaled_exp_gemm, _CUDA, scaled_exp=True, typed=True),
}
"""(backend, name) -> how to launch and to check it. The two without a space run for rows whose
guess is off by 33 nats: rare."""


def example(entry: Entry, variant: str) -> Any:
    """A launch of a line of Triton's table, with its tile on tensors of its shape, without storage.
    variant: plain or full.

    full: V is odd, and D no multiple of the tile's; it is odd too for the lines of rows that no
    descriptor can describe.
    """
    full, kernel = variant == "full", KERNELS["triton", entry.kernel]
    odd = 3 if not entry.tile.descriptors and entry.family in ("sm90", "sm100") else 16
    d, v = (entry.dim + odd, entry.vocab + 3) if full else (entry.dim, entry.vocab)
    dtype = torch.bfloat16 if entry.itemsize == 2 else torch.float32
    operands = Operands(8192, d, v, dtype, "meta", full=full, softcap=not kernel.scaled_exp)
    return kernel.run(operands, entry.tile).launch


@dataclass(frozen=True)
class Check:
    """One kernel, tile and dtype, plain or full, to be held against float64."""

    backend: str
    kernel: str
    tile: Any
    dtype: torch.dtype
    full: bool

    def __str__(self) -> str:
        t, size = self.tile, str(self.dtype).removeprefix("torch.")
        tile = t.name if hasattr(t, "name") else f"{t.block_n}x{t.block_v}x{t.block_d}{' tma' if t.descriptors else ''}"
        return f"{self.backend} {self.kernel} {tile} {size} {'full' if self.full else 'plain'}"

    @property
    def described(self) -> bool:
        """Whether it needs rows of 16-byte multiples."""
        return self.backend == "cuda" or self.tile.descriptors

    def operands(self, shape: tuple[int, int, int], device: str) -> Operands:
        n, d, v = shape
        kernel = KERNELS[self.backend, self.kernel]
        softcap = not kernel.scaled_exp and self.backend == "triton"
        odd = d % 64 != 0 and not self.described
        return Operands(n, d + odd, v, self.dtype, device, full=self.full, softcap=softcap)

    def cuda_build(self) -> Any:
        """Of a CUDA kernel: what is compiled."""
        from eapo_kernels.ops.cuda.tiles import Build

        operand = "fp16" if self.dtype == torch.float16 else "bf16"
        moments = self.full and self.kernel == "stream_statistics"
        return Build(self.kernel, self.tile, operand, entropy=True, second_moments=moments, bias=self.full)

    @torch.no_grad()
    def launch(self, shape: tuple[int, int, int], device: str) -> None:
        """Run it once, without looking at the results: what other tools watch."""
        run = self._run(shape, device)
        run.prepare()
        run()

    def _run(self, shape: tuple[int, int, int], device: str) -> Run:
        return KERNELS[self.backend, self.kernel].run(self.operands(shape, device), self.tile)

    @torch.no_grad()
    def why_wrong(self, shape: tuple[int, int, int], device: str) -> str | None:
        """Run it twice: how the results differ from float64 or from each other, or None. NaN is
        wrong."""
        return why_wrong(self._run(shape, device))


def why_wrong(run: Run) -> str | None:
    """How the results of a run are wrong, or of a second one differ from the first one's in any
    bit; None when all is well."""
    run.prepare()
    first = run()
    with torch.enable_grad():
        for name, got, expected in run.results():
            wrong = difference(name, got, expected)
            if wrong is not None:
                return wrong
    for number, (a, b) in enumerate(zip(first, run(), strict=True)):
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            return f"output {number}: the second run differs from the first one"
    return None


def difference(name: str, got: Tensor, expected: Tensor) -> str | None:
    """Where ``got`` is farther from ``expected`` than ``FLOOR`` of its largest value, in words, or
    None. NaN is far."""
    if not expected.numel():
        return None
    error = float(torch.where(got == expected, 0.0, (got.double() - expected).abs()).max())  # both may be infinite
    allowed = FLOOR.get(got.dtype, 0.0) * float(expected.abs().max())
    return None if error <= allowed else f"{name}: off by {error:.2e}, allowed {allowed:.2e}"


def checks(backend: str, name: str) -> list[Check]:
    """Every line of the tables of tiles for a family of GPUs ("sm90", "interpreter"), plain and
    full, in all of its dtypes.

    backend, name: "triton" and a family, or "cuda" (whatever the name).
    """
    if backend == "cuda":
        from eapo_kernels.ops.cuda import tiles as cuda_tiles

        lines = [(kernel, tile, 2) for b, kernel in KERNELS if b == "cuda" for tile in cuda_tiles.tiles()]
    else:
        lines = [(e.kernel, e.tile, e.itemsize) for e in (*TABLE, *tiles.measured(tiles.MEASURED)) if e.family == name]
    halves, single = (torch.bfloat16, torch.float16), (torch.float32,)
    found = []
    for kernel, tile, size in lines:
        dtypes = (torch.bfloat16,) if not KERNELS[backend, kernel].typed else halves if size == 2 else single
        found += [Check(backend, kernel, tile, dtype, full) for dtype in dtypes for full in (False, True)]
    return list(dict.fromkeys(found))


SHAPES = ((128, 64, 256), (130, 136, 1031), (700, 1024, 50257))
"""[N, D] x [V, D]: a tile with nothing to cut off; ragged in every direction; many units of work
for every program."""

TOY = ((20, 16, 72),)
"""For the interpreter."""


def cuda_tiles(kernel: str, n: int, d: int) -> list[Any]:
    """Every shape of the CUDA kernels' tiles with every choice of ``_CUDA``, nearest to today's
    first."""
    import itertools
    import operator
    from dataclasses import replace

    from eapo_kernels.ops.cuda import tiles as cuda_tiles

    current, space = cuda_tiles.find(kernel, n, d), KERNELS["cuda", kernel].space
    found = []
    for shape in cuda_tiles.TILES:
        for values in itertools.product(*space.values()):
            choice = dict(zip(space, values, strict=True))
            if shape.pingpong:
                choice["stagger"] = 0
            name = shape.name.removesuffix("_alone") + ("_alone" if choice["cluster"] == 1 else "")
            found.append(replace(shape, name=name, **choice))
    found = [tile for tile in dict.fromkeys(found) if tile != current]
    mine = tuple(vars(current).values())
    return [current, *sorted(found, key=lambda tile: sum(map(operator.ne, vars(tile).values(), mine)))]


def warm_up(launch: Any) -> None:
    """Compile a Triton launch for the current GPU into triton's cache, without running it."""
    launch.kernel.warmup(*launch.values, grid=(launch.grid,), **launch.options)
