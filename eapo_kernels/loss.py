"""Where ops and objectives meet: a policy loss from hidden states, the head and a batch of sampled responses.

Two schedules of the same mathematics. *autograd*: ``token_stats`` and vector maths, for any loss.
*one_pass*: loss and gradients chunk by chunk with one logit computation, for losses in which a token's
coefficient depends on its own statistics.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import EapoError, ShapeError, describe, require, require_number, require_tensor
from .objectives.batch import check_batch
from .objectives.config import EAPOConfig
from .objectives.controllers import EntropyRatio
from .objectives.methods import METHODS, Method, get_method, resolve_positive_weight
from .objectives.policy import PolicyTerms, loss_and_sums, prepare
from .ops import chunking, collective_checks, dispatch, gradients
from .ops.dispatch import Chunk, Coefficients, LogitCotangents, SurrogateTerms
from .ops.gradients import MainGrad
from .ops.lm_head import Projection, build_projection, check_values, resolve_compaction, scatter_rows, select_valid
from .ops.nucleus import project_nucleus_entropy
from .ops.token_stats import project_stats
from .ops.vocab_shard import VocabShard
from .types import IGNORE_INDEX, SUMS, LossOutput, Options, TokenBatch

SCHEDULES = ("auto", "one_pass", "autograd")


def eapo_loss(
    hidden: Tensor,
    weight: Tensor,
    batch: TokenBatch,
    *,
    positive_weight: float | Tensor | EntropyRatio,
    config: EAPOConfig | None = None,
    bias: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    process_group: dist.ProcessGroup | VocabShard | None = None,
    schedule: str = "auto",
    backend: str = "auto",
    options: Options | None = None,
    main_grad: Tensor | None = None,
    main_grad_scale: float = 1.0,
    metrics: bool = True,
) -> LossOutput:
    """The EAPO loss (docs/math.md E10; arXiv 2605.27846).

        L = - sum_t scale_t w_i min(rho_t A_i, clip(rho_t, 1 - clip_low, 1 + clip_high) A_i) + KL and entropy terms,
        w_i = positive_weight where the reward is above its group's mean, else ``config.negative_weight``

    Args:
        hidden: [N, D] hidden states at the positions that predict ``batch.targets``.
        weight: [V, D] the head's weight.
        batch: the tokens of B responses and their rewards.
        positive_weight: lambda_k of E9, >= 0: a number, a 0-dim tensor or the ``EntropyRatio`` that computes it. It is applied
            here, once: do not scale the advantages as well.
        config: the switches; the defaults are ``EAPOConfig()``.
        bias, inv_temperature, softcap, logit_scale, process_group: as in ``token_stats``. With a group the batch is the same on
            all its processes, and so are the loss and the metrics: ranks of a tensor-parallel group count once.
        schedule: "one_pass" (its loss takes one ``backward``), "autograd" or "auto".
        backend: as in ``token_stats``.
        options: memory budget and the like.
        main_grad: [V, D] fp32 (fp64 for fp64 inputs) accumulator to which the weight's gradient is added during this call
            (one-pass schedule); ``weight`` itself then gets none. Not inside a checkpointed region, whose recomputation would
            add it again. None: the gradient reaches ``weight`` by ``backward``.
        main_grad_scale: what the caller will multiply the loss by before ``backward`` (gradient accumulation, loss scaling).
        metrics: False: the loss and its gradients are the same, but entropies that they do not need are not computed, and
            tokens whose term is zero whatever their log-prob (weighted advantage 0; no KL, penalty, entropy bonus) do no work.

    ``torch.compile(fullgraph=True)`` traces the call (the autograd schedule, no ``process_group`` but a VocabShard); rewards,
    log-probs, ids and the positive weight are then not checked for their values.

    Returns:
        LossOutput. Metrics: see ``policy_loss``.

    Raises:
        ShapeError, EapoError, BackendUnavailable: bad input; the message says what was expected and what was given.
    """
    method = METHODS["eapo"] if config is None else replace(METHODS["eapo"], config=config)
    return policy_loss(
        hidden, weight, batch, method=method, positive_weight=positive_weight, bias=bias, inv_temperature=inv_temperature,
        softcap=softcap, logit_scale=logit_scale, process_group=process_group, schedule=schedule, backend=backend,
        options=options, main_grad=main_grad, main_grad_scale=main_grad_scale, metrics=metrics,
    )  # fmt: skip


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    batch: TokenBatch,
    *,
    method: str | Method,
    positive_weight: float | Tensor | EntropyRatio | None = None,
    bias: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    process_group: dist.ProcessGroup | VocabShard | None = None,
    schedule: str = "auto",
    backend: str = "auto",
    options: Options | None = None,
    main_grad: Tensor | None = None,
    main_grad_scale: float = 1.0,
    metrics: bool = True,
) -> LossOutput:
    """The loss of any method: ``METHODS``'s by name, or a ``Method`` of your own. Arguments as in ``eapo_loss``.

    Args:
        method: name or Method. One that weighs tokens (``method.token_weighting``) wants a batch that went through ``weight_tokens``.
        positive_weight: required where the method has none of its own (``method.positive_weight is None``), else refused.

    Returns:
        LossOutput with metrics over the tokens that count (means, 0-dim fp32): ``eapo/entropy`` (nats),
        ``eapo/positive_weight``, ``eapo/positive_fraction`` (of the responses with tokens here), ``clip_fraction``,
        ``ratio_mean``, ``old_kl`` (k3 to the old policy, nats), ``kl`` (to the reference, nats; 0 without one), ``tokens``; and
        ``eapo/entropy_ratio``, ``eapo/entropy_init`` when ``positive_weight`` is an EntropyRatio. With ``metrics=False`` those
        that need no log-probs: without entropy, clip fraction, ratio and KL.
    """
    try:
        shard = None if process_group is None else VocabShard.resolve(process_group, weight)
        options = Options() if options is None else options
        require(isinstance(options, Options), "options", "Options or None", options)
        method = get_method(method)
        config = method.config
        require(isinstance(config, EAPOConfig), "config", "an EAPOConfig or None", config)
        require(schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}", repr(schedule))
        check_batch(batch, config, debug=options.debug)
        weighted = method.token_weighting is None or batch.advantages is not None
        require(weighted, "batch.advantages", f"those of weight_tokens with method {method.name!r}", None)
        if not (isinstance(weight, Tensor) and weight.device == batch.targets.device):
            raise ShapeError(f"weight: expected [V, D] on {batch.targets.device} like batch.targets, got {describe(weight)}")
        lam = resolve_positive_weight(method, positive_weight, weight.device, options.debug)
        full_rows = shard is None or config.entropy_top_p is None
        require(
            full_rows, "process_group", "None with entropy_top_p: a nucleus is chosen from all logits of a row", process_group
        )
        all_terms = prepare(batch, config, lam)
        terms = all_terms if metrics else all_terms.without_idle()
        projection = build_projection(hidden, weight, bias, inv_temperature, softcap, logit_scale, batch.targets.shape, shard)
        targets = torch.where(terms.valid, batch.targets, IGNORE_INDEX)
        options = resolve_compaction(options, targets, batch.mask is not None or config.drop_zero_weight or not metrics)
        main = None
        if main_grad is not None:
            require_tensor("main_grad", main_grad, tuple(weight.shape), (projection.statistics_dtype,), projection.hidden)
            require_number("main_grad_scale", main_grad_scale)
            main = MainGrad(main_grad.detach(), main_grad_scale)
        schedule = _choose_schedule(schedule, config, backend, projection, options.plan, main is not None)
    except EapoError as error:
        if process_group is not None:
            collective_checks.propagate(error, process_group, options)
        raise
    if shard is not None:
        collective_checks.compare(
            projection, targets, options, call="policy_loss", backend=backend, schedule=schedule, method=method.name,
            metrics=metrics, main_grad=main is not None, old_logp=batch.old_logp is not None,
            entropy_bonus=terms.has_entropy_bonus,
        )  # fmt: skip
    if schedule == "one_pass":
        check_values(projection, targets, options.debug)
        loss, sums = _one_pass(projection, targets, terms, backend, options, main, metrics)
    else:
        loss, sums = _autograd(projection, targets, terms, backend, options, metrics)
    return LossOutput(loss, _metrics(all_terms, sums if metrics else None, positive_weight))


def loss_denominator(
    batch: TokenBatch, *, method: str | Method, positive_weight: float | Tensor | EntropyRatio | None = None
) -> Tensor:
    """What ``batch.denominator`` is to be for the parts of this (shaped) batch, so that their losses add up to its loss.

    Args:
        batch: all tokens of one optimizer step that this process holds; add the result up over ranks. Its own ``denominator``
            is not looked at.
        method, positive_weight: as in ``policy_loss``.

    Returns:
        0-dim fp32: tokens that count for ``token_mean``, responses with such tokens for the other reductions, without those
        that ``drop_zero_weight`` drops; at least 1.
    """
    method = get_method(method)
    check_batch(batch, method.config, debug=False)
    lam = resolve_positive_weight(method, positive_weight, batch.targets.device, False)
    terms = prepare(batch, method.config, lam)
    valid = terms.valid.float()
    if method.config.reduction != "token_mean":
        valid = (valid.new_zeros(max(terms.n_sequences, 1)).index_add_(0, terms.sequence_ids, valid) > 0).float()
    return valid.sum().clamp_min(1)


class EAPOLoss(nn.Module):
    """``eapo_loss`` with its settings and its controller in one module, so that H_0 travels in the state dict.

    ``controller.update(entropy_sum, token_count)`` once a step, then call the module for every micro-batch of the step.
    """

    def __init__(
        self,
        config: EAPOConfig | None = None,
        controller: EntropyRatio | None = None,
        *,
        schedule: str = "auto",
        backend: str = "auto",
        options: Options | None = None,
    ) -> None:
        super().__init__()
        self.config = config or EAPOConfig()
        self.controller = controller or EntropyRatio()
        self.schedule, self.backend, self.options = schedule, backend, options

    def forward(self, hidden: Tensor, weight: Tensor, batch: TokenBatch, **arguments: Any) -> LossOutput:
        """``eapo_loss`` with its other keyword arguments (bias, inv_temperature, ...); the positive weight is the controller's."""
        return eapo_loss(
            hidden, weight, batch, positive_weight=self.controller, config=self.config, schedule=self.schedule,
            backend=self.backend, options=self.options, **arguments,
        )  # fmt: skip

    def get_extra_state(self) -> dict[str, object]:
        return self.controller.state_dict()

    def set_extra_state(self, state: dict[str, object]) -> None:
        self.controller.load_state_dict(state)


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients are already known; backward scales them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, known: Any) -> Tensor:
        ctx.known = known
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.known is None:
            raise EapoError("backward: expected one call per one_pass loss, got a second one; use schedule='autograd'")
        known, ctx.known = ctx.known, None
        scaled = (None if g is None else g.mul_(grad_loss).to(d) for g, d in zip(known, ctx.dtypes, strict=True))
        return (None, *scaled, None)


