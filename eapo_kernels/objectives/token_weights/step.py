"""Token weights: the statistics of a step before its first update, and how a method weighs it.

A method that weighs tokens by entropy, covariance or position does so once a step, over all
responses of all micro-batches and ranks. A mean over the batch is therefore the mean over the whole
step, however the batch is split afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...errors import FLOATS, require, require_choice, require_number, require_tensor
from ...types import TokenBatch, TokenStats, valid_tokens
from ..advantages import ADVANTAGES
from ..config import EAPOConfig
from ..grouping import Partition
from ..reductions import token_scale
from .partition import OrderedPartition

STATISTICS = ("second_moments", "tempered_logp", "nucleus_entropy", "teacher_logp", "answer")
"""What a TokenWeighting may require beyond log-prob and entropy: fields of ``StepStats``
(second_moments: p2 and p2_logp)."""

MARKS = ("turn_ids", "reinforce", "replayed", "spans")
"""What a TokenWeighting may read where the caller gives it: fields of ``StepStats``."""

_EXTRAS = (*(name for name in STATISTICS if name != "second_moments"), *MARKS)
_BOOLEAN = {"answer", "reinforce", "replayed", "spans"}


class TokenWeights(NamedTuple):
    """What a TokenWeighting returns. None keeps the batch's own; no field carries gradient.

    Attributes:
        advantages: [N], with every weight on the log-prob gradient applied.
        entropy_coef: [N], factor of the token's entropy bonus, as in ``TokenBatch``.
        ratio_penalty: [N], factor of |log(pi / pi_old)|, as in ``TokenBatch``.
        keep: [N] bool, tokens that still count; the others leave the denominators too.
        entropy_score: [N], of surrogate "hapo", as in ``TokenBatch``.
    """

    advantages: Tensor
    entropy_coef: Tensor | None = None
    ratio_penalty: Tensor | None = None
    keep: Tensor | None = None
    entropy_score: Tensor | None = None


@dataclass(frozen=True)
class StepStats:
    """Statistics of the old policy at every token of a step, and reductions of them.

    Attributes:
        valid: [N] bool, tokens that count. Values at the others are never read.
        sequence_ids: [N] int64 in [0, B); a response's tokens are contiguous and in order. 0 at
            tokens that do not count.
        rewards: [B] as given.
        group_ids: [B] int64.
        estimator: (rewards [B], group_ids [B]) -> advantages [B], of the method's config.
        given: [B] fp32, the batch's own advantages, which replace the estimator's; or None.
        scale: [N] fp32, the weight of a token in the config's reduction, with the whole step as one
            batch.
        logp, entropy: [N] fp32 (nats).
        p2, p2_logp: [N] fp32, see ``TokenStats``; for "second_moments".
        tempered_logp: [N] fp32, log-prob of the token at another temperature; for "tempered_logp".
        nucleus_entropy: [N] fp32 (nats), entropy of the renormalised nucleus; for
            "nucleus_entropy".
        teacher_logp: [N] fp32, log-prob under a teacher; for "teacher_logp".
        answer: [N] bool, tokens of the final answer, after the reasoning; for "answer".
        turn_ids: [N] int64 >= 0, the turn or reasoning step in the response, rising; None: one
            turn.
        reinforce: [N] bool, tokens of responses sampled at another temperature to steer the
            entropy; or None.
        replayed: [N] bool, tokens of responses from a replay buffer; or None.
        spans: [N] bool, key tokens of correct and error tokens of wrong responses; or None.
        state: numbers of the method's controller, 0-dim tensors by name.
        progress: share of the training that is done, in [0, 1].
        seed: for methods that draw at random.
    """

    valid: Tensor
    sequence_ids: Tensor
    rewards: Tensor
    group_ids: Tensor
    estimator: Callable[[Tensor, Tensor], Tensor]
    given: Tensor | None
    scale: Tensor
    logp: Tensor
    entropy: Tensor
    p2: Tensor | None = None
    p2_logp: Tensor | None = None
    tempered_logp: Tensor | None = None
    nucleus_entropy: Tensor | None = None
    teacher_logp: Tensor | None = None
    answer: Tensor | None = None
    turn_ids: Tensor | None = None
    reinforce: Tensor | None = None
    replayed: Tensor | None = None
    spans: Tensor | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    progress: float = 0.0
    seed: int = 0

    def advantages(self) -> Tensor:
        """[B] fp32, the batch's own advantages, else the config's advantages of the rewards."""
        return self.estimate(self.rewards) if self.given is None else self.given

    def estimate(self, rewards: Tensor, among: Tensor | None = None) -> Tensor:
        """[B] fp32, the config's advantages of other rewards [B]. among: [B] bool, the responses that are
        members of their groups; the others are alone in theirs.
        """
        ids = self.group_ids
        if among is not None:
            ids = torch.where(among, Partition(ids).index, torch.arange(ids.numel(), device=ids.device) + ids.numel())
        return self.estimator(rewards, ids).float()

    def token_advantages(self) -> Tensor:
        """[N] fp32 ``advantages`` of each token's response."""
        return self.per_token(self.advantages())

    def raw_rewards(self) -> Tensor:
        """[B] as given, for methods with advantages of their own; raises where the batch has any."""
        require(self.given is None, "batch.advantages", "None with a method that makes its own of the rewards", "a tensor")
        return self.rewards

    def per_token(self, per_sequence: Tensor) -> Tensor:
        """[N] from [B]; 0 at tokens that do not count."""
        own = per_sequence[self.sequence_ids]
        return torch.where(self.valid, own, torch.zeros_like(own))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the valid tokens of [N], 0-dim fp64; 0 without any."""
        chosen = torch.where(self.valid, values.double(), 0.0)
        return chosen.sum() / self.valid.sum().clamp_min(1)

    def std(self, values: Tensor) -> Tensor:
        """Population standard deviation over the valid tokens of [N], 0-dim fp64."""
        return self.mean((values.double() - self.mean(values)).square()).sqrt()

    def max(self, values: Tensor) -> Tensor:
        """Maximum over the valid tokens of [N], 0-dim; -inf without any."""
        return torch.where(self.valid, values, float("-inf")).amax() if values.numel() else values.new_tensor(float("-inf"))

    def min(self, values: Tensor) -> Tensor:
        """Minimum over the valid tokens of [N], 0-dim; inf without any."""
        return -self.max(-values)

    def share(self, fraction: float) -> Tensor:
        """0-dim int64: this fraction of the number of valid tokens, rounded down, at least 1."""
        return (fraction * self.valid.sum().double()).long().clamp_min(1)

    def top(self, values: Tensor, count: Tensor, among: Tensor | None = None) -> Tensor:
        """[N] bool: the ``count`` largest of ``values`` [N] over the valid tokens, or over
        ``among``.

        Ties go to the earlier token.
        """
        among = self.valid if among is None else self.valid & among
        ordered = torch.where(among, values, float("-inf")).argsort(descending=True, stable=True)
        rank = torch.empty_like(ordered).scatter_(0, ordered, torch.arange(ordered.numel(), device=ordered.device))
        return among & (rank < count)

    def entropy_sum(self) -> tuple[Tensor, Tensor]:
        """Sum of the entropies of the valid tokens (nats) and the number of tokens, 0-dim fp64."""
        count = self.valid.sum().double()
        return self.mean(self.entropy) * count, count

    def by_sequence(self, among: Tensor | None = None) -> OrderedPartition:
        """The valid tokens, or those of them in ``among`` [N] bool, by response."""
        return OrderedPartition(self.sequence_ids, self.valid if among is None else self.valid & among)

    def by_turn(self) -> OrderedPartition:
        """The valid tokens by response and turn; classes are in the order of both."""
        if self.turn_ids is None:
            return self.by_sequence()
        turns = torch.where(self.valid, self.turn_ids, 0)
        width = turns.amax() + 1 if turns.numel() else 1
        return OrderedPartition(self.sequence_ids * width + turns, self.valid)

    def lengths(self) -> Tensor:
        """[B] fp32 valid tokens of each response."""
        return self.sequence_sum(torch.ones_like(self.logp))

    def present(self) -> Tensor:
        """[B] bool: responses with tokens that count. The others have no value in statistics of responses."""
        return self.lengths() > 0

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[B] fp32: sum over a response's valid tokens of [N]."""
        chosen = torch.where(self.valid, values.double(), 0.0)
        return chosen.new_zeros(self.rewards.numel()).index_add_(0, self.sequence_ids, chosen).float()

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[B] fp32: mean over a response's valid tokens of [N]; 0 for a response without any."""
        return self.sequence_sum(values) / self.lengths().clamp_min(1)

    def positions(self) -> Tensor:
        """[N] fp32: number of valid tokens of the response before this one."""
        return self.by_sequence().rank(torch.zeros_like(self.logp)).float()

    def uniform(self) -> Tensor:
        """[N] fp32 uniform in [0, 1): the same for the same seed on every device and rank."""
        return torch.rand(self.logp.numel(), generator=torch.Generator().manual_seed(self.seed)).to(self.logp.device)


