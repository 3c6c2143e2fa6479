"""The launchers of the kernels over rows, with the outputs of their namesakes in ``ops/triton``."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from ..backend import SurrogateTerms
from ..projection import Projection
from ..triton.finalize import Finalized, statistics_of, surrogate_arguments
from ..triton.offsets import ScaledExpSums, window
from ..triton.scaled_exp_finalize import scaled_exp_statistics
from ..triton.sums import PartialSums
from .configs import RowBuild
from .launch import Launch, addresses
from .products import OPERANDS


class Surrogate(ctypes.Structure):
    """``SurrogateArguments`` of csrc/arguments.h; all zero: none is wanted."""

    _fields_ = [
        ("coefficient", ctypes.c_void_p),
        ("totals", ctypes.c_void_p),
        ("sequence_ids", ctypes.c_void_p),
        ("valid", ctypes.c_void_p),
        ("old_logp", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("advantages", ctypes.c_void_p),
        ("rewards", ctypes.c_void_p),
        ("thresholds", ctypes.c_void_p),
        ("positive_weight", ctypes.c_void_p),
        ("negative_weight", ctypes.c_float),
        ("ratio_low", ctypes.c_float),
        ("ratio_high", ctypes.c_float),
        ("dual_clip", ctypes.c_float),
    ]


class FinalizeArguments(ctypes.Structure):
    """``FinalizeArguments`` of csrc/arguments.h."""

    _fields_ = [
        ("out", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("n_rows", ctypes.c_int),
        ("splits", ctypes.c_int),
        ("fields", ctypes.c_int),
        ("surrogate", Surrogate),
    ]


class ExpFinalizeArguments(ctypes.Structure):
    """``ExpFinalizeArguments`` of csrc/arguments.h."""

    _fields_ = [
        ("out", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("row_inv_temperature", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("n_rows", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("fields", ctypes.c_int),
        ("surrogate", Surrogate),
    ]


class OffsetArguments(ctypes.Structure):
    """``OffsetArguments`` of csrc/arguments.h."""

    _fields_ = [
        ("offsets", ctypes.c_void_p),
        ("n_rescue", ctypes.c_void_p),
        ("logp_guess", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("row_inv_temperature", ctypes.c_void_p),
        ("hidden_stride", ctypes.c_longlong),
        ("weight_stride", ctypes.c_longlong),
        ("bias_stride", ctypes.c_longlong),
        ("scale", ctypes.c_float),
        ("with_guess", ctypes.c_float),
        ("without_guess", ctypes.c_float),
        ("n_rows", ctypes.c_int),
        ("n_columns", ctypes.c_int),
        ("dim", ctypes.c_int),
    ]


_DTYPES = {"sequence_ids": torch.int64, "valid": torch.bool}
"""Of a surrogate's tensors; the others are fp32."""


def _surrogate(
    terms: SurrogateTerms | None, like: Tensor, programs: int, n_rows: int
) -> tuple[Surrogate, dict[str, Tensor | None]]:
    """The structure, its outputs allocated, and the tensors that it points into."""
    given = surrogate_arguments(terms, like, programs, n_rows)
    if not given.pop("SURROGATE"):
        return Surrogate(), {}
    if given["dual_clip"] is None:
        given["dual_clip"] = math.inf
    tensors: dict[str, Tensor | None] = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        assert tensor is not None
        assert tensor.dtype == _DTYPES.get(name, torch.float32), name
    return Surrogate(**(given | addresses(tensors))), tensors


def row_offsets(projection: Projection, targets: Tensor, logp_guess: Tensor | None, sums: ScaledExpSums) -> Launch:
    """The launch that fills ``sums.offsets``. targets: [N] int64. logp_guess: [N] fp32 or None.

    Rows of hidden and weight are contiguous, aligned multiples of 16 bytes apart.
    """
    p, limits = projection, window(projection.operand_dtype)
    assert p.softcap is None
    tensors = {
        "offsets": sums.offsets,
        "n_rescue": sums.n_rescue,
        "logp_guess": None if logp_guess is None else logp_guess.contiguous(),
        "hidden": p.hidden,
        "weight": p.weight,
        "bias": p.bias,
        "targets": targets.contiguous(),
        "row_inv_temperature": None if p.row_inv_temperature is None else p.row_inv_temperature.contiguous(),
    }
    arguments = OffsetArguments(
        **addresses(tensors),
        hidden_stride=p.hidden.stride(0),
        weight_stride=p.weight.stride(0),
        bias_stride=0 if p.bias is None else p.bias.stride(0),
        scale=p.logit_scale * p.inv_temperature,
        with_guess=limits.with_guess,
        without_guess=limits.without_guess,
        n_rows=p.n_rows,
        n_columns=p.vocab,
        dim=p.dim,
    )
    item = RowBuild("row_offsets", OPERANDS[p.hidden.dtype])
    return Launch(item, (), arguments, tensors, -(-p.n_rows // item.rows), p.hidden.device)


def finalize(partial: PartialSums, terms: SurrogateTerms | None = None) -> tuple[Launch, Finalized]:
    """The launch that turns partial sums into statistics, with ``terms`` also into coefficients and sums, and its outputs."""
    sums = partial.values
    fields, splits, n_rows = sums.shape
    assert sums.is_contiguous()
    assert sums.data_ptr() % 16 == 0
    item = RowBuild("finalize")
    programs = -(-n_rows // item.rows)
    out = sums.new_empty({3: 4, 4: 6, 7: 9}[fields], n_rows)
    surrogate, outputs = _surrogate(terms, sums, programs, n_rows)
    tensors: dict[str, Tensor | None] = {"out": out, "sums": sums}
    arguments = FinalizeArguments(**addresses(tensors), n_rows=n_rows, splits=splits, fields=fields, surrogate=surrogate)
    launch = Launch(item, (), arguments, tensors | outputs, programs, sums.device)
    return launch, Finalized(statistics_of(out, entropy=partial.entropy), outputs.get("coefficient"), outputs.get("totals"))


def scaled_exp_finalize(
    projection: Projection, sums: ScaledExpSums, terms: SurrogateTerms | None = None
) -> tuple[Launch, Finalized, Tensor]:
    """The launch, its outputs, and [2, N] fp32: see ``ops/triton/scaled_exp_finalize.py``."""
    p, values = projection, sums.values
    fields, tiles, n_rows = values.shape
    assert values.is_contiguous()
    assert values.data_ptr() % 16 == 0
    item = RowBuild("scaled_exp_finalize")
    programs = -(-n_rows // item.rows)
    out = values.new_empty(8 if sums.entropy else 6, n_rows)
    surrogate, outputs = _surrogate(terms, values, programs, n_rows)
    tensors: dict[str, Tensor | None] = {
        "out": out,
        "sums": values,
        "offsets": sums.offsets,
        "row_inv_temperature": None if p.row_inv_temperature is None else p.row_inv_temperature.contiguous(),
    }
    arguments = ExpFinalizeArguments(
        **addresses(tensors),
        scale=p.logit_scale * p.inv_temperature,
        n_rows=n_rows,
        tiles=tiles,
        fields=fields,
        surrogate=surrogate,
    )
    launch = Launch(item, (), arguments, tensors | outputs, programs, values.device)
    statistics, slopes = scaled_exp_statistics(out)
    return launch, Finalized(statistics, outputs.get("coefficient"), outputs.get("totals")), slopes
