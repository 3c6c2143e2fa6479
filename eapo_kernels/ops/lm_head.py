"""The language-model head as logits that are never stored whole (docs/math.md E1): the projection,
the checks of its arguments, and the selection of valid rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import traced
from ..errors import FACTORS, FLOATS, EapoError, ShapeError, describe, is_factor, require, require_tensor
from ..support import TokenSupport
from ..types import IGNORE_INDEX, Options, rows_of
from .vocab_shard import INVALID, VocabShard

_MOVED_AT_ONCE = 16  # rows that ``fill_holes_`` moves at once


def describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can describe a matrix: contiguous rows, aligned to 16 bytes."""
    dense = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return dense and matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0


@dataclass(frozen=True)
class Projection:
    """The logits z = inv_temperature * cap(logit_scale * (hidden @ weight.T + bias)) (E1).

    cap(u) = softcap * tanh(u / softcap), or u without a soft-cap.
    """

    hidden: Tensor  # [N, D] bf16, fp16, fp32 or fp64
    weight: Tensor  # [V, D], dtype of hidden
    bias: Tensor | None = None  # [V], dtype of hidden; -inf removes a column
    inv_temperature: float = 1.0  # > 0; 1 where row_inv_temperature is given
    row_inv_temperature: Tensor | None = None  # [N] fp32 (fp64 for fp64 inputs), > 0
    logit_scale: float = 1.0  # > 0
    softcap: float | None = None  # > 0, or None
    shard: VocabShard | None = None  # position of weight and bias in a split head; None: the head is whole

    @staticmethod
    def of(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, row_inv_temperature: Tensor | None, inv_temperature: float,
        logit_scale: float, softcap: float | None, group: str, shard: Sequence[int],
    ) -> Projection:  # fmt: skip
        """From the arguments of a custom op, which takes the fields of a ``VocabShard`` (empty: none)."""
        split = VocabShard(group, *shard) if shard else None
        return Projection(hidden, weight, bias, inv_temperature, row_inv_temperature, logit_scale, softcap, split)

    def op_numbers(self) -> tuple[float, float, float | None, str, tuple[int, ...]]:
        """The arguments of ``of`` behind the tensors."""
        shard = self.shard
        split = ("", ()) if shard is None else (shard.group, (shard.start, shard.total, shard.max_shard_vocab))
        return self.inv_temperature, self.logit_scale, self.softcap, *split

    @property
    def n_rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocab(self) -> int:
        """Rows of ``weight`` on this rank."""
        return self.weight.shape[0]

    @property
    def max_shard_vocab(self) -> int:
        """Rows of the largest shard, from which all ranks compute the same chunks."""
        return self.vocab if self.shard is None else self.shard.max_shard_vocab

    @property
    def full_vocab(self) -> int:
        """Rows of all shards: the upper bound of the targets."""
        return self.vocab if self.shard is None else self.shard.total

    @property
    def dim(self) -> int:
        return self.weight.shape[1]

    @property
    def statistics_dtype(self) -> torch.dtype:
        """fp32, or fp64 for fp64 inputs."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def operand_dtype(self) -> torch.dtype:
        """Dtype of the operands of matrix products: the inputs' on CUDA, else ``statistics_dtype``:
        a CPU product of half-precision operands rounds its result to half precision.
        """
        return self.hidden.dtype if self.hidden.is_cuda else self.statistics_dtype

    @functools.cached_property
    def describable(self) -> bool:
        """Whether tensor descriptors can describe hidden and weight."""
        return describable(self.hidden) and describable(self.weight)

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """Operands, sizes and numbers by the names of the kernels' parameters (``triton.common``). The
        operands have their strides: a contiguous copy of [V, D] would cost too much memory."""
        hidden, weight, bias, cap, temperature = self.hidden, self.weight, self.bias, self.softcap, self.row_inv_temperature
        return {
            "hidden": hidden, "weight": weight, "bias": bias, "n_rows": self.n_rows, "n_columns": self.vocab, "dim": self.dim,
            "hidden_stride_n": hidden.stride(0), "hidden_stride_d": hidden.stride(1), "weight_stride_v": weight.stride(0),
            "weight_stride_d": weight.stride(1), "bias_stride": 0 if bias is None else bias.stride(0),
            "row_inv_temperature": None if temperature is None else temperature.contiguous(),
            "slope": self.logit_scale * self.inv_temperature, "cap": None if cap is None else self.logit_scale / cap,
            "scale": (self.logit_scale if cap is None else cap) * self.inv_temperature,
        }  # fmt: skip

    def rows(self, index: slice | Tensor) -> Projection:
        """The same projection for some of the rows."""
        hidden, rows = rows_of(self.hidden, index), self.row_inv_temperature
        if hidden is self.hidden:
            return self
        return replace(self, hidden=hidden, row_inv_temperature=None if rows is None else rows[index])

    def local_targets(self, targets: Tensor, valid: Tensor) -> Tensor:
        """Targets [N], 0 where not ``valid`` [N], as columns of ``weight``; others are ``ELSEWHERE`` or ``INVALID``."""
        targets = targets * valid
        if self.shard is not None:
            return self.shard.local_targets(targets, self.vocab)
        return targets.masked_fill(targets != targets.clamp(0, self.vocab - 1), INVALID)

    def zero_invalid_rows(self, valid: Tensor) -> Projection:
        """The same projection with hidden 0 and temperature 1 in rows that are not ``valid`` [N].

        Their cotangents are 0, and the product of 0 and a NaN would be NaN.
        """
        hidden, rows = torch.where(valid.unsqueeze(1), self.hidden, 0), self.row_inv_temperature
        return replace(self, hidden=hidden, row_inv_temperature=None if rows is None else torch.where(valid, rows, 1))

    def row_scale(self) -> float | Tensor:
        """dz / d(hidden @ weight.T + bias) without the slope of the soft-cap: a number, or [N]."""
        scale = self.logit_scale * self.inv_temperature
        return scale if self.row_inv_temperature is None else self.row_inv_temperature * scale

    def transform_logits_(self, raw: Tensor, columns: slice | Tensor, rows: Tensor | None = None) -> Tensor:
        """Turn raw = hidden @ weight[columns].T, [N, columns] statistics dtype, into z in place.

        With rows and columns [E]: raw [E], the products of row rows[e] and column columns[e].
        """
        if self.bias is not None:
            raw += self.bias[columns]
        scale = self.row_scale()
        if self.softcap is not None:
            raw.mul_(self.logit_scale / self.softcap).tanh_()
            scale = scale * (self.softcap / self.logit_scale)
        if isinstance(scale, Tensor):
            raw.mul_(scale.unsqueeze(1) if rows is None else scale[rows])
        elif scale != 1.0:
            raw.mul_(scale)
        return raw

    def softcap_slope(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """1 - tanh^2 of the soft-cap at the logits z [N, columns], or [E] of ``rows`` [E]; newly allocated."""
        assert self.softcap is not None
        inverse, temperature = 1.0 / (self.softcap * self.inv_temperature), self.row_inv_temperature
        scale = None if temperature is None else inverse / temperature
        tanh = z * (inverse if scale is None else scale.unsqueeze(1) if rows is None else scale[rows])
        return tanh.mul_(tanh).neg_().add_(1.0).clamp_(min=0.0)


def _autocast(x: Any, dtype: torch.dtype) -> Any:
    """The cast that autocast applies to an argument of ``F.linear``: every float dtype but fp64."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x