def number(default: Any, low: float = -math.inf, high: float = math.inf, *, positive: bool = False) -> Any:
    """A field of a TokenWeighting: a finite number in [low, high]; 0 is refused with ``positive``.

    ``default`` None: None is a value too.
    """

    def check(name: str, value: Any) -> None:
        if value is None and default is None:
            return
        require_number(name, value, 0 if positive else low, high)
        if positive:
            require(value > 0, name, "a finite number > 0" if high == math.inf else f"a number in (0, {high:g}]", value)

    return field(default=default, metadata={"check": check})


def choice(default: str, *others: str) -> Any:
    """A field of a TokenWeighting: one of these strings."""
    return field(default=default, metadata={"check": lambda name, value: require_choice(name, value, (default, *others))})


@dataclass(frozen=True)
class TokenWeighting:
    """Base of all token weightings: settings that turn ``StepStats`` into ``TokenWeights``.

    A subclass is a frozen dataclass.
    Fields made by ``number`` and ``choice`` are checked at construction. The computation runs on
    the device of the statistics and must not read values on the host (no ``.item()``, no ``if
    tensor:``). The weights are those of the old policy, where the ratio rho is 1: a factor rho in a
    paper's weight is left to the surrogate.

    Class attributes:
        scope: over what its statistics are taken: "token", "sequence", "group" or "batch".
        needs: names among ``STATISTICS``; ``weight_tokens`` raises without them.
        uses: names among ``MARKS``, read where they are given.
        state: names of the controller's numbers that it reads.
    """

    scope: ClassVar[str] = "batch"
    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[str]] = frozenset()
    state: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for own in fields(self):
            if "check" in own.metadata:
                own.metadata["check"](own.name, getattr(self, own.name))

    def __call__(self, step: StepStats) -> TokenWeights:
        """Weights of every token."""
        raise NotImplementedError

    def observed(self, step: StepStats) -> tuple[Tensor, Tensor]:
        """Sum and count (0-dim fp64) that update the controller: the entropies of all tokens."""
        return step.entropy_sum()


