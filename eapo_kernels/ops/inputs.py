"""The op's arguments, checked. Shapes, dtypes and devices always; values always on the CPU, on CUDA with ``debug``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import FLOATS, describe, require_tensor
from ..errors import EapoError, ShapeError, require
from ..types import IGNORE_INDEX, Options
from . import dispatch
from .budget import of_options, workspace_bytes
from .collective_checks import Fact, exchange, require_group
from .projection import Projection
from .vocab_parallel import VocabShard


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
) -> Projection:
    """Check what defines the logits and flatten it to rows: hidden [..., D] -> [N, D]. Nothing is split yet.

    Under autocast it casts as ``F.linear`` would.

    Raises:
        ShapeError: a shape, dtype or device does not fit.
        EapoError: a temperature, soft-cap or scale is not a positive finite number.
    """
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


def call_signature(
    process_group: object, call: str, projection: Projection, backend: str, schedule: str, options: Options, **others: Fact
) -> dict[str, Fact]:
    """What all processes of a group must bring alike: by this they decide which work to do. Empty without a group.

    Raises:
        EapoError, BackendUnavailable: the backend is unknown, or cannot run these inputs here.
    """
    if not isinstance(process_group, dist.ProcessGroup):
        return {}
    p = projection
    device = p.hidden.device
    split = replace(p, shard=VocabShard(process_group.group_name, 0, p.vocab, p.vocab))  # not all backends take one
    gradients = [n for n in ("hidden", "weight") if torch.is_grad_enabled() and getattr(p, n).requires_grad]
    facts: dict[str, Fact] = {
        "call": call,
        "columns of the weight": p.dim,
        "rows of hidden": p.n_rows,
        "dtype of the weight": str(p.weight.dtype).removeprefix("torch."),
        "type of device": device.type,
        "gradients wanted": " and ".join(gradients) or "none",
        "bias": "none" if p.bias is None else "one",
        "inv_temperature": p.inv_temperature if p.row_inv_temperature is None else "a tensor",
        "softcap": p.softcap,
        "logit_scale": p.logit_scale,
        "backend": dispatch.resolve(backend, split, schedule).name,
        "schedule": schedule,
        "memory budget": workspace_bytes(of_options(options), device),
        "Options.plan": options.plan,
        "Options.compact": options.compact,
        "Options.debug": options.debug,
    }
    return facts | others


def split_over(process_group: object, projection: Projection, targets: Tensor, facts: Mapping[str, Fact]) -> Projection:
    """The projection with the shard that ``process_group`` (None, a group or a VocabShard) says its weight is.

    A group: an exchange (``collective_checks.exchange``) of ``facts``, of ``targets`` [N] int64 as they count, and of temperatures.

    Raises:
        EapoError: it is none of these, the processes differ, one of them refused or has no rows, or the weight is not the
            shard's (the last for a VocabShard: on the process where it is not).
    """
    if process_group is None:
        return projection
    rows, shard = projection.vocab, process_group
    if not isinstance(shard, VocabShard):
        require_group(process_group)
        assert isinstance(process_group, dist.ProcessGroup)
        values, temperatures = {"targets": targets}, projection.row_inv_temperature
        if temperatures is not None:
            values["inv_temperature"] = torch.where(targets == IGNORE_INDEX, 1, temperatures)
        shard = VocabShard.of_sizes(process_group, exchange(process_group, rows, facts, values, targets.device))
    fits = rows <= shard.max_shard_vocab and shard.start + rows <= shard.total
    require(
        fits,
        "weight",
        f"at most {shard.max_shard_vocab} rows from row {shard.start} of {shard.total}",
        describe(projection.weight),
    )
    return replace(projection, shard=shard) if rows < shard.total else projection  # no other process has rows


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