def _one_pass(
    projection: Projection, targets: Tensor, terms: PolicyTerms, backend_name: str, options: Options, main_grad: MainGrad | None,
    metrics: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, sums) of the one-pass schedule; ``loss.backward()`` hands out the gradients computed along the way.

    targets: [N] int64, -100 where ``terms.valid`` is False.
    """
    inputs = (projection.hidden, projection.weight, projection.bias)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]
    needs = (wanted[0], wanted[1] or (main_grad is not None and torch.is_grad_enabled()), wanted[2])
    backend = dispatch.resolve(backend_name, projection, "one_pass")
    rows, index = select_valid(projection.detach(), terms.valid, options.compact)
    targets = torch.where(terms.valid, targets, 0)
    if index is not None:
        targets, terms = targets[index], terms.rows(index)
    has_bonus, is_clipped = terms.has_entropy_bonus, _is_clipped_surrogate(terms)

    def coefficients(chunk: Chunk, rows: slice) -> Coefficients:
        part = terms.rows(rows)
        fused = chunk.surrogate(_surrogate_terms(part)) if is_clipped else None
        if fused is not None:
            return fused
        stats = chunk.statistics()
        with torch.enable_grad():
            logp = stats.logp.detach().requires_grad_()
            entropy = None if stats.entropy is None else stats.entropy.detach().requires_grad_(has_bonus)
            loss, sums = loss_and_sums(part, logp, entropy)
            if not any(needs):
                return Coefficients(LogitCotangents(None), sums)
            leaves = [logp, entropy] if entropy is not None and has_bonus else [logp]
            return Coefficients(LogitCotangents(*torch.autograd.grad(loss, leaves)), sums)

    sums, (d_hidden, d_weight, d_bias) = gradients.one_pass(
        rows, targets, coefficients, backend, entropy=metrics or has_bonus, entropy_gradient=has_bonus,
        logp_guess=terms.old_logp, needs=needs, options=options, main_grad=main_grad,
    )  # fmt: skip
    if d_hidden is not None:
        d_hidden = scatter_rows(d_hidden, index, projection.n_rows)
    return _KnownGradients.apply(sums[0], *inputs, (d_hidden, d_weight, d_bias)), sums


def _is_clipped_surrogate(terms: PolicyTerms) -> bool:
    """Whether ``SurrogateTerms`` can express the loss."""
    c = terms.config
    plain = c.surrogate == "ppo_clip" and not terms.has_entropy_bonus and terms.ref_logp is None and terms.ratio_penalty is None
    return plain and terms.old_logp is not None and not terms.token_advantages


def _surrogate_terms(terms: PolicyTerms) -> SurrogateTerms:
    assert terms.old_logp is not None
    c = terms.config
    return SurrogateTerms(
        sequence_ids=terms.sequence_ids,
        old_logp=terms.old_logp,
        scale=terms.scale if terms.importance is None else terms.scale * terms.importance,
        advantages=terms.advantages,
        rewards=terms.split.values,
        thresholds=terms.split.thresholds,
        positive_weight=terms.positive_weight,
        negative_weight=c.negative_weight,
        clip_low=c.clip_low,
        clip_high=c.clip_high,
        dual_clip=c.dual_clip,
        valid=terms.valid,
    )


def _autograd(
    projection: Projection, targets: Tensor, terms: PolicyTerms, backend: str, options: Options, metrics: bool
) -> tuple[Tensor, Tensor]:
    """(loss, sums) of the autograd schedule. With ``entropy_top_p`` the bonus is on the nucleus, the metric on the whole."""
    top_p = terms.config.entropy_top_p if terms.has_entropy_bonus else None
    entropy = "grad" if terms.has_entropy_bonus and top_p is None else "nograd" if metrics else "none"
    stats = project_stats(projection, targets, entropy=entropy, second_moments=False, backend=backend, options=options)
    if top_p is None:
        return loss_and_sums(terms, stats.logp, stats.entropy)
    loss, sums = loss_and_sums(terms, stats.logp, project_nucleus_entropy(projection, terms.valid, top_p, options))
    if stats.entropy is None:
        return loss, sums
    whole = torch.where(terms.valid, stats.entropy, 0.0).sum()
    return loss, torch.stack([whole if name == "entropy" else value for name, value in zip(SUMS, sums, strict=True)])


def _choose_schedule(
    schedule: str, config: EAPOConfig, backend: str, projection: Projection, plan: str, has_main_grad: bool
) -> str:
    forced = "main_grad" if has_main_grad else "Options(plan='chunks')" if plan == "chunks" else None
    if forced and schedule == "autograd":
        raise EapoError(f"schedule: expected 'one_pass' or 'auto' with {forced}, got 'autograd'")
    if forced:
        schedule = "one_pass"
    elif plan == "recompute" and schedule == "auto":
        schedule = "autograd"
    token_scope = config.scope == "token" and config.entropy_top_p is None
    if schedule == "one_pass" and not token_scope:
        reason = f"a loss of {config.scope} scope ({config.surrogate})"
        if config.entropy_top_p is not None:
            reason = f"entropy_top_p={config.entropy_top_p}"
        raise EapoError(f"schedule: expected 'autograd' for {reason}, got 'one_pass'")
    if schedule != "auto":
        return schedule
    name = "torch" if backend == "auto" else backend
    proven = (projection.hidden.device.type, name, "one_pass") in chunking.PROVEN
    return "one_pass" if token_scope and proven and not torch.compiler.is_compiling() else "autograd"


def _metrics(terms: PolicyTerms, sums: Tensor | None, positive_weight: object) -> dict[str, Tensor]:
    """Sums over tokens to means over the tokens that count; without them, what the batch alone says."""
    tokens = terms.valid.sum().float()
    positive = terms.split.positive().float()
    if terms.token_split:
        fraction = (positive * terms.valid).sum() / tokens.clamp_min(1)
    else:
        counts = positive.new_zeros(terms.n_sequences).index_add_(0, terms.sequence_ids, terms.valid.float())
        fraction = (positive * (counts > 0)).sum() / (counts > 0).sum().clamp_min(1)
    metrics = {
        "eapo/positive_weight": terms.positive_weight,
        "eapo/positive_fraction": fraction,
        "tokens": tokens,
    }
    if sums is not None:
        means = dict(zip(SUMS, sums.float() / tokens.clamp_min(1), strict=True))
        metrics |= {
            "eapo/entropy": means["entropy"],
            "clip_fraction": means["clipped"],
            "ratio_mean": means["ratio"],
            "old_kl": means["old_kl"],
            "kl": means["kl"],
        }
    if isinstance(positive_weight, EntropyRatio):
        metrics["eapo/entropy_ratio"] = positive_weight.ratio.float()  # on the device of the controller
        metrics["eapo/entropy_init"] = positive_weight.initial_entropy.float()
    return metrics
