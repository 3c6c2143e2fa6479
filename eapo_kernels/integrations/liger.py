"""Drop-ins for Liger-Kernel 0.8.5 on this package's op; Liger itself is not needed.

    loss_of = FusedLinearGRPOLoss(beta=0.0, loss_type="dapo")  # was LigerFusedLinearGRPOLoss(...)
    loss, metrics = loss_of(hidden, lm_head.weight, ids, mask, advantages, old_per_token_logps=old)

``FusedLinearGRPOLoss`` takes the arguments of LigerFusedLinearGRPOLoss and ``positive_weight``, the
EAPO weight. ``LinearCrossEntropyLoss`` takes those of LigerFusedLinearCrossEntropyLoss. Liger's own
names, these and ``liger_fused_linear_grpo`` and ``liger_fused_linear_cross_entropy``, are here too.

The clipped losses and CISPO come from objectives/surrogates.py. SAPO (arXiv 2511.20347) and VESPO
are defined here: their temperatures and exponents would widen every config for this one calling
convention (``EAPOConfig.surrogate`` takes a function).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import FLOATS, EapoError, ShapeError, describe, is_number, require, require_choice, require_number
from ..objectives.surrogates import Clip, cispo, kl_k3, log_ratio, ppo_clip
from ..ops.token_stats import token_stats
from ..types import IGNORE_INDEX, Options
from .cross_entropy import REDUCTIONS, cross_entropy
from .weight import scale_positive

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
_BOUND = 20.0  # VESPO's clamp of log-ratios
_FLOOR = math.log(1e-8)


class FusedLinearGRPOLoss(nn.Module):
    """GRPO-like losses from hidden states and the head, with Liger's names, defaults and meanings.

    ``compiled`` and ``chunk_size`` have no effect: ``options.memory_budget`` bounds the memory.
    Differences from Liger: luspo's mean and vespo's ``vllm_is_ratio`` mask padding, and log-ratios
    are clamped to +-60, beyond which Liger's ratio overflows.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        *,
        softcap: float | None = None,
        logit_scale: float | None = None,
        backend: str = "auto",
        options: Options | None = None,
    ) -> None:
        """
        Args:
            beta: factor of the k3 estimate of the KL to the reference; 0: no KL term.
            use_ref_model: the call gets reference log-probs or hidden states.
            loss_type: one of ``LOSS_TYPES``.
            importance_sampling_level: "token" or "sequence" (mean log-ratio of the response).
            delta: upper clamp of the ratio (two-sided clipping), above 1 - epsilon_low, or None.
                Above 1 + epsilon_high it is the dual clip (arXiv 1912.09729). Below, it is the
                upper bound for positive advantages; 1 + epsilon_high stays that of negative ones.
            use_bias_correction_kl: multiply the KL by the ratio.
            softcap, logit_scale, backend, options: as in ``token_stats``; not in Liger.

        Raises:
            EapoError: a value out of range, or a combination that the loss does not define.
        """
        super().__init__()
        require_choice("loss_type", loss_type, LOSS_TYPES)
        require_choice("importance_sampling_level", importance_sampling_level, ("token", "sequence"))
        for name, value in (("sapo_temperature_pos", sapo_temperature_pos), ("sapo_temperature_neg", sapo_temperature_neg),
                            ("temperature", temperature), ("delta", 1.0 if delta is None else delta)):  # fmt: skip
            require_number(name, value, 0)
            require(value > 0, name, "a finite number > 0", value)
        require(delta is None or delta > 1 - epsilon_low, "delta", f"a number > 1 - epsilon_low = {1 - epsilon_low}", delta)
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise EapoError("max_completion_length: expected a number of tokens for loss_type 'dr_grpo', got None")
        self.beta, self.use_ref_model, self.loss_type = beta, use_ref_model, loss_type
        self.epsilon_low, self.epsilon_high, self.delta = epsilon_low, epsilon_high, delta
        self.max_completion_length, self.importance_sampling_level = max_completion_length, importance_sampling_level
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg
        self._op: dict[str, Any] = {
            "inv_temperature": 1.0 / temperature, "softcap": softcap, "logit_scale": logit_scale, "entropy": "none",
            "backend": backend, "options": options,
        }  # fmt: skip

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        *,
        positive_weight: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """
        Args:
            _input: [B, T, D] hidden states that predict ``selected_token_ids``.
            lin_weight: [V, D]; bias: [V] or None.
            selected_token_ids: [B, T] int64.
            attention_mask: [B, T] bool or 0/1, the tokens that count.
            advantages: [B] float.
            ref_per_token_logps, old_per_token_logps: [B, T] float or None; without old log-probs
                the ratio is 1 with gradient.
            ref_input, ref_weight, ref_bias: hidden states [B, T, D] and head of the reference, in
                place of its log-probs.
            vllm_is_ratio: [B], [B, 1], [B, T] or None, factor of the policy term.
            num_items_in_batch: tokens of the generation batch over all ranks (dapo, cispo, vespo);
                None: the tokens of this call, summed over all ranks.
            positive_weight: the EAPO weight (docs/math.md E9). Do not also scale the advantages.

        Returns:
            (0-dim loss, metrics): the mean KL if beta is not 0, then the fraction of clipped
                tokens.

        Raises:
            ShapeError, EapoError: bad input; the message says expected and got.
        """
        if self.importance_sampling_level == "sequence" and self.loss_type in ("cispo", "sapo", "vespo"):
            raise EapoError(
                "importance_sampling_level: expected 'token', got 'sequence'. Sequence-level importance sampling is not "
                f"supported for loss_type={self.loss_type!r}"
            )
        shape = tuple(attention_mask.shape)
        if attention_mask.dim() != 2 or tuple(selected_token_ids.shape) != shape:
            raise ShapeError(f"selected_token_ids: expected int64 [B, T] like the mask {list(shape)}, got "
                             f"{describe(selected_token_ids)}")  # fmt: skip
        if tuple(advantages.shape) != shape[:1] or advantages.dtype not in FLOATS:
            raise ShapeError(f"advantages: expected float [{shape[0]}], got {describe(advantages)}")
        if positive_weight is not None:
            advantages = scale_positive(advantages, positive_weight)
        counted = attention_mask.bool()
        logp = token_stats(_input, lin_weight, selected_token_ids, bias=bias, mask=counted, **self._op).logp
        reference = self._reference(logp, counted, selected_token_ids, ref_per_token_logps, ref_input, ref_weight, ref_bias)
        old = logp.detach() if old_per_token_logps is None else torch.where(counted, old_per_token_logps.float(), 0.0)
        mask, advantage = counted.to(logp.dtype), advantages.detach().to(logp.dtype)[:, None]

        difference = log_ratio(logp, old)
        if self.importance_sampling_level == "sequence":
            difference = ((difference * mask).sum(1) / mask.sum(1).clamp_min(1))[:, None]
        correction = None if vllm_is_ratio is None else _is_ratio(vllm_is_ratio, shape)
        term, clipped = self._policy_term(logp, difference, advantage, mask, correction)
        per_token = -term
        if correction is not None and self.loss_type != "vespo":
            per_token = per_token * correction
        total, metrics = mask.sum().clamp_min(1), []
        if self.beta:
            kl = kl_k3(logp, reference)
            if self.use_bias_correction_kl:
                kl = kl * difference.exp()
            per_token = per_token + self.beta * kl
            metrics.append((kl * mask).sum().detach() / total)
        metrics.append((clipped.expand(shape) & counted).sum() / total)
        return self._reduce(per_token, mask, num_items_in_batch), tuple(metrics)

    def _policy_term(
        self, logp: Tensor, difference: Tensor, advantage: Tensor, mask: Tensor, correction: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(term to maximise, tokens that Liger counts as clipped), [B, T] or [B, 1].

        difference: the log-ratio; advantage: [B, 1].
        """
        never = torch.zeros_like(difference, dtype=torch.bool)
        if self.loss_type == "cispo":  # Liger's epsilon_high is the upper bound itself; no lower bound
            term, _ = cispo(logp, difference, advantage, Clip(1.0, self.epsilon_high - 1))
            return term, (difference.exp() > self.epsilon_high) & (advantage > 0)
        if self.loss_type == "sapo":
            t = torch.where(advantage > 0, self.sapo_temperature_pos, self.sapo_temperature_neg)
            return torch.sigmoid(t * (difference.exp() - 1)) * 4 / t * advantage, never
        if self.loss_type == "vespo":
            return self._vespo_factor(difference.detach(), advantage, mask, correction) * advantage * logp, never
        low, high, delta = self.epsilon_low, self.epsilon_high, self.delta
        term, clipped = ppo_clip(logp, difference, advantage, Clip(low, high))
        if delta is not None:  # Liger does not count these as clipped
            term, _ = ppo_clip(logp, difference, advantage, Clip(low, min(high, delta - 1), max(delta, 1 + high)))
        return term, clipped

    def _vespo_factor(self, difference: Tensor, advantage: Tensor, mask: Tensor, correction: Tensor | None) -> Tensor:
        """phi(w) = w^k e^(lambda (1 - w)) of the response's ratio w, [B, 1].

        k and lambda depend on the sign of the advantage.
        """
        log_w = (difference.clamp(-_BOUND, _BOUND) * mask).sum(1, keepdim=True)
        if correction is not None:
            counts = mask if correction.shape[1] > 1 else 1.0
            log_w = log_w + (correction.log().clamp(_FLOOR, _BOUND) * counts).sum(1, keepdim=True)
        log_w = log_w.clamp(_FLOOR, _BOUND)
        k = torch.where(advantage >= 0, self.vespo_k_pos, self.vespo_k_neg)
        rate = torch.where(advantage >= 0, self.vespo_lambda_pos, self.vespo_lambda_neg).clamp(min=1e-4)
        return (k * log_w + rate * (1 - log_w.exp())).exp().nan_to_num(0.0, 0.0, 0.0)

    def _reduce(self, per_token: Tensor, mask: Tensor, items: Tensor | float | None) -> Tensor:
        if self.loss_type in ("grpo", "sapo"):
            return ((per_token * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()
        if self.loss_type == "luspo":
            return (per_token * mask).sum(1).mean()
        total = (per_token * mask).sum()
        if self.loss_type == "bnpo":
            return total / mask.sum().clamp_min(1)
        if self.loss_type == "dr_grpo":
            assert self.max_completion_length is not None
            return total / (mask.shape[0] * self.max_completion_length)
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if items is None:
            items = mask.sum()
            if ranks > 1:
                dist.all_reduce(items)
        return total / (torch.as_tensor(items, dtype=mask.dtype, device=mask.device) / ranks).clamp_min(1)

    def _reference(
        self, logp: Tensor, counted: Tensor, ids: Tensor, given: Tensor | None, hidden: Tensor | None, weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """[B, T] log-probs of the reference; the policy's own without a reference."""
        if not self.use_ref_model:
            return logp.detach()
        if given is not None:
            return torch.where(counted, given.detach().float(), 0.0)
        if hidden is None or weight is None:
            raise EapoError("ref_per_token_logps: expected it, or ref_input and ref_weight, with use_ref_model, got neither")
        with torch.no_grad():
            return token_stats(hidden, weight, ids, bias=bias, mask=counted, **self._op).logp


def _is_ratio(ratio: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The importance ratio as [B, 1] or [B, T]."""
    ratio = ratio[:, None] if ratio.dim() == 1 else ratio
    if ratio.dim() != 2 or ratio.shape[0] != shape[0] or ratio.shape[1] not in (1, shape[1]):
        raise ShapeError(f"vllm_is_ratio: expected [{shape[0]}], [{shape[0]}, 1] or {list(shape)}, got {describe(ratio)}")
    return ratio


class LigerError(EapoError, AssertionError):
    """Liger asserts these arguments: an AssertionError too, for callers that expect one."""


@dataclass
class CrossEntropyOutput:
    """The fields of Liger's CrossEntropyOutput; None where not asked for.

    Attributes:
        loss: 0-dim fp32, or [N] with reduction "none", the z-loss included.
        z_loss: its share of the loss, as ``loss``; no gradient. fp32, where Liger's has the input's dtype.
        token_accuracy: share of the unmasked tokens whose target has the largest logit, 0-dim fp32, or
            [N] fp32 of 0 and 1 with reduction "none". 0 where every token is masked.
        predicted_tokens: [N] int64, the token of the largest logit, -1 where masked.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class LinearCrossEntropyLoss(nn.Module):
    """``linear_cross_entropy`` with the arguments of LigerFusedLinearCrossEntropyLoss."""

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
            ce_weight: [V] float or None, ``class_weights``; not a part of the state dict, as in Liger.
            ignore_index, label_smoothing, reduction, softcap: as in ``linear_cross_entropy``.
            lse_square_scale: its ``z_loss``. use_token_scaling: its ``token_scaling``.
            accum_dtype: no effect: gradients are always accumulated in fp32.
            return_z_loss, return_token_accuracy, return_predicted_tokens: return a
                CrossEntropyOutput with these fields. The last two cost a product with the head.

        Raises:
            LigerError: an argument that Liger asserts. EapoError: another one out of range.
        """
        super().__init__()
        try:
            require_number("label_smoothing", label_smoothing, 0, 1)
            require_choice("reduction", reduction, REDUCTIONS)
            require(softcap is None or (is_number(softcap) and softcap > 0), "softcap", "a number > 0 or None", softcap)
            for name, flag in (("return_z_loss", return_z_loss), ("return_token_accuracy", return_token_accuracy),
                               ("return_predicted_tokens", return_predicted_tokens)):  # fmt: skip
                require(isinstance(flag, bool), name, "True or False", flag)
        except EapoError as error:
            raise LigerError(str(error)) from None
        require_number("lse_square_scale", lse_square_scale, 0)
        self.ce_weight, self.ignore_index, self.lse_square_scale = ce_weight, ignore_index, lse_square_scale
        self.label_smoothing, self.reduction, self.softcap = label_smoothing, reduction, softcap
        self.return_z_loss, self.accum_dtype, self.use_token_scaling = return_z_loss, accum_dtype, use_token_scaling
        self.return_token_accuracy, self.return_predicted_tokens = return_token_accuracy, return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """The loss; lin_weight: [V, D], _input: [N, D], target: [N] int64, bias: [V] or None.

        Raises:
            LigerError: ce_weight is not [V] float. ShapeError, EapoError: other bad input.
        """
        weight = self.ce_weight
        if weight is not None and not (tuple(weight.shape) == tuple(lin_weight.shape[:1]) and weight.dtype in FLOATS):
            raise LigerError(f"ce_weight: expected float [{lin_weight.shape[0]}], got {describe(weight)}")
        top = self.return_token_accuracy or self.return_predicted_tokens
        found = cross_entropy(
            _input, lin_weight, target, bias=bias, ignore_index=self.ignore_index, reduction=self.reduction,
            softcap=self.softcap, z_loss=self.lse_square_scale, label_smoothing=self.label_smoothing, class_weights=weight,
            token_scaling=self.use_token_scaling, predicted=top,
        )  # fmt: skip
        if not (self.return_z_loss or top):
            return found.loss
        accuracy = None
        if self.return_token_accuracy:
            accuracy = (found.valid & (found.predicted == target)).float()
            accuracy = accuracy if self.reduction == "none" else accuracy.sum() / found.valid.sum().clamp_min(1)
        z_loss = torch.zeros_like(found.loss, requires_grad=False) if found.z_loss is None else found.z_loss
        return CrossEntropyOutput(
            loss=found.loss, z_loss=z_loss if self.return_z_loss else None, token_accuracy=accuracy,
            predicted_tokens=found.predicted if self.return_predicted_tokens else None,
        )  # fmt: skip


def liger_fused_linear_cross_entropy(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ce_weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX, lse_square_scale: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean",
    softcap: float | None = None, return_z_loss: bool = False, accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False, return_token_accuracy: bool = False, return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:  # fmt: skip
    """``LinearCrossEntropyLoss`` as a function: Liger's ``transformers.functional`` name and order."""
    loss_of = LinearCrossEntropyLoss(
        ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss, accum_dtype,
        use_token_scaling, return_token_accuracy, return_predicted_tokens,
    )  # fmt: skip
    return loss_of(weight, input, target, bias)


def liger_fused_linear_grpo(
    _input: Tensor, weight: Tensor, selected_token_ids: Tensor, attention_mask: Tensor, advantages: Tensor,
    bias: Tensor | None = None, ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    ref_input: Tensor | None = None, ref_weight: Tensor | None = None, ref_bias: Tensor | None = None, beta: float = 0.04,
    epsilon_low: float = 0.2, epsilon_high: float = 0.2, loss_type: str = "dapo", max_completion_length: int | None = None,
    importance_sampling_level: str = "token", sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05,
    temperature: float = 1.0, compiled: bool = True, use_ref_model: bool = True, chunk_size: int = 1,
    vllm_is_ratio: Tensor | None = None, delta: float | None = None, use_bias_correction_kl: bool = False,
    vespo_k_pos: float = 2.0, vespo_lambda_pos: float = 3.0, vespo_k_neg: float = 3.0, vespo_lambda_neg: float = 2.0,
    num_items_in_batch: Tensor | float | None = None, *, positive_weight: float | Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """``FusedLinearGRPOLoss`` as a function: Liger's ``chunked_loss.functional`` name and order."""
    loss_of = FusedLinearGRPOLoss(
        beta, compiled, use_ref_model, chunk_size, epsilon_low, epsilon_high, loss_type, max_completion_length,
        importance_sampling_level, sapo_temperature_pos, sapo_temperature_neg, temperature, delta, use_bias_correction_kl,
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg,
    )  # fmt: skip
    return loss_of(
        _input, weight, selected_token_ids, attention_mask, advantages, bias, ref_per_token_logps, old_per_token_logps,
        ref_input, ref_weight, ref_bias, vllm_is_ratio, num_items_in_batch, positive_weight=positive_weight,
    )  # fmt: skip


LigerFusedLinearGRPOLoss = FusedLinearGRPOLoss
LigerFusedLinearCrossEntropyLoss = LinearCrossEntropyLoss
