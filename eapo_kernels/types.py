"""The records that travel between the layers: what goes in, what comes out, and how much memory may be used.

Sizes: N tokens, B sequences (responses), D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from .errors import require

IGNORE_INDEX = -100
"""Target value of a row that does not count (the Hugging Face convention)."""


def valid_tokens(targets: Tensor, mask: Tensor | None) -> Tensor:
    """[...] bool: the tokens that count: their target is not -100 and their mask, if there is one, is True."""
    valid = targets != IGNORE_INDEX
    return valid if mask is None else valid & mask


PLANS = ("auto", "one_chunk", "chunks", "recompute")
"""How the work may be cut, see ``Options.plan``."""

SUMS = ("loss", "entropy", "ratio", "clipped", "old_kl", "kl")
"""What a coefficient function adds up over its tokens, in this order. ``loss`` is the chunk's share of the final loss, the
others are plain sums over tokens: entropy and KL estimates in nats, the ratio to the old policy, and 1 for each token whose
gradient the clip removed."""


class TokenStats(NamedTuple):
    """Statistics of the next-token distribution p = softmax(z) at every position (docs/math.md E1-E4).

    Attributes:
        logp: [...] fp32, log p of the target (nats).
        entropy: [...] fp32, -sum p log p (nats); None when not asked for.
        lse: [...] fp32, log sum exp z (nats).
        p2: [...] fp32, sum p^2; None unless ``second_moments``. Carries no gradient.
        p2_logp: [...] fp32, sum p^2 log p (nats); None unless ``second_moments``. Carries no gradient.
        varentropy: [...] fp32, sum p (log p + H)^2 (nats^2), the variance of the surprise; None unless ``second_moments``.
            Carries no gradient.

    Rows that are masked or whose target is -100 are exact zeros with zero gradient.
    """

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor
    p2: Tensor | None = None
    p2_logp: Tensor | None = None
    varentropy: Tensor | None = None


@dataclass(frozen=True)
class TokenBatch:
    """The response tokens of B sampled responses, packed into one row of N tokens.

    Attributes:
        targets: [N] int64, sampled token ids; -100 marks a token that does not count.
        sequence_ids: [N] int64 in [0, B), the response a token belongs to.
        rewards: [B] float, one reward per response. May be None when ``advantages`` is given.
        group_ids: [B] int64, responses with equal numbers answer the same prompt. May be None when ``advantages`` is given.
        old_logp: [N] float or None, log-prob under the policy that is being improved upon (nats). None: the ratio
            is 1 with gradient (exactly on-policy).
        mask: [N] bool or None, False marks a token that does not count.
        ref_logp: [N] float or None, log-prob under the reference policy (nats), for the KL penalty.
        rollout_logp: [N] float or None, log-prob the rollout engine reported (nats), for truncated importance sampling.
        advantages: [B] or [N] float or None, replaces the advantage computed from ``rewards``. The split into positive and
            negative is still that of the rewards where they are given, else the advantage's sign.
        token_advantages: whether the advantages are per token. None: told from their shape, which where N = B only works with
            ``sequence_ids`` 0, 1, 2, ...
        entropy_coef: [N] float or None, factor of each token's entropy bonus (loss per nat), on top of the config's.
        ratio_penalty: [N] float >= 0 or None, factor of |log(pi / pi_old)| of each token, added to its loss;
            within 1e-4 nats the policies count as the same.
        denominator: number, 0-dim tensor or None, the *global* count that the reduction divides by (tokens that count for
            ``token_mean``, responses with such tokens for the others; without those that ``drop_zero_weight`` drops), so that
            the losses of micro-batches and ranks add up to the loss of the whole batch. None: counted in this batch.
        sequence_lengths: [B] or None, *global* number of valid tokens of each response for ``seq_mean_token_mean``,
            needed only when one response is spread over several micro-batches. None: counted in this batch.
    """

    targets: Tensor
    sequence_ids: Tensor
    rewards: Tensor | None = None
    group_ids: Tensor | None = None
    old_logp: Tensor | None = None
    mask: Tensor | None = None
    ref_logp: Tensor | None = None
    rollout_logp: Tensor | None = None
    advantages: Tensor | None = None
    token_advantages: bool | None = None
    entropy_coef: Tensor | None = None
    ratio_penalty: Tensor | None = None
    denominator: float | Tensor | None = None
    sequence_lengths: Tensor | None = None

    def select(self, tokens: Tensor | slice) -> TokenBatch:
        """The same batch with some of its tokens: what is given per token is indexed, what is given per response stays.

        Where B = N, advantages are the responses' unless ``token_advantages`` says otherwise.
        """
        per_token = ("targets", "sequence_ids", "old_logp", "mask", "ref_logp", "rollout_logp", "entropy_coef", "ratio_penalty")
        chosen = {name: value[tokens] for name in per_token if (value := getattr(self, name)) is not None}
        sized = next((t for t in (self.rewards, self.group_ids, self.sequence_lengths) if t is not None), None)
        if self.advantages is not None and len(self.advantages) == len(self.targets):
            by_shape = sized is None or len(sized) != len(self.targets)
            if by_shape if self.token_advantages is None else self.token_advantages:
                chosen["advantages"] = self.advantages[tokens]
        return replace(self, **chosen)


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss and what there is to log about it.

    Attributes:
        loss: 0-dim fp32 (fp64 for fp64 inputs), differentiable.
        metrics: name -> 0-dim fp32 tensor without gradient (on an accelerator, reading one synchronises).
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """How the work is done; never what is computed.

    Attributes:
        memory_budget: bytes for logit-sized workspace, whatever N is, what a call of ``token_stats`` keeps for its backward
            included. The gradients themselves and the fp32 accumulator of d_weight come on top. None: 256 MiB on a CPU, on a
            GPU a 32nd of its memory or less: 256 MiB, 512 MiB or 1 GiB; 96 MiB with ``plan="recompute"``.
        compact: whether rows that do not count leave before any product. On CUDA the host has to wait for their number, once a
            direction, and in a CUDA graph under capture none leave. "auto": on a CPU always; on CUDA where some are announced,
            by a mask, ``drop_zero_weight`` or ``metrics=False``. So without a mask nothing waits, and a target of -100 costs
            what its row costs. Where the host knows the rows it can select them itself, which is as fast and waits for nothing:
            ``hidden[rows]`` and ``TokenBatch.select(rows)``.
        plan: how logits are cut and kept, see docs/plans.md. "auto": what fits the memory budget. "one_chunk": all rows at
            once, an error where they do not fit (autograd: only where the forward keeps rows at all). "chunks": rows in
            chunks, d_weight summed in fp32 (one-pass schedule only). "recompute": nothing is kept from the forward to the
            backward (autograd schedule only).
        debug: on CUDA, also check values (targets in range, finite rewards); costs synchronisations. Always on for CPU tensors.
    """

    memory_budget: int | None = None
    compact: bool | str = "auto"
    debug: bool = False
    plan: str = "auto"

    def __post_init__(self) -> None:
        require(
            self.memory_budget is None or (type(self.memory_budget) is int and self.memory_budget > 0),
            "Options.memory_budget",
            "a positive number of bytes (int) or None",
            repr(self.memory_budget),
        )
        known = self.compact == "auto" or isinstance(self.compact, bool)
        require(known, "Options.compact", "'auto', True or False", repr(self.compact))
        require(self.plan in PLANS, "Options.plan", f"one of {', '.join(PLANS)}", repr(self.plan))
