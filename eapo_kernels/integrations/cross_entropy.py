"""Cross-entropy of a linear output head, with the logits processed in chunks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import EapoError, ShapeError, describe, require_choice
from ..loss import policy_loss
from ..objectives.config import EAPOConfig
from ..objectives.methods import Method
from ..ops import collective_checks
from ..ops.token_stats import token_stats
from ..ops.vocab_shard import VocabShard
from ..types import IGNORE_INDEX, Options, TokenBatch

REDUCTIONS = ("mean", "sum", "none")
_METHOD = Method("cross_entropy", EAPOConfig(surrogate="reinforce", split="advantage"))
_NOT_A_CLASS = -1


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float | None = None,
    inv_temperature: float | Tensor = 1.0,
    process_group: dist.ProcessGroup | VocabShard | None = None,
    schedule: str = "auto",
    backend: str = "auto",
    options: Options | None = None,
) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight.T + bias) with ``targets``, in nats.

    With "mean" and "sum" the forward knows the gradient of every row, and the one-pass schedule
    computes the logits once for loss and gradients. With "none" the backward recomputes the logits.

    Args:
        hidden: [..., D] bf16/fp16/fp32 (fp64 on the torch backend).
        weight: [V, D], dtype and device of ``hidden``.
        targets: [...] int64 classes, not shifted here.
        bias: [V] or None.
        ignore_index: target of the rows to mask.
        reduction: "mean" over the unmasked rows, "sum" or "none".
        softcap, logit_scale, inv_temperature, process_group, backend, options: as in
            ``token_stats``; inv_temperature as a tensor is [...].
        schedule: "auto", "one_pass" (one ``backward`` per loss) or "autograd"; reduction "none"
            always takes autograd.

    Returns:
        0-dim fp32, or [...] fp32 with zeros at masked rows (fp64 for fp64 inputs). The mean over no
            rows is 0.

    Raises:
        ShapeError, EapoError, BackendUnavailable: bad input; the message says expected and got.
    """
    try:
        if process_group is not None:
            process_group = VocabShard.resolve(process_group, weight)
        require_choice("reduction", reduction, REDUCTIONS)
        if not (isinstance(targets, Tensor) and targets.dtype == torch.int64):
            raise ShapeError(f"targets: expected int64 [...], got {describe(targets)}")
        if not (isinstance(hidden, Tensor) and hidden.shape[:-1] == targets.shape):
            raise ShapeError(f"hidden: expected [{', '.join(map(str, targets.shape))}, D] like targets, got {describe(hidden)}")
    except EapoError as error:
        if process_group is not None:
            collective_checks.propagate(error, process_group, options)
        raise
    if ignore_index != IGNORE_INDEX:
        # With another ignore_index, -100 is an invalid class and must be rejected like every negative class.
        classes = torch.where(targets == IGNORE_INDEX, _NOT_A_CLASS, targets)
        targets = torch.where(targets == ignore_index, IGNORE_INDEX, classes)
    if reduction == "none":
        return -token_stats(
            hidden, weight, targets, bias=bias, inv_temperature=inv_temperature, softcap=softcap, logit_scale=logit_scale,
            mask=targets != IGNORE_INDEX, process_group=process_group, entropy="none", backend=backend, options=options,
        ).logp  # fmt: skip
    rows = targets.reshape(-1)
    if isinstance(inv_temperature, Tensor) and inv_temperature.dim():
        inv_temperature = inv_temperature.reshape(-1)
    batch = TokenBatch(
        targets=rows,
        mask=rows != IGNORE_INDEX,
        sequence_ids=torch.zeros_like(rows),
        advantages=torch.ones(1, device=rows.device),
        denominator=1.0 if reduction == "sum" else None,
    )
    return policy_loss(
        hidden.reshape(rows.numel(), hidden.shape[-1]), weight, batch, method=_METHOD, bias=bias,
        inv_temperature=inv_temperature, softcap=softcap, logit_scale=logit_scale, process_group=process_group,
        schedule=schedule, backend=backend, options=options, metrics=False,
    ).loss  # fmt: skip
