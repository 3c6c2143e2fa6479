"""The op's arguments, checked. Shapes, dtypes and devices always; values always on the CPU, on CUDA with ``debug``."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import FLOATS, describe, require_tensor
from ..errors import EapoError, ShapeError, require
from ..types import IGNORE_INDEX
from .projection import Projection
from .vocab_parallel import refuse_call, resolve_shard


def _refuse_forward_mode(**tensors: Tensor | None) -> None:
    """A custom op without a forward-mode formula would return a zero tangent in silence."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise EapoError(f"{name}: expected a tensor without forward-mode tangent (reverse mode only), got one with")


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to an argument of ``F.linear``: everything floating but fp64 is cast."""
    castable = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if castable else tensor


def build_projection(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inv_temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float | None,
    rows_shape: torch.Size,
    process_group: object = None,
) -> Projection:
    """Check what defines the logits and flatten it to rows: hidden [..., D] -> [N, D].

    Under autocast it casts as ``F.linear`` would. process_group: as in ``token_stats``.

    Raises:
        ShapeError: a shape, dtype or device does not fit.
        EapoError: a temperature, soft-cap or scale is not a positive finite number, or the processes of the group differ.
    """
    try:
        projection = _build(hidden, weight, bias, inv_temperature, softcap, logit_scale, rows_shape)
    except EapoError:
        if process_group is not None:
            refuse_call(process_group, weight)
        raise
    return replace(projection, shard=resolve_shard(process_group, projection.hidden, projection.weight))


def _build(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inv_temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float | None,
    rows_shape: torch.Size,
) -> Projection:
    if not (isinstance(weight, Tensor) and weight.dim() == 2 and weight.dtype in FLOATS and weight.numel() > 0):
        raise ShapeError(f"weight: expected a floating-point [V, D] with V, D >= 1, got {describe(weight)}")
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
        hidden, weight = _autocast(hidden, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    if not torch.compiler.is_compiling():
        _refuse_forward_mode(hidden=hidden, weight=weight, bias=bias)
    require_tensor("hidden", hidden, (*rows_shape, weight.shape[1]), (weight.dtype,), weight)
    if bias is not None:
        require_tensor("bias", bias, (weight.shape[0],), (weight.dtype,), weight)
    row_inv_temperature = None
    if isinstance(inv_temperature, Tensor):
        require(not inv_temperature.requires_grad, "inv_temperature", "a tensor without gradient", "requires_grad=True")
        if inv_temperature.dim():
            require_tensor("inv_temperature", inv_temperature, tuple(rows_shape), FLOATS, weight)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        row_inv_temperature = inv_temperature.to(hidden.device, dtype).expand(rows_shape).reshape(-1)
        inv_temperature = 1.0
    for name, value in (("inv_temperature", inv_temperature), ("softcap", softcap), ("logit_scale", logit_scale)):
        if value is not None:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(number and 0 < value < math.inf, name, "a positive finite number", repr(value))
    return Projection(
        hidden=hidden.reshape(-1, weight.shape[1]),
        weight=weight,
        bias=bias,
        inv_temperature=float(inv_temperature),
        row_inv_temperature=row_inv_temperature,
        logit_scale=1.0 if logit_scale is None else float(logit_scale),
        softcap=None if softcap is None else float(softcap),
    )


def check_values(projection: Projection, targets: Tensor, debug: bool) -> None:
    """Check the values behind the shapes: reads tensors on the host, so on CUDA only with ``debug``.

    Raises:
        EapoError: a target outside [0, V) (V of all shards) other than -100, or a temperature that is not positive and finite.
    """
    if targets.is_cuda and not debug:
        return
    vocab = projection.whole_vocab
    bad = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= vocab))
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise EapoError(f"targets: expected values in [0, {vocab}) or {IGNORE_INDEX}, got {int(targets[row])} in row {row}")
    rows = projection.row_inv_temperature
    if rows is not None:
        wrong = ~((rows > 0) & rows.isfinite()) & (targets != IGNORE_INDEX)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise EapoError(f"inv_temperature: expected positive finite values, got {float(rows[row])} in row {row}")
