"""Policy losses from hidden states, the head's weight and a batch of sampled responses.

Two schedules compute the same loss. *autograd*: ``token_stats``, then vector operations, for any
loss. *one_pass*: loss and gradients chunk by chunk with one logit computation, for losses in which
a token's coefficient depends on its own statistics only. With ``main_grad`` other losses take its
chunks after a pass for the statistics of all tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import EapoError, ShapeError, describe, require, require_choice, require_number, require_tensor
from .objectives.batch import check_batch
from .objectives.config import EAPOConfig
from .objectives.controllers import EntropyRatio
from .objectives.methods import METHODS, Method, get_method
from .objectives.policy import PolicyTerms, loss_and_sums, prepare, resolve_positive_weight
from .ops import collective_checks, dispatch, gradients, sparse
from .ops.dispatch import Chunk, Coefficients, LogitCotangents, RowStatistics, SurrogateTerms
from .ops.gradients import MainGrad
from .ops.lm_head import Projection, build_projection, check_values, resolve_compaction, scatter_rows, select_valid
from .ops.nucleus import project_nucleus_entropy
from .ops.sparsify import Sparsity
from .ops.token_stats import project_stats
from .ops.vocab_shard import VocabShard
from .support import TokenSupport
from .types import DEFAULT_OPTIONS, IGNORE_INDEX, SUMS, LossOutput, Options, TokenBatch, TokenStats, rows_of

SCHEDULES = ("auto", "one_pass", "autograd")


def eapo_loss(
    hidden: Tensor, weight: Tensor, batch: TokenBatch, *,
    positive_weight: float | Tensor | EntropyRatio, config: EAPOConfig | None = None,
    bias: Tensor | None = None, inv_temperature: float | Tensor = 1.0, softcap: float | None = None,
    logit_scale: float | None = None, process_group: dist.ProcessGroup | VocabShard | None = None,
    schedule: str = "auto", backend: str = "auto", options: Options | None = None,
    main_grad: Tensor | None = None, main_grad_scale: float = 1.0, metrics: bool = True,
) -> LossOutput:  # fmt: skip
    """The EAPO loss (docs/math.md E10; arXiv 2605.27846).

        L = - sum_t scale_t w_i min(rho_t A_i, clip(rho_t, 1 - clip_low, 1 + clip_high) A_i)
            + KL and entropy terms
        w_i = positive_weight where the reward is above its group's mean, else negative_weight

    Args:
        hidden: [N, D] hidden states at the positions that predict ``batch.targets``.
        weight: [V, D] the head's weight.
        batch: the tokens of B responses and their rewards.
        positive_weight: lambda_k of E9, >= 0: a number, a 0-dim tensor or the ``EntropyRatio`` that
            computes it. Only the loss applies it: do not scale the advantages as well.
        config: the settings; None: ``EAPOConfig()``.
        bias, inv_temperature, softcap, logit_scale, backend: as in ``token_stats``.
        process_group: as in ``token_stats``. All ranks of the group pass the same batch and get the
            same loss and metrics; count a tensor-parallel group once in sums over ranks.
        schedule: "one_pass" (its loss allows one ``backward``), "autograd" or "auto".
        options: memory budget, plan and checks.
        main_grad: [V, D] fp32 (fp64 for fp64 inputs) accumulator. This call adds the weight's
            gradient to it and ``backward`` gives ``weight`` none. Not inside a checkpointed region,
            because its recomputation would add the gradient again. Not with schedule "autograd" or
            entropy_top_p. None: ``backward`` gives the gradient to ``weight``.
        main_grad_scale: the factor by which the caller will multiply the loss before ``backward``
            (gradient accumulation, loss scaling).
        metrics: False: entropies that the loss does not need are not computed, and tokens whose
            term is zero at every log-prob (weighted advantage 0; no KL, penalty, entropy bonus) are
            masked. Loss and gradients are the same.

    ``torch.compile(fullgraph=True)`` traces the call (autograd schedule; ``process_group`` None or
    a VocabShard) and does not check the values of rewards, log-probs, ids and the positive weight.

    Returns LossOutput; for its metrics see ``policy_loss``. Raises ShapeError, EapoError or
    BackendUnavailable for an invalid argument, with the expected and the given value.
    """
    method = METHODS["eapo"] if config is None else replace(METHODS["eapo"], config=config)
    return policy_loss(
        hidden, weight, batch, method=method, positive_weight=positive_weight, bias=bias, inv_temperature=inv_temperature,
        softcap=softcap, logit_scale=logit_scale, process_group=process_group, schedule=schedule, backend=backend,
        options=options, main_grad=main_grad, main_grad_scale=main_grad_scale, metrics=metrics,
    )  # fmt: skip


def policy_loss(
    hidden: Tensor, weight: Tensor, batch: TokenBatch, *,
    method: str | Method, positive_weight: float | Tensor | EntropyRatio | None = None,
    bias: Tensor | None = None, inv_temperature: float | Tensor = 1.0, softcap: float | None = None,
    logit_scale: float | None = None, process_group: dist.ProcessGroup | VocabShard | None = None,
    schedule: str = "auto", backend: str = "auto", options: Options | None = None,
    main_grad: Tensor | None = None, main_grad_scale: float = 1.0, metrics: bool = True,
) -> LossOutput:  # fmt: skip
    """The loss of any method. Arguments, ``torch.compile`` and errors as in ``eapo_loss``.

    Args:
        method: a name in ``METHODS``, or a Method. If it has a ``token_weighting``, ``batch`` must
            be one that ``weight_tokens`` returned.
        positive_weight: required if ``method.positive_weight`` is None, else an error.

    Returns:
        LossOutput with metrics (0-dim fp32; means over the tokens that count): ``eapo/entropy``
        (nats), ``eapo/positive_weight``, ``eapo/positive_fraction`` (of the responses with such
        tokens), ``clip_fraction``, ``ratio_mean``, ``old_kl`` (k3 to the old policy, nats), ``kl``
        (to the reference, nats; 0 without one), ``tokens``; and ``eapo/entropy_ratio``,
        ``eapo/entropy_init`` if ``positive_weight`` is an EntropyRatio; with
        ``Options(gradient_tolerance=...)`` in the one-pass schedule ``sparse/dropped_mass_max``,
        ``sparse/dropped_mass_mean``, ``sparse/kept_per_row`` and ``sparse/dense_share``. With
        ``metrics=False`` entropy, clip fraction, ratio and KLs are left out.
    """
    try:
        shard = None if process_group is None else VocabShard.resolve(process_group, weight)
        options = DEFAULT_OPTIONS if options is None else options
        require(isinstance(options, Options), "options", "Options or None", options)
        method = get_method(method) if isinstance(method, str) else method
        require(isinstance(method, Method), "method", "a name or a Method", method)
        config = method.config
        require(isinstance(config, EAPOConfig), "config", "an EAPOConfig or None", config)
        require_choice("schedule", schedule, SCHEDULES)
        check_batch(batch, config, debug=options.debug)
        if method.token_weighting is not None and batch.advantages is None:
            raise EapoError(f"batch.advantages: expected those of weight_tokens with method {method.name!r}, got None")
        if not (isinstance(weight, Tensor) and weight.device == batch.targets.device):
            raise ShapeError(f"weight: expected [V, D] on {batch.targets.device} like batch.targets, got {describe(weight)}")
        lam = resolve_positive_weight(method, positive_weight, weight.device, options.debug)
        support, expected = batch.support, "None with entropy_top_p: a nucleus is chosen from all logits of a row"
        require(shard is None or config.entropy_top_p is None, "process_group", expected, process_group)
        require(support is None or config.entropy_top_p is None, "batch.support", expected, "a TokenSupport")
        all_terms = prepare(batch, config, lam)
        terms = all_terms if metrics else all_terms.without_idle()
        projection = build_projection(hidden, weight, bias, inv_temperature, softcap, logit_scale, batch.targets.shape, shard)
        announced = batch.mask is not None or config.drop_zero_weight or not metrics
        targets = torch.where(terms.valid, batch.targets, IGNORE_INDEX) if announced else batch.targets
        options = resolve_compaction(options, targets, announced)
        main = None
        if main_grad is not None:
            require_tensor("main_grad", main_grad, tuple(weight.shape), (projection.statistics_dtype,), projection.hidden)
            require_number("main_grad_scale", main_grad_scale)
            main = MainGrad(main_grad.detach(), main_grad_scale)
        full_entropy = support is not None and support.full_entropy
        schedule = _choose_schedule(schedule, config, options.plan, main is not None, full_entropy)
        if not torch.compiler.is_compiling():
            backend = dispatch.resolve(backend, projection).name
    except EapoError as error:
        if process_group is not None:
            collective_checks.propagate(error, process_group, options)
        raise
    if shard is not None:
        collective_checks.compare(
            projection, targets, options, call="policy_loss", backend=backend, schedule=schedule, method=method.name,
            metrics=metrics, main_grad=main is not None, old_logp=batch.old_logp is not None,
            entropy_bonus=terms.has_entropy_bonus, support=support is not None,
        )  # fmt: skip
    if schedule != "autograd":
        check_values(projection, targets, options.debug, support)
        known = None
        if schedule == "two_passes":
            with torch.no_grad():
                stats = project_stats(projection, targets, entropy="nograd", backend=backend, options=options, support=support)
            known = _coefficients(terms, stats, torch.is_grad_enabled())
        loss, sums, sparsity = _one_pass(projection, targets, terms, support, backend, options, main, metrics, known)
    else:
        (loss, sums), sparsity = _autograd(projection, targets, terms, support, backend, options, metrics), None
    found = _metrics(all_terms, sums if metrics else None, positive_weight)
    return LossOutput(loss, found | ({} if sparsity is None else sparsity.metrics()))


class EAPOLoss(nn.Module):
    """``eapo_loss`` with its settings and its controller in one module, whose state dict holds H_0.

    Call ``controller.update(entropy_sum, token_count)`` once a step, then the module for every
    micro-batch of the step.
    """

    def __init__(
        self, config: EAPOConfig | None = None, controller: EntropyRatio | None = None, *, schedule: str = "auto",
        backend: str = "auto", options: Options | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config or EAPOConfig()
        self.controller = controller or EntropyRatio()
        self.schedule, self.backend, self.options = schedule, backend, options

    def forward(self, hidden: Tensor, weight: Tensor, batch: TokenBatch, **arguments: Any) -> LossOutput:
        """``eapo_loss`` with the controller's positive weight. arguments: other keywords of it."""
        return eapo_loss(
            hidden, weight, batch, positive_weight=self.controller, config=self.config, schedule=self.schedule,
            backend=self.backend, options=self.options, **arguments,
        )  # fmt: skip

    def get_extra_state(self) -> dict[str, object]:
        return self.controller.state_dict()

    def set_extra_state(self, state: dict[str, object]) -> None:
        self.controller.load_state_dict(state)


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients are known up to the factor that its backward receives.

    finish: (factor, *operands) -> the gradients. operands: what it multiplies, saved as any operand of
    a product is: for in-place checks, offload, sharded parameters.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, finish: Any, operands: tuple[Tensor, ...]
    ) -> Tensor:
        ctx.finish = finish
        ctx.save_for_backward(*operands)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.finish is None:
            raise EapoError("backward: expected one call per one_pass loss, got a second one; use schedule='autograd'")
        finish, ctx.finish = ctx.finish, None
        return (None, *finish(grad_loss, *ctx.saved_tensors), None, None)


