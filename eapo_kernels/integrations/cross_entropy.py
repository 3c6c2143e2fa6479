"""Cross-entropy of a linear output head, with the logits processed in chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import FLOATS, EapoError, ShapeError, describe, require, require_choice, require_number
from ..loss import policy_loss
from ..objectives.config import EAPOConfig
from ..objectives.methods import Method
from ..ops import chunking, collective_checks, logit_sums
from ..ops.lm_head import build_projection, resolve_compaction
from ..ops.token_stats import token_stats
from ..ops.vocab_shard import VocabShard
from ..types import DEFAULT_OPTIONS, IGNORE_INDEX, Options, TokenBatch

REDUCTIONS = ("mean", "sum", "none")
_METHOD = Method("cross_entropy", EAPOConfig(surrogate="reinforce", split="advantage"))
_NOT_A_CLASS = -1


class CrossEntropy(NamedTuple):
    """What ``cross_entropy`` returns; fp32 (fp64 for fp64 inputs) but for the ids.

    Attributes:
        loss: 0-dim, or [...] with zeros at masked rows; the z-loss is a part of it.
        z_loss: the z-loss alone, as ``loss``; no gradient. None without one.
        lse: [...] log sum exp of the logits (nats), zeros at masked rows. None where the loss does not
            need it.
        predicted: [...] int64, the class of the largest logit, -1 at masked rows. None: not asked for.
        valid: [...] bool, the rows that are not masked.
    """

    loss: Tensor
    z_loss: Tensor | None
    lse: Tensor | None
    predicted: Tensor | None
    valid: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float | None = None,
    inv_temperature: float | Tensor = 1.0,
    shift: int = 0,
    return_lse: bool = False,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    token_scaling: bool = False,
    process_group: dist.ProcessGroup | VocabShard | None = None,
    schedule: str = "auto",
    backend: str = "auto",
    options: Options | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(hidden @ weight.T + bias) with ``targets``, in nats.

    The loss of a row with target y, class weights w (1 without them) and label smoothing s is

        (1 - s) w_y (-log p_y) + s / V sum_v w_v (-log p_v) + z_loss lse^2

    as in ``torch.nn.functional.cross_entropy``. The mean divides the first two terms by the sum of
    w_y over the unmasked rows and the third by their number.

    With "mean" and "sum" the forward of the plain loss knows the gradient of every row, and the
    one-pass schedule computes the logits once for loss and gradients. Else the backward may
    compute them again. Label smoothing adds products of one row, but with a soft-cap one product
    with the head in each direction.

    Args:
        hidden: [..., D] bf16/fp16/fp32 (fp64 on the torch backend).
        weight: [V, D], dtype and device of ``hidden``.
        targets: [...] int64 classes.
        bias: [V] or None.
        ignore_index: target of the rows to mask.
        reduction: "mean" over the unmasked rows, "sum" or "none".
        softcap, logit_scale, inv_temperature, process_group, backend, options: as in
            ``token_stats``; inv_temperature as a tensor is [...].
        shift: in [0, T) for targets [..., T]: position t predicts the target of position t +
            shift, and the last ``shift`` positions predict nothing; results [...] then have T - shift.
        return_lse: also return the lse.
        z_loss: factor of the squared lse, >= 0.
        label_smoothing: s, in [0, 1].
        class_weights: [V] float (of all ranks), or None. No gradient.
        token_scaling: multiply the loss of a row by its detached probability p_y.
        schedule: "auto", "one_pass" (one ``backward`` per loss) or "autograd", for the plain loss;
            all others take autograd.

    Returns:
        0-dim fp32, or [...] fp32 with zeros at masked rows (fp64 for fp64 inputs). The mean over no
            rows is 0. With ``return_lse`` (loss, lse): lse is [...], differentiable, zero at masked
            rows.

    Raises:
        ShapeError, EapoError, BackendUnavailable: bad input; the message says expected and got.
    """
    found = cross_entropy(
        hidden, weight, targets, bias=bias, ignore_index=ignore_index, reduction=reduction, softcap=softcap,
        logit_scale=logit_scale, inv_temperature=inv_temperature, shift=shift, lse=return_lse, z_loss=z_loss,
        label_smoothing=label_smoothing, class_weights=class_weights, token_scaling=token_scaling,
        process_group=process_group, schedule=schedule, backend=backend, options=options,
    )  # fmt: skip
    if not return_lse:
        return found.loss
    assert found.lse is not None
    return found.loss, found.lse


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean", softcap: float | None = None, logit_scale: float | None = None,
    inv_temperature: float | Tensor = 1.0, shift: int = 0, lse: bool = False, predicted: bool = False, z_loss: float = 0.0,
    label_smoothing: float = 0.0, class_weights: Tensor | None = None, token_scaling: bool = False,
    process_group: dist.ProcessGroup | VocabShard | None = None, schedule: str = "auto", backend: str = "auto",
    options: Options | None = None,
) -> CrossEntropy:  # fmt: skip
    """``linear_cross_entropy`` and what else the same call knows.

    lse, predicted: whether these fields are wanted; predicted costs a product with the head.
    """
    try:
        shard = None if process_group is None else VocabShard.resolve(process_group, weight)
        options = DEFAULT_OPTIONS if options is None else options
        require(isinstance(options, Options), "options", "Options or None", options)
        require_choice("reduction", reduction, REDUCTIONS)
        require_number("z_loss", z_loss, 0)
        require_number("label_smoothing", label_smoothing, 0, 1)
        if not (isinstance(targets, Tensor) and targets.dtype == torch.int64):
            raise ShapeError(f"targets: expected int64 [...], got {describe(targets)}")
        if not (isinstance(hidden, Tensor) and hidden.shape[:-1] == targets.shape):
            raise ShapeError(f"hidden: expected [{', '.join(map(str, targets.shape))}, D] like targets, got {describe(hidden)}")
        positions = targets.shape[-1] if targets.dim() else 0
        if not (isinstance(shift, int) and (shift == 0 or 0 < shift < positions)):
            raise EapoError(f"shift: expected an integer in [0, {positions}), got {shift!r}")
        if class_weights is not None:
            _check_class_weights(class_weights, weight, shard)
    except EapoError as error:
        if process_group is not None:
            collective_checks.propagate(error, process_group, options)
        raise
    if ignore_index != IGNORE_INDEX:
        # With another ignore_index, -100 is an invalid class and must be rejected like every negative class.
        classes = torch.where(targets == IGNORE_INDEX, _NOT_A_CLASS, targets)
        targets = torch.where(targets == ignore_index, IGNORE_INDEX, classes)
    keep: Any = ...
    if shift:
        targets = torch.cat([targets[..., shift:], torch.full_like(targets[..., :shift], IGNORE_INDEX)], -1)
        keep = (..., slice(0, positions - shift))
    valid = targets != IGNORE_INDEX
    call: dict[str, Any] = {
        "bias": bias, "inv_temperature": inv_temperature, "softcap": softcap, "logit_scale": logit_scale,
        "process_group": shard, "backend": backend, "options": options,
    }  # fmt: skip
    extras = lse or predicted or z_loss or label_smoothing or token_scaling or class_weights is not None
    if reduction != "none" and not extras:
        return CrossEntropy(_one_pass(hidden, weight, targets, reduction, schedule, call), None, None, None, valid)
    needs_lse = bool(lse or z_loss or label_smoothing)
    if needs_lse and options.plan == "auto":  # the forward must not keep rows that the gradient of lse cannot use
        budget = chunking.workspace_bytes(options, hidden.device)
        call["options"] = replace(options, plan="recompute", memory_budget=budget)
    stats = token_stats(hidden, weight, targets, mask=valid, entropy="none", **call)
    loss = -stats.logp
    tokens = total = valid.sum().clamp_min(1)
    projection = factors = None
    if label_smoothing or predicted:
        options = resolve_compaction(options, targets, True)
        projection = build_projection(hidden, weight, bias, inv_temperature, softcap, logit_scale, targets.shape, shard)
        collective_checks.compare(
            projection, targets.reshape(-1), options, call="linear_cross_entropy", label_smoothing=label_smoothing,
            class_weights="none" if class_weights is None else "some", predicted=predicted,
        )  # fmt: skip
    if class_weights is not None:
        factors = class_weights.detach().to(stats.logp.dtype)
        of_target = torch.where(valid, factors[targets.clamp(0, len(factors) - 1)], 0)
        loss, total = _times(loss, of_target), of_target.sum()
        total = torch.where(total == 0, 1, total)
    if label_smoothing:
        assert projection is not None
        if factors is None:
            factors = torch.ones(projection.full_vocab, dtype=stats.logp.dtype, device=loss.device)
        shares = factors / len(factors)
        own = shares if shard is None else shares[shard.start : shard.start + projection.vocab]
        mean = logit_sums.weighted_logits(projection, own, valid.reshape(-1), options).reshape(targets.shape)
        loss = loss * (1 - label_smoothing) + (stats.lse * shares.sum() - mean) * label_smoothing
    penalty = stats.lse.square() * z_loss if z_loss else None
    if token_scaling:
        probability = stats.logp.detach().exp()
        loss, penalty = _times(loss, probability), None if penalty is None else penalty * probability
    loss = _reduced(loss[keep], reduction, total)
    if penalty is not None:
        penalty = _reduced(penalty[keep], reduction, tokens)
        loss = loss + penalty
    best = None
    if predicted:
        assert projection is not None
        best = logit_sums.largest_logit(projection, valid.reshape(-1), options).reshape(targets.shape)[keep]
    return CrossEntropy(
        loss, None if penalty is None else penalty.detach(), stats.lse[keep] if needs_lse else None, best, valid[keep]
    )


