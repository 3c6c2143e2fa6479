"""A policy loss on vectors (E9, E10): ``prepare`` turns a batch into coefficients of its tokens,
and ``loss_and_sums`` turns these, log-probs and entropies into the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import traced
from ..errors import LARGEST, EapoError, may_read, require, require_scalar
from ..types import TOKEN_FLOATS, TokenBatch, rows_of, valid_tokens
from .advantages import ADVANTAGES, OF_GROUPS, Split, split_responses
from .batch import has_token_advantages, n_sequences
from .config import EAPOConfig
from .controllers import EntropyRatio
from .grouping import Groups
from .reductions import token_scale
from .surrogates import KL_ESTIMATORS, MAX_LOG_RATIO, SEQUENCE_RATIO, SURROGATES, kl_k3, log_ratio
from .token_weights.step import Method

SAME_POLICY = 1e-4
"""Rounding may separate two log-probs by this much (nats): the sign of log rho is noise, and |log rho| has no gradient."""


class PolicyTerms(NamedTuple):
    """The coefficients of a policy loss, which do not depend on its log-probs.

    Attributes:
        config: the loss.
        valid: [N] bool, the tokens that count (without responses that ``drop_zero_weight`` drops).
        sequence_ids: [N] int64 in [0, B), 0 for tokens that do not count.
        lengths, tokens: [B] and 0-dim fp32, the tokens of each response that count, and of all.
        scale: [N] fp32, the reduction's weight of a token.
        importance: [N] fp32, truncated importance weight of the policy term, or None.
        advantages: [B] fp32, or [N] with ``token_advantages``; without the sign weights.
        split: positive and other responses, [B], or tokens, [N], with ``token_split``.
        positive_weight: 0-dim fp32.
        old_logp, ref_logp, entropy_coef, ratio_penalty, entropy_score: [N] fp32 or None, see ``TokenBatch``.
    """

    config: EAPOConfig
    valid: Tensor
    sequence_ids: Tensor
    lengths: Tensor
    tokens: Tensor
    scale: Tensor
    importance: Tensor | None
    advantages: Tensor
    split: Split
    positive_weight: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    entropy_coef: Tensor | None
    ratio_penalty: Tensor | None
    entropy_score: Tensor | None
    token_advantages: bool
    token_split: bool

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the loss has a gradient with respect to the entropies."""
        return self.config.entropy_coef != 0 or self.entropy_coef is not None

    def weighted_advantages(self) -> Tensor:
        """[N] fp32 advantage of each token times its sign weight w_i (E10); applied only here."""
        weights = torch.where(self.split.positive(), self.positive_weight, self.config.negative_weight)
        weights = weights if self.token_split else weights[self.sequence_ids]
        return weights * (self.advantages if self.token_advantages else self.advantages[self.sequence_ids])

    def live(self) -> Tensor:
        """[N] bool: tokens that count, but for those whose term is zero at every log-prob (advantage 0)."""
        has_kl = self.config.kl_coef != 0 and self.ref_logp is not None
        if self.has_entropy_bonus or self.ratio_penalty is not None or has_kl or self.config.scope == "batch":
            return self.valid
        return self.valid & (self.weighted_advantages() != 0)

    def without_idle(self) -> PolicyTerms:
        """The same loss with the ``live`` tokens only, if the scope is "token": else idle ones are in others' gradients."""
        return self if self.config.scope != "token" else self._replace(valid=self.live())

    def rows(self, index: slice | Tensor) -> PolicyTerms:
        """The same loss for some of the tokens."""
        if rows_of(self.valid, index) is self.valid:
            return self
        names = ["valid", "sequence_ids", "scale", "importance", *TOKEN_FLOATS]
        names += ["advantages"] if self.token_advantages else []
        parts = {name: value[index] for name in names if (value := getattr(self, name, None)) is not None}
        return self._replace(**parts, split=Split(*(t[index] for t in self.split)) if self.token_split else self.split)


def resolve_positive_weight(
    method: Method, given: float | Tensor | EntropyRatio | None, device: torch.device, debug: bool
) -> Tensor:
    """The method's own positive weight, else the caller's: 0-dim fp32 on the device.

    Raises EapoError unless exactly one is given, a finite number >= 0 (a tensor: where ``may_read`` allows it).
    """
    own, kinds = method.positive_weight, "a number, a 0-dim tensor or an EntropyRatio"
    if own is not None and given is not None:
        raise EapoError(f"positive_weight: expected None for method {method.name!r}, whose weight is {own:g}, got {given!r}")
    value = own if given is None else given.weight if isinstance(given, EntropyRatio) else given
    if value is None:
        raise EapoError(f"positive_weight: expected {kinds} for method {method.name!r}, got None")
    require_scalar("positive_weight", value, kinds)
    if not isinstance(value, Tensor) or may_read(value, debug):
        require(bool(0 <= value <= LARGEST), "positive_weight", "a finite number >= 0", value)
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or device.type == "cpu":
            return value.detach().to(device, torch.float32, copy=True)
        value = float(value)  # a fill: a copy would block, and a graph cannot capture it
    if torch.compiler.is_compiling():
        return traced.scalar(value, device)
    return torch.full((), value, dtype=torch.float32, device=device)