def _one_pass(
    projection: Projection, targets: Tensor, terms: PolicyTerms, support: TokenSupport | None, backend_name: str,
    options: Options, main_grad: MainGrad | None, metrics: bool, known: Coefficients | None,
) -> tuple[Tensor, Tensor, Sparsity | None]:  # fmt: skip
    """(loss, sums, sparsity) with all gradients computed. targets: -100 where ``terms.valid`` is False.
    known: the coefficients of all rows, of a loss whose tokens need each other's; else None."""
    inputs = (projection.hidden, projection.weight, projection.bias)
    enabled = torch.is_grad_enabled()
    d_hidden, d_weight, d_bias = (enabled and t is not None and t.requires_grad for t in inputs)
    needs = (d_hidden, d_weight or (enabled and main_grad is not None), d_bias)
    backend, valid, has_bonus = dispatch.load(backend_name), terms.valid, terms.has_entropy_bonus

    def open_chunk(rows: slice) -> Chunk:
        part, here = selected.rows(rows), rows_of(local, rows)
        if candidates is not None:
            some = candidates.select(rows)
            return sparse.SupportChunk(part, here, rows_of(chosen.valid, rows), some, backend, entropy=metrics or has_bonus)
        guess = None if chosen.old_logp is None else rows_of(chosen.old_logp, rows)
        return backend.open_chunk(part, here, entropy=metrics or has_bonus, entropy_gradient=has_bonus, logp_guess=guess)

    def coefficients(chunk: Chunk, rows: slice) -> Coefficients:
        if known is not None:
            chunk.statistics()  # which the gradient reads
            return Coefficients(known.cotangents.rows(rows), known.sums if rows.start == 0 else torch.zeros_like(known.sums))
        part = chosen.rows(rows)
        surrogate = _surrogate_terms(part)
        fused = None if surrogate is None else chunk.surrogate(surrogate)
        return _coefficients(part, chunk.statistics(), any(needs)) if fused is None else fused

    with torch.no_grad():
        selected, index = select_valid(projection, valid, options.compact)
        local, chosen, candidates = projection.local_targets(targets, valid), terms, support
        if index is not None:
            local, chosen = local[index], terms.rows(index)
            candidates = None if support is None else support.select(index)
            known = None if known is None else known._replace(cotangents=known.cotangents.rows(index))
        row_bytes = backend.chunk_row_bytes(selected, has_bonus) if candidates is None else sparse.row_bytes(candidates)
        sums, finish, reads_operands, sparsity = gradients.one_pass(
            selected, local, backend, open_chunk, coefficients, row_bytes=row_bytes, needs=needs, options=options,
            main_grad=main_grad,
        )  # fmt: skip

    def all_rows(factor: Tensor, *operands: Tensor) -> gradients.Gradients:
        """The gradients of all rows. operands: the rows of hidden that count and weight, or nothing."""
        again = replace(selected, hidden=operands[0], weight=operands[1]) if operands else None
        d_hidden, d_weight, d_bias = finish(factor, again)
        return None if d_hidden is None else scatter_rows(d_hidden, index, projection.n_rows), d_weight, d_bias

    operands = (selected.hidden, selected.weight) if reads_operands else ()
    return _KnownGradients.apply(sums[0], *inputs, all_rows, operands), sums, sparsity