def _check_class_weights(class_weights: Tensor, weight: Tensor, shard: VocabShard | None) -> None:
    total = shard.total if shard is not None else weight.shape[0]
    ok = isinstance(class_weights, Tensor) and class_weights.shape == (total,) and class_weights.dtype in FLOATS
    if not (ok and class_weights.device == weight.device):
        raise ShapeError(f"class_weights: expected float [{total}] {weight.device}, got {describe(class_weights)}")


def _times(loss: Tensor, factors: Tensor) -> Tensor:
    """The product; 0 where the factor is, also at a target that the bias removed, whose loss is infinite."""
    return torch.where(factors == 0, 0, loss * factors)


def _reduced(values: Tensor, reduction: str, total: Tensor) -> Tensor:
    """The values, their sum, or their sum divided by ``total``."""
    return values if reduction == "none" else values.sum() if reduction == "sum" else values.sum() / total


def _one_pass(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, schedule: str, call: dict[str, Any]
) -> Tensor:  # fmt: skip
    """The plain loss, 0-dim, in the schedule that is wanted. targets: -100 masks a row; call: keywords of ``policy_loss``."""
    rows, inv_temperature = targets.reshape(-1), call["inv_temperature"]
    if isinstance(inv_temperature, Tensor) and inv_temperature.dim():
        call = call | {"inv_temperature": inv_temperature.reshape(-1)}
    batch = TokenBatch(
        targets=rows,
        mask=rows != IGNORE_INDEX,
        sequence_ids=torch.zeros_like(rows),
        advantages=torch.ones(1, device=rows.device),
        denominator=1.0 if reduction == "sum" else None,
    )
    hidden = hidden.reshape(rows.numel(), hidden.shape[-1])
    return policy_loss(hidden, weight, batch, method=_METHOD, schedule=schedule, metrics=False, **call).loss
