"""Arguments and results. Sizes: N tokens, B sequences (responses), D hidden, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .errors import is_number, require

if TYPE_CHECKING:
    from .support import TokenSupport

IGNORE_INDEX = -100
"""Target value of a masked token (the Hugging Face convention)."""


def valid_tokens(targets: Tensor, mask: Tensor | None) -> Tensor:
    """[...] bool: the target is not -100, and the mask, if there is one, is True."""
    valid = targets != IGNORE_INDEX
    return valid if mask is None else valid & mask


def rows_of(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """``tensor[rows]``; the tensor itself, without a view, where ``rows`` is the slice of all of it."""
    return tensor if isinstance(rows, slice) and rows == slice(0, tensor.shape[0]) else tensor[rows]


PLANS = ("auto", "one_chunk", "chunks", "recompute")

SUMS = ("loss", "entropy", "ratio", "clipped", "old_kl", "kl")
"""Sums over a chunk's tokens: shares of the loss; entropies (nats); ratios to the old policy;
tokens whose gradient the clip removed; KL estimates to the old policy and the reference (nats)."""


class TokenStats(NamedTuple):
    """Statistics of the next-token distribution p = softmax(z) at each position (E1-E4).

    Attributes, each [...] fp32 (fp64 for fp64 inputs), exactly 0 without gradient if masked:
        logp: log p of the target (nats).
        entropy: H = -sum p log p (nats); None if not asked for.
        lse: log sum exp z (nats).
        p2, p2_logp, varentropy: sum p^2, sum p^2 log p (nats), sum p (log p + H)^2 (nats^2, the
            variance of the surprise); no gradient; None unless ``second_moments``.
    """

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor
    p2: Tensor | None = None
    p2_logp: Tensor | None = None
    varentropy: Tensor | None = None


TOKEN_FLOATS = ("old_logp", "ref_logp", "rollout_logp", "entropy_coef", "ratio_penalty", "entropy_score")
PER_TOKEN = ("targets", "sequence_ids", "mask", *TOKEN_FLOATS)
"""The fields of a ``TokenBatch`` that are [N]; the advantages may be, too."""


@dataclass(frozen=True)
class TokenBatch:
    """The response tokens of B sampled responses, packed into one row of N tokens.

    A token counts (is valid) if its target is not -100 and its mask is True.

    Attributes, optional after the first two:
        targets: [N] int64, sampled token ids; -100 masks a token.
        sequence_ids: [N] int64 in [0, B), the response of each token.
        rewards, group_ids: [B] float and [B] int64, equal for responses to the same prompt; may be None with ``advantages``.
        old_logp: [N] float, log-prob under the policy before the update (nats). None: the ratio is
            1 with gradient (exactly on-policy).
        mask: [N] bool, False masks a token.
        ref_logp: [N] float, log-prob under the reference policy (nats), for the KL penalty.
        rollout_logp: [N] float, log-prob reported by the rollout engine (nats), for truncated importance sampling.
        advantages: [B] or [N] float, replaces the advantages computed from ``rewards``. The split
            still uses the rewards if they are given, else the sign of the advantage.
        token_advantages: whether the advantages are [N]. None: by their shape, which for N = B requires ids 0, 1, 2, ...
        entropy_coef: [N] float, added to the config's factor of the entropy bonus (loss per nat).
        ratio_penalty: [N] float >= 0, factor of |log(pi / pi_old)| (zero up to 1e-4 nats) in the token's loss.
        entropy_score: [N] float in [-1, 1], how the entropy of the token compares, for surrogate "hapo".
        denominator: number or 0-dim tensor, the *global* count that the reduction divides by (``loss_denominator``), so that
            the losses of micro-batches and ranks add up to the loss of the whole batch. None: counted in this batch.
        sequence_lengths: [B], *global* number of valid tokens of each response for ``seq_mean_token_mean``; needed if a
            response is split over micro-batches. None: counted in this batch.
        support: of N positions, the tokens that the sampler could have drawn; ``old_logp`` and
            ``ref_logp`` must be of the same support. None: the whole vocabulary.
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
    entropy_score: Tensor | None = None
    denominator: float | Tensor | None = None
    sequence_lengths: Tensor | None = None
    support: TokenSupport | None = None

    def select(self, tokens: Tensor | slice) -> TokenBatch:
        """The same batch with some of its tokens: fields [N] are indexed, fields [B] are kept.

        Where N = B, advantages count as [B] unless ``token_advantages`` is True.
        """
        chosen = {name: value[tokens] for name in PER_TOKEN if (value := getattr(self, name)) is not None}
        sized = next((t for t in (self.rewards, self.group_ids, self.sequence_lengths) if t is not None), None)
        if self.advantages is not None and len(self.advantages) == len(self.targets):
            by_shape = sized is None or len(sized) != len(self.targets)
            if by_shape if self.token_advantages is None else self.token_advantages:
                chosen["advantages"] = self.advantages[tokens]
        support = None if self.support is None else self.support.select(tokens)
        return replace(self, **chosen, support=support)