def _coefficients(terms: PolicyTerms, stats: RowStatistics | TokenStats, wanted: bool) -> Coefficients:
    """The loss of rows with these statistics. wanted: the cotangents too."""
    with torch.enable_grad():
        logp = stats.logp.detach().requires_grad_()
        entropy = None if stats.entropy is None else stats.entropy.detach().requires_grad_(terms.has_entropy_bonus)
        loss, sums = loss_and_sums(terms, logp, entropy)
        leaves = [logp, entropy] if entropy is not None and terms.has_entropy_bonus else [logp]
        return Coefficients(LogitCotangents(*(torch.autograd.grad(loss, leaves) if wanted else [None])), sums)


def _surrogate_terms(terms: PolicyTerms) -> SurrogateTerms | None:
    """The loss as a clipped surrogate for one fused launch; None if it is another loss."""
    c = terms.config
    others = terms.has_entropy_bonus or terms.ref_logp is not None or terms.ratio_penalty is not None
    if c.surrogate != "ppo_clip" or others or terms.token_advantages or terms.old_logp is None:
        return None
    return SurrogateTerms(
        sequence_ids=terms.sequence_ids, old_logp=terms.old_logp,
        scale=terms.scale if terms.importance is None else terms.scale * terms.importance, advantages=terms.advantages,
        rewards=terms.split.values, thresholds=terms.split.thresholds, positive_weight=terms.positive_weight,
        negative_weight=c.negative_weight, clip_low=c.clip_low, clip_high=c.clip_high, dual_clip=c.dual_clip,
        valid=terms.valid,
    )  # fmt: skip