def build_projection(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, inv_temperature: float | Tensor, softcap: float | None,
    logit_scale: float | None, rows_shape: torch.Size, shard: VocabShard | None = None,
) -> Projection:  # fmt: skip
    """Check the arguments that define the logits and flatten them: hidden [..., D] -> [N, D].

    Under autocast the operands are cast as ``F.linear`` casts them. Raises ShapeError if a shape,
    dtype or device does not fit, and EapoError for a tangent, a gradient of the temperature, or a
    temperature, soft-cap or scale that is not a positive finite number.
    """
    if not (isinstance(weight, Tensor) and weight.dim() == 2 and weight.dtype in FLOATS and weight.numel() > 0):
        raise ShapeError(f"weight: expected a floating-point [V, D] with V, D >= 1, got {describe(weight)}")
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
        hidden, weight, bias = (_autocast(t, dtype) for t in (hidden, weight, bias))
    if not torch.compiler.is_compiling():
        for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
                raise EapoError(f"{name}: expected a tensor without forward-mode tangent (reverse mode only), got one with")
    require_tensor("hidden", hidden, (*rows_shape, weight.shape[1]), (weight.dtype,), weight)
    if bias is not None:
        require_tensor("bias", bias, (weight.shape[0],), (weight.dtype,), weight)
    if torch.compiler.is_compiling():
        inv_temperature, logit_scale = traced.temperature_and_scale(inv_temperature, logit_scale, softcap, hidden.device)
    row_inv_temperature = None
    if isinstance(inv_temperature, Tensor):
        require(not inv_temperature.requires_grad, "inv_temperature", "a tensor without gradient", "requires_grad=True")
        shape, like = (tuple(rows_shape), weight) if inv_temperature.dim() else ((), inv_temperature)
        require_tensor("inv_temperature", inv_temperature, shape, FLOATS if shape else (*FLOATS, torch.int64), like)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        row_inv_temperature = inv_temperature.to(hidden.device, dtype).expand(rows_shape).reshape(-1)
        inv_temperature = 1.0
    for name, value in (("inv_temperature", inv_temperature), ("softcap", softcap), ("logit_scale", logit_scale)):
        if not (value is None or is_factor(value)):  # no text before: it may be traced
            raise EapoError(f"{name}: expected a positive finite number, got {value!r:.99} (bounds: {FACTORS})")
    logit_scale, softcap = 1.0 if logit_scale is None else float(logit_scale), None if softcap is None else float(softcap)
    hidden = hidden if hidden.dim() == 2 else hidden.reshape(-1, weight.shape[1])
    return Projection(hidden, weight, bias, float(inv_temperature), row_inv_temperature, logit_scale, softcap, shard)


