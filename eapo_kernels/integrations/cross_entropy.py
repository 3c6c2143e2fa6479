"""Plain cross-entropy of a linear head without the logits: ``linear_cross_entropy``, and a module with Liger's signature."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import describe, require_choice
from ..errors import ShapeError, require
from ..loss import policy_loss
from ..objectives.config import EAPOConfig
from ..objectives.methods import Method
from ..ops.collective_checks import propagate_errors
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

    With "mean" and "sum" every row's gradient is known in the forward, so one logit computation serves both (the one-pass
    schedule, where it is proven); "none" recomputes the logits in the backward.

    Args:
        hidden: [..., D] bf16/fp16/fp32 (fp64 on the torch backend).
        weight: [V, D], dtype and device of ``hidden``.
        targets: [...] int64 classes, not shifted here.
        bias: [V] or None.
        ignore_index: the target of rows that do not count.
        reduction: "mean" over the rows that count, "sum" or "none".
        softcap, logit_scale, inv_temperature, process_group, backend, options: as in ``token_stats``; inv_temperature as a
            tensor is [...].
        schedule: "auto", "one_pass" (its loss takes one ``backward``) or "autograd"; "none" is always autograd.

    Returns:
        0-dim fp32, or [...] fp32 with zeros at ignored rows (fp64 for fp64 inputs). The mean over no rows is 0.

    Raises:
        ShapeError, EapoError, BackendUnavailable: bad input; the message says what was expected and what was given.
    """
    with propagate_errors(process_group, options):
        require_choice("reduction", reduction, REDUCTIONS)
        if not (isinstance(targets, Tensor) and targets.dtype == torch.int64):
            raise ShapeError(f"targets: expected int64 [...], got {describe(targets)}")
        if not (isinstance(hidden, Tensor) and hidden.shape[:-1] == targets.shape):
            raise ShapeError(f"hidden: expected [{', '.join(map(str, targets.shape))}, D] like targets, got {describe(hidden)}")
    if ignore_index != IGNORE_INDEX:
        classes = torch.where(targets == IGNORE_INDEX, _NOT_A_CLASS, targets)  # out of range like any other negative class
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


class LinearCrossEntropyLoss(nn.Module):
    """``linear_cross_entropy`` with the calling convention of Liger's LigerFusedLinearCrossEntropyLoss (0.8.5)."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        """
        Args:
            ignore_index, reduction, softcap: as in ``linear_cross_entropy``.
            accum_dtype: None or torch.float32; gradients are accumulated in fp32 in any case.
            ce_weight, lse_square_scale, label_smoothing, return_z_loss, use_token_scaling, return_token_accuracy,
                return_predicted_tokens: only their defaults.

        Raises:
            EapoError: an argument that is not supported.
        """
        super().__init__()
        for name, value, only in (
            ("lse_square_scale", lse_square_scale, 0.0), ("label_smoothing", label_smoothing, 0.0),
            ("return_z_loss", return_z_loss, False), ("use_token_scaling", use_token_scaling, False),
            ("return_token_accuracy", return_token_accuracy, False),
            ("return_predicted_tokens", return_predicted_tokens, False),
        ):  # fmt: skip
            require(value == only, name, f"{only} (not supported)", value)
        require(ce_weight is None, "ce_weight", "None (not supported)", describe(ce_weight))
        require(accum_dtype in (None, torch.float32), "accum_dtype", "None or torch.float32", accum_dtype)
        require_choice("reduction", reduction, REDUCTIONS)
        self.ignore_index, self.reduction, self.softcap = ignore_index, reduction, softcap

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        """The loss; lin_weight: [V, D], _input: [N, D], target: [N] int64, bias: [V] or None."""
        return linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias=bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            softcap=self.softcap,
        )
