"""A policy loss on vectors of one number a token: the batch becomes coefficients, statistics become loss terms (E9, E10)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..types import IGNORE_INDEX, TokenBatch
from .advantages import ADVANTAGES
from .batch import n_sequences
from .config import EAPOConfig
from .reductions import REDUCTIONS, Counts
from .surrogates import KL_ESTIMATORS, MAX_LOG_RATIO, SEQUENCE_RATIO, SURROGATES, kl_k3, log_ratio
from .weighting import SPLITS, Split, by_advantage


@dataclass(frozen=True)
class PolicyTerms:
    """Everything a policy loss needs to know about its tokens before their log-probs are known.

    Attributes:
        config: the loss.
        valid: [N] bool, the tokens that count (after dropping responses of weight zero).
        sequence_ids: [N] int64.
        scale: [N] fp32, the reduction's weight of a token.
        importance: [N] fp32, truncated importance weight of the policy term, or None.
        advantages: [B] or [N] fp32, without the sign weights.
        split: values and thresholds [B] (or [N] with per-token advantages) that make a response positive.
        positive_weight: 0-dim fp32.
        old_logp, ref_logp: [N] fp32 or None.
        n_sequences: B.
        per_token: whether advantages are given per token instead of per response.
    """

    config: EAPOConfig
    valid: Tensor
    sequence_ids: Tensor
    scale: Tensor
    importance: Tensor | None
    advantages: Tensor
    split: Split
    positive_weight: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    n_sequences: int
    per_token: bool

    def weights(self) -> Tensor:
        """w_i of E10: the positive weight or the negative one, [B] (or [N]) fp32."""
        return torch.where(self.split.positive(), self.positive_weight, self.config.negative_weight)

    def weighted_advantages(self) -> Tensor:
        """[N] fp32 advantage of each token with its sign weight applied: the one place where it is."""
        weighted = self.weights() * self.advantages
        return weighted if self.per_token else weighted[self.sequence_ids]

    def rows(self, index: slice | Tensor) -> PolicyTerms:
        """The same loss for some of the tokens."""

        def take(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[index]

        part = replace(
            self,
            valid=self.valid[index],
            sequence_ids=self.sequence_ids[index],
            scale=self.scale[index],
            importance=take(self.importance),
            old_logp=take(self.old_logp),
            ref_logp=take(self.ref_logp),
        )
        if self.per_token:
            advantages = self.advantages[index]
            part = replace(part, advantages=advantages, split=by_advantage(None, None, advantages))
        return part


def prepare(batch: TokenBatch, config: EAPOConfig, positive_weight: Tensor) -> PolicyTerms:
    """Advantages, split, weights and the reduction's denominators of a (checked) batch. No gradient."""
    size = n_sequences(batch)
    if batch.advantages is not None:
        advantages = batch.advantages.detach().float()
        per_token = advantages.shape == batch.targets.shape and not (
            batch.rewards is not None and advantages.shape == batch.rewards.shape
        )
    else:
        assert batch.rewards is not None
        assert batch.group_ids is not None
        estimator = ADVANTAGES[config.advantage] if isinstance(config.advantage, str) else config.advantage
        advantages, per_token = estimator(batch.rewards, batch.group_ids), False
    if batch.rewards is None or batch.group_ids is None or per_token:
        split = by_advantage(None, None, advantages)
    else:
        split = SPLITS[config.split](batch.rewards, batch.group_ids, advantages)

    valid = batch.targets != IGNORE_INDEX
    if batch.mask is not None:
        valid = valid & batch.mask
    if config.drop_zero_weight:
        weights = torch.where(split.positive(), positive_weight, config.negative_weight)
        kept = weights != 0
        valid = valid & (kept if per_token else kept[batch.sequence_ids])

    def counted(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.where(valid, values.detach().float(), 0.0)

    old_logp, ref_logp, rollout_logp = counted(batch.old_logp), counted(batch.ref_logp), counted(batch.rollout_logp)
    ones = valid.float()
    if batch.sequence_lengths is not None:
        lengths = batch.sequence_lengths.float()
    else:
        lengths = ones.new_zeros(size).index_add_(0, batch.sequence_ids, ones)
    denominator = batch.denominator
    if denominator is not None:
        denominator = torch.as_tensor(denominator, dtype=torch.float32, device=ones.device)
    counts = Counts(ones, batch.sequence_ids, lengths, denominator, config.fixed_length)
    importance = None
    if config.importance_cap is not None:
        assert old_logp is not None
        assert rollout_logp is not None
        gap = (old_logp - rollout_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        importance = gap.exp().clamp_max(config.importance_cap)
    return PolicyTerms(
        config=config,
        valid=valid,
        sequence_ids=batch.sequence_ids,
        scale=REDUCTIONS[config.reduction](counts),
        importance=importance,
        advantages=advantages,
        split=split,
        positive_weight=positive_weight,
        old_logp=old_logp,
        ref_logp=ref_logp,
        n_sequences=size,
        per_token=per_token,
    )


def loss_and_sums(terms: PolicyTerms, logp: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of these tokens and, without gradient, the sums to log over them.

    Args:
        terms: the tokens' coefficients.
        logp: [N] fp32, differentiable.
        entropy: [N] fp32, differentiable where the loss has an entropy bonus; None counts as zero.

    Returns:
        (0-dim fp32 loss, [6] fp32 sums in the order loss, entropy, ratio, clipped, old_kl, kl).
    """
    config = terms.config
    logp = torch.where(terms.valid, logp, 0.0)
    old = terms.old_logp
    ratio = log_ratio(logp, old)
    if config.surrogate in SEQUENCE_RATIO:
        ratio = _sequence_mean(ratio, terms)
    surrogate = SURROGATES[config.surrogate] if isinstance(config.surrogate, str) else config.surrogate
    objective, clipped = surrogate(logp, ratio, terms.weighted_advantages(), config.clip)
    if terms.importance is not None:
        objective = objective * terms.importance
    per_token = -objective
    kl = torch.zeros_like(logp)
    if terms.ref_logp is not None:
        kl = KL_ESTIMATORS[config.kl_estimator](logp, terms.ref_logp)
        if config.kl_coef:
            per_token = per_token + config.kl_coef * kl
    if config.entropy_coef:
        assert entropy is not None
        per_token = per_token - config.entropy_coef * entropy
    loss = (terms.scale * torch.where(terms.valid, per_token, 0.0)).sum()
    with torch.no_grad():
        valid = terms.valid.float()
        old_kl = torch.zeros_like(logp) if old is None else kl_k3(logp, old)
        values = (torch.zeros_like(logp) if entropy is None else entropy, ratio.exp(), clipped.float(), old_kl, kl)
        sums = torch.stack([loss.detach(), *((v.detach() * valid).sum() for v in values)])
    return loss, sums


def _sequence_mean(values: Tensor, terms: PolicyTerms) -> Tensor:
    """[N]: the mean over the valid tokens of the token's response; fp64 sums do not depend on the order of addition."""
    valid = terms.valid.double()
    size = max(terms.n_sequences, 1)
    total = valid.new_zeros(size).index_add(0, terms.sequence_ids, values.double() * valid)
    count = valid.new_zeros(size).index_add(0, terms.sequence_ids, valid)
    return (total / count.clamp_min(1))[terms.sequence_ids].to(values.dtype)