@dataclass(frozen=True)
class Method:
    """A policy-gradient method, as data. A user's own method is another object of this class.

    Attributes:
        name: its key in ``METHODS``.
        config: surrogate, advantage, split, reduction and coefficients.
        positive_weight: factor on the positive responses; None: the caller gives it at every call.
        controller: name of its controller in ``CONTROLLERS``, or None.
        controller_settings: the controller's settings that differ from its defaults.
        token_weighting: weighs every token once a step (``weight_tokens``), or None.
        source: arXiv id of the paper, and of what else the numbers are from.
        summary: one sentence.
        formula: the weights in a line, in the symbols of docs/math.md.
        confidence: "high" (read in the authors' code), "medium" (from a description), "low" (our
            proposal under the paper's name).
    """

    name: str
    config: EAPOConfig
    positive_weight: float | None = 1.0
    controller: str | None = None
    controller_settings: Mapping[str, float] = field(default_factory=dict, hash=False)
    token_weighting: TokenWeighting | None = None
    source: str = ""
    summary: str = ""
    formula: str = ""
    confidence: str = "high"

    @property
    def scope(self) -> str:
        """What a token's weight is computed from: "token", "sequence", "group" or "batch".

        The weights of a TokenWeighting are constants of the loss. The loss itself may therefore be
        of token scope (``config.scope``) and take the one-pass schedule, whatever the scope of the
        weighting.
        """
        return self.config.scope if self.token_weighting is None else self.token_weighting.scope