def _autograd(
    projection: Projection, targets: Tensor, terms: PolicyTerms, support: TokenSupport | None, backend: str,
    options: Options, metrics: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, sums) of the autograd schedule. ``entropy_top_p`` does not change the metric."""
    top_p = terms.config.entropy_top_p if terms.has_entropy_bonus else None
    mode = "grad" if terms.has_entropy_bonus and top_p is None else "nograd" if metrics else "none"
    stats = project_stats(projection, targets, entropy=mode, backend=backend, options=options, support=support)
    entropy = stats.entropy if top_p is None else project_nucleus_entropy(projection, terms.valid, top_p, options)
    loss, sums = loss_and_sums(terms, stats.logp, entropy)
    if top_p is not None and stats.entropy is not None:
        sums[SUMS.index("entropy")] = torch.where(terms.valid, stats.entropy, 0.0).sum()
    return loss, sums


def _choose_schedule(schedule: str, config: EAPOConfig, plan: str, has_main: bool, full_entropy: bool) -> str:
    """Resolve "auto": one pass wherever the loss, the plan and the trace allow it. Raise where the
    schedule, the plan and the loss exclude each other."""
    forced = "main_grad" if has_main else "Options(plan='chunks')" if plan == "chunks" else None
    require(not forced or schedule != "autograd", "schedule", f"'one_pass' or 'auto' with {forced}", "'autograd'")
    top_p = config.entropy_top_p
    whole = top_p is not None or full_entropy  # reads more than the log-probs and the entropies of a chunk
    fits = config.scope == "token" and not whole
    if has_main and schedule == "auto" and not (fits or whole):
        return "two_passes"
    if (forced or schedule == "one_pass") and not fits:
        reason = f"a loss of {config.scope} scope ({config.surrogate})" if top_p is None else f"entropy_top_p={top_p}"
        reason = "a support with full_entropy" if full_entropy else reason
        raise EapoError(f"schedule: expected 'autograd' for {reason}, got 'one_pass'")
    auto = fits and plan != "recompute" and not torch.compiler.is_compiling()
    return "one_pass" if forced or schedule == "one_pass" or (schedule == "auto" and auto) else "autograd"


def _metrics(terms: PolicyTerms, sums: Tensor | None, positive_weight: object) -> dict[str, Tensor]:
    """The metrics of the batch and, from sums over tokens, the means over the tokens that count."""
    tokens = terms.tokens
    counts = terms.valid if terms.token_split else terms.lengths
    fraction = counts.logical_and(terms.split.positive()).sum(dtype=torch.float32) / counts.count_nonzero().clamp_min(1)
    metrics = {"eapo/positive_weight": terms.positive_weight, "eapo/positive_fraction": fraction, "tokens": tokens}
    if sums is not None:
        names = {"entropy": "eapo/entropy", "clipped": "clip_fraction", "ratio": "ratio_mean"}
        means = sums.float() / tokens.clamp_min(1)
        metrics |= {names.get(name, name): mean for name, mean in zip(SUMS, means.unbind(), strict=True) if name != "loss"}
    if isinstance(positive_weight, EntropyRatio):  # these are on the controller's device
        ratio, initial = positive_weight.ratio.float(), positive_weight.initial_entropy.float()
        metrics |= {"eapo/entropy_ratio": ratio, "eapo/entropy_init": initial}
    return metrics