@dataclass(frozen=True)
class LossOutput:
    """``loss``: 0-dim fp32 (fp64 for fp64 inputs), differentiable. ``metrics``: name -> 0-dim fp32
    tensor without gradient; reading one on CUDA synchronizes.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """Settings of the computation that do not change its result beyond rounding, but for ``gradient_tolerance``.

    Attributes:
        memory_budget: bytes of logit-sized workspace for any N, tensors saved by ``token_stats``
            for its backward included; gradients and the fp32 accumulator of d_weight are not. None:
            512 MiB on a CPU; on CUDA a 32nd of the device's memory, between 256 MiB and 2 GiB; 96
            MiB with ``plan="recompute"``.
        compact: whether masked rows are removed before the matrix products. On CUDA the host then
            waits for their number once per direction; in a CUDA graph under capture no rows are
            removed. "auto": on a CPU always; on CUDA with a mask, ``drop_zero_weight`` or
            ``metrics=False``. Without a host wait, select rows with ``hidden[rows]`` and
            ``TokenBatch.select(rows)``.
        plan: the chunks of logits, see docs/plans.md. "auto": by the memory budget. "one_chunk":
            all rows at once; an error if they do not fit. "chunks": rows in chunks, d_weight summed
            in fp32 (one-pass schedule only). "recompute": no logit gradient is saved for the
            backward (autograd schedule only).
        debug: on CUDA, also check values (targets in range, finite rewards), which synchronizes; on
            a split head, compare the arguments of the ranks. CPU values are always checked.
        gradient_tolerance: in (0, 0.5], or None: exact gradients. With a tolerance the gradient of a
            token's logits may leave out its smallest probabilities: each token's error in the L1
            norm is measured, and at most the tolerance times the norm of its own gradient or, if
            that is larger, times a 64th of the chunk's mean norm. Losses and metrics stay exact.
            Where the distributions are concentrated this replaces most of the two gradient products.
            Where log-probs alone carry the gradient, without a soft-cap and on a whole head; elsewhere,
            and where the autograd schedule computes the logits again, gradients stay exact. On CUDA the
            host then waits for counts in every chunk.
    """

    memory_budget: int | None = None
    compact: bool | str = "auto"
    debug: bool = False
    plan: str = "auto"
    gradient_tolerance: float | None = None

    def __post_init__(self) -> None:
        budget = self.memory_budget
        positive = budget is None or (type(budget) is int and 0 < budget < 2**63)
        require(positive, "Options.memory_budget", "a positive number of bytes (int) or None", repr(budget))
        known = self.compact == "auto" or isinstance(self.compact, bool)
        require(known, "Options.compact", "'auto', True or False", repr(self.compact))
        require(self.plan in PLANS, "Options.plan", f"one of {', '.join(PLANS)}", repr(self.plan))
        tol = self.gradient_tolerance
        small = tol is None or (is_number(tol) and 0 < tol <= 0.5)
        require(small, "Options.gradient_tolerance", "a number in (0, 0.5] or None", repr(tol))


DEFAULT_OPTIONS = Options()