def check_values(projection: Projection, targets: Tensor, debug: bool, support: TokenSupport | None = None) -> None:
    """Check the values of targets, temperatures and a support: always on a CPU; on CUDA only with ``debug``.

    Raises EapoError for a target outside [0, V) (V of all shards) other than -100, a temperature
    that is not positive and finite, or ids that ``TokenSupport.check`` refuses.
    """
    if targets.is_cuda and not debug:
        return
    vocab, valid, rows = projection.full_vocab, targets != IGNORE_INDEX, projection.row_inv_temperature
    checks = [("targets", f"values in [0, {vocab}) or {IGNORE_INDEX}", targets, (targets >= 0) & (targets < vocab))]
    if rows is not None:
        checks.append(("inv_temperature", "positive finite values", rows, (rows >= FACTORS[0]) & (rows <= FACTORS[1])))
    for name, expected, values, good in checks:
        bad = valid & ~good
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            raise EapoError(f"{name}: expected {expected}, got {values[row].item()} in row {row}")
    if support is not None:
        support.check(targets, vocab)


def resolve_compaction(options: Options, like: Tensor, announced: bool) -> Options:
    """Resolve ``compact``. announced: mask, drop_zero_weight or metrics=False may exclude rows."""
    return options if options.compact != "auto" else replace(options, compact=announced or not like.is_cuda)


def may_compact(tensor: Tensor, compact: bool | str) -> bool:
    """Whether rows may be selected: a count is read on the host, which graph capture forbids."""
    assert isinstance(compact, bool), "resolve_compaction comes first"
    return compact and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def valid_index(valid: Tensor) -> Tensor | None:
    """Indices [M] of the valid rows, or None if all are valid. Synchronizes on CUDA."""
    index = valid.nonzero().squeeze(1)
    return None if index.numel() == valid.numel() else index


def select_valid(projection: Projection, valid: Tensor, compact: bool | str) -> tuple[Projection, Tensor | None]:
    """(the ``valid`` [N] rows, their index [M]), or (all rows, None).

    All rows stay if all are valid, or if rows must not be selected; invalid rows are then zeroed.
    """
    if not may_compact(valid, compact):
        return projection.zero_invalid_rows(valid), None
    index = valid_index(valid)
    return projection if index is None else projection.rows(index), index


def scatter_rows(values: Tensor, index: Tensor | None, n_rows: int) -> Tensor:
    """Undo the selection: zeros [n_rows, ...] with ``values`` [M, ...] at ``index``."""
    return values if index is None else values.new_zeros((n_rows, *values.shape[1:])).index_copy_(0, index, values)


def fill_holes_(matrix: Tensor, live: Tensor) -> Tensor:
    """Move the ``live`` [C] rows of ``matrix`` [C, K] to its front; returns their old places [L].

    Live rows behind the first L replace the dead ones among them, a few at a time, so that no
    second matrix is allocated. Synchronizes on CUDA.
    """
    count, order = int(live.sum()), torch.arange(len(live), device=live.device)
    holes = (~live[:count]).nonzero().squeeze(1)
    movers = live[count:].nonzero().squeeze(1) + count
    for some_holes, some_movers in zip(holes.split(_MOVED_AT_ONCE), movers.split(_MOVED_AT_ONCE), strict=True):
        matrix[some_holes] = matrix[some_movers]
    order[holes] = movers
    return order[:count]