@torch.no_grad()
def weight_tokens(
    method: Method,
    batch: TokenBatch,
    stats: TokenStats,
    *,
    state: Mapping[str, Tensor] | None = None,
    extras: Mapping[str, Tensor] | None = None,
    progress: float = 0.0,
    seed: int = 0,
) -> TokenBatch:
    """Compute the weights of every token of a whole step, before it is split into micro-batches.

    Args:
        method: with a token_weighting; without one, the batch is returned as it is.
        batch: all responses of the step (of all ranks), with rewards and group_ids; a response's
            tokens in order. Its own advantages [B], where it has them, replace the config's.
        stats: the old policy's statistics of the same tokens, with what
            ``method.token_weighting.needs``.
        state: the controller's numbers, ``controller.values()``, for token weightings that read
            them.
        extras: further tensors [N] by name, see ``StepStats``: tempered_logp, nucleus_entropy,
            teacher_logp (floats), answer, reinforce, replayed, spans (bool), turn_ids (int64).
            Those that the method does not read are ignored.
        progress: share of the training that is done, in [0, 1].
        seed: for methods that draw at random: the same on all ranks, another each step.

    Returns:
        The batch with advantages [N] and, where the method has them, entropy_coef, ratio_penalty,
        entropy_score and a narrower mask with its sequence_lengths. Pass ``select(tokens)`` of it
        to ``policy_loss`` for every micro-batch, with the ``loss_denominator`` of this batch, not
        of the one passed in.

    Raises:
        EapoError, ShapeError: something the token_weighting needs is missing or does not fit.
    """
    require(isinstance(method, Method), "method", "a Method, such as get_method(name)", repr(method))
    if method.token_weighting is None:
        return batch
    reads = method.token_weighting.state
    missing = sorted(reads - set(state or {}))
    expected = f"{', '.join(sorted(reads))} of controller {method.controller!r} for method {method.name!r}"
    require(not missing, "state", expected, f"no {', '.join(missing)}")
    step = _step_stats(method, batch, stats, extras, state, progress, seed)
    weights = method.token_weighting(step)
    keep = step.valid if weights.keep is None else step.valid & weights.keep
    lengths = batch.sequence_lengths
    if weights.keep is not None and lengths is not None:
        lengths = torch.zeros_like(lengths).index_add_(0, step.sequence_ids, keep.to(lengths.dtype))

    def masked(values: Tensor | None, otherwise: Tensor | None) -> Tensor | None:
        return otherwise if values is None else torch.where(keep, values, 0.0).float()

    return replace(
        batch,
        advantages=masked(weights.advantages, None),
        token_advantages=True,
        entropy_coef=masked(weights.entropy_coef, batch.entropy_coef),
        ratio_penalty=masked(weights.ratio_penalty, batch.ratio_penalty),
        entropy_score=masked(weights.entropy_score, batch.entropy_score),
        mask=batch.mask if weights.keep is None else keep,
        sequence_lengths=lengths,
    )