@torch.no_grad()
def prepare(batch: TokenBatch, config: EAPOConfig, positive_weight: Tensor) -> PolicyTerms:
    """The coefficients of a (checked) batch: advantages, split, denominators. No gradient."""
    valid = valid_tokens(batch.targets, batch.mask)
    idle = ~valid

    def masked(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.float().masked_fill(idle, 0.0)

    token_advantages = has_token_advantages(batch)
    groups = None
    if batch.rewards is not None and config.split != "advantage":
        groups = Groups(batch.rewards, batch.group_ids if config.split == "group" else None)
    if batch.advantages is None:
        assert batch.rewards is not None
        assert batch.group_ids is not None
        estimator = ADVANTAGES[config.advantage] if isinstance(config.advantage, str) else config.advantage
        given = {"groups": groups} if estimator in OF_GROUPS and config.split == "group" else {}
        advantages = estimator(batch.rewards, batch.group_ids, **given).float()
    else:
        advantages = batch.advantages.detach().float()
        advantages = advantages.masked_fill(idle, 0.0) if token_advantages else advantages
    split = split_responses(advantages, groups)
    token_split = token_advantages and groups is None

    old_logp, rollout_logp, importance = masked(batch.old_logp), masked(batch.rollout_logp), None
    if config.importance_cap is not None:
        assert old_logp is not None
        assert rollout_logp is not None
        gap = (old_logp - rollout_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        importance = gap.exp().clamp_max(config.importance_cap)
    sequence_ids, ref_logp = batch.sequence_ids.masked_fill(idle, 0), masked(batch.ref_logp)
    if config.drop_zero_weight:
        kept = torch.where(split.positive(), positive_weight, config.negative_weight) != 0
        valid = valid & (kept if token_split else kept[sequence_ids])
    lengths = advantages.new_zeros(n_sequences(batch)).index_add_(0, sequence_ids, valid.float())
    tokens = lengths.sum()
    scale = token_scale(
        config.reduction, valid, sequence_ids, lengths, tokens, fixed_length=config.fixed_length,
        lengths=batch.sequence_lengths, denominator=batch.denominator,
    )  # fmt: skip
    return PolicyTerms(
        config, valid, sequence_ids, lengths, tokens, scale, importance, advantages, split, positive_weight, old_logp, ref_logp,
        masked(batch.entropy_coef), masked(batch.ratio_penalty), masked(batch.entropy_score), token_advantages, token_split,
    )  # fmt: skip


def loss_and_sums(terms: PolicyTerms, logp: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of these tokens, 0-dim fp32, and their sums, [len(SUMS)] fp32 without gradient.

    logp, entropy: [N] fp32, differentiable (the entropy where the loss has an entropy bonus, else
    None counts as zero).
    """
    config, old = terms.config, terms.old_logp
    logp = torch.where(terms.valid, logp, 0.0)
    ratio = log_ratio(logp, old)
    if config.surrogate in SEQUENCE_RATIO:
        ratio = _sequence_mean(ratio, terms)
    surrogate = SURROGATES[config.surrogate] if isinstance(config.surrogate, str) else config.surrogate
    objective, clipped = surrogate(logp, ratio, terms.weighted_advantages(), config.clip._replace(score=terms.entropy_score))
    per_token = -objective if terms.importance is None else -objective * terms.importance
    zeros = torch.zeros_like(logp)
    kl = zeros if terms.ref_logp is None else KL_ESTIMATORS[config.kl_estimator](logp, terms.ref_logp)
    if terms.ref_logp is not None and config.kl_coef:
        per_token = per_token + config.kl_coef * kl
    if terms.ratio_penalty is not None:
        size = ratio.abs()
        per_token = per_token + terms.ratio_penalty * torch.where(size > SAME_POLICY, size, 0.0)
    if terms.has_entropy_bonus:
        assert entropy is not None
        bonus = config.entropy_coef if terms.entropy_coef is None else config.entropy_coef + terms.entropy_coef
        per_token = per_token - bonus * entropy
    loss = (terms.scale * torch.where(terms.valid, per_token, 0.0)).sum()
    with torch.no_grad():
        old_kl = zeros if old is None else kl_k3(logp, old)
        values = torch.stack([zeros if entropy is None else entropy, ratio.exp(), clipped, old_kl, kl])  # SUMS after the loss
        return loss, torch.cat([loss.unsqueeze(0), (values * terms.valid).sum(1)])


def _sequence_mean(values: Tensor, terms: PolicyTerms) -> Tensor:
    """[N]: the mean over the valid tokens of the token's response (fp64 sums: see ``grouping``)."""
    total = values.new_zeros(len(terms.lengths), dtype=torch.float64)
    total = total.index_add(0, terms.sequence_ids, values.double() * terms.valid)
    return (total / terms.lengths.clamp_min(1))[terms.sequence_ids].to(values.dtype)