@torch.no_grad()
def observed_entropy(
    method: Method, batch: TokenBatch, stats: TokenStats, *, extras: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The sum and count for ``controller.update``, once a step.

    ``controller.update(*observed_entropy(...))``. A sum (nats) and a count, 0-dim fp64: add both
    over ranks first. For most methods these are the entropies of all tokens that count; SIREN uses
    those of its peaks. Arguments and errors as in ``weight_tokens``.
    """
    require(isinstance(method, Method), "method", "a Method, such as get_method(name)", repr(method))
    step = _step_stats(method, batch, stats, extras, None, 0.0, 0)
    return step.entropy_sum() if method.token_weighting is None else method.token_weighting.observed(step)


def _step_stats(
    method: Method,
    batch: TokenBatch,
    stats: TokenStats,
    extras: Mapping[str, Tensor] | None,
    state: Mapping[str, Tensor] | None,
    progress: float,
    seed: int,
) -> StepStats:
    """The step's statistics, checked, with zeros at the tokens that do not count."""
    extras, tokens, of = dict(extras or {}), tuple(batch.targets.shape), f"with method {method.name!r}"
    require(batch.rewards is not None, "batch.rewards", f"[B] {of}", None)
    require(batch.group_ids is not None, "batch.group_ids", f"[B] {of}", None)
    require(stats.entropy is not None, "stats.entropy", "[N]", None)
    assert batch.rewards is not None
    assert batch.group_ids is not None
    group_ids, size = batch.group_ids, tuple(batch.rewards.shape)
    require_tensor("batch.sequence_ids", batch.sequence_ids, tokens, (torch.int64,), batch.targets)
    require_tensor("batch.group_ids", group_ids, size, (torch.int64,), batch.targets)
    if batch.advantages is not None:
        require_tensor("batch.advantages", batch.advantages, size, FLOATS, batch.targets)
    unknown = sorted(set(extras) - set(_EXTRAS))
    require(not unknown, "extras", f"names among {', '.join(_EXTRAS)}", ", ".join(unknown))
    if method.token_weighting is not None:
        given = {"second_moments"} if stats.p2 is not None and stats.p2_logp is not None else set()
        needs = method.token_weighting.needs
        missing = sorted(needs - given - set(extras))
        require(not missing, "stats, extras", f"{', '.join(sorted(needs))} {of}", f"no {', '.join(missing)}")
    for name in ("logp", "entropy", "p2", "p2_logp"):
        if getattr(stats, name) is not None:
            require_tensor(f"stats.{name}", getattr(stats, name), tokens, FLOATS, batch.targets)
    for name, value in extras.items():
        dtypes = (torch.bool,) if name in _BOOLEAN else (torch.int64,) if name == "turn_ids" else FLOATS
        require_tensor(f"extras.{name}", value, tokens, dtypes, batch.targets)
    require_number("progress", progress, 0, 1)
    config, valid = method.config, valid_tokens(batch.targets, batch.mask)
    estimator = ADVANTAGES[config.advantage] if isinstance(config.advantage, str) else config.advantage
    ids = torch.where(valid, batch.sequence_ids, 0)
    lengths = torch.zeros(batch.rewards.shape, dtype=torch.float32, device=ids.device).index_add_(0, ids, valid.float())
    columns = {"logp": stats.logp, "entropy": stats.entropy, "p2": stats.p2, "p2_logp": stats.p2_logp, **extras}
    return StepStats(
        valid=valid,
        sequence_ids=ids,
        rewards=batch.rewards,
        group_ids=group_ids,
        estimator=estimator,
        given=None if batch.advantages is None else batch.advantages.float(),
        scale=token_scale(config.reduction, valid, ids, lengths, lengths.sum(), fixed_length=config.fixed_length),
        state=dict(state or {}),
        progress=progress,
        seed=seed,
        **{name: torch.where(valid, t, torch.zeros_like(t)) for name, t in columns.items() if t is not None},
    )
