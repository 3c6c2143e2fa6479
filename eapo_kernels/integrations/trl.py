"""TRL 1.16: GRPOTrainer with the EAPO weight, and this package's op behind TRL's fused-head contract.

    from eapo_kernels.integrations.trl import EAPOTrainer
    trainer = EAPOTrainer(model=..., reward_funcs=..., args=GRPOConfig(...), train_dataset=...)

TRL's losses, clipping, KL, vLLM corrections and logging stay as they are. Where TRL has just
computed the advantages of a generation batch, the positive ones are scaled once by the weight of
that batch (docs/math.md E9, E10). For a trainer derived from GRPOTrainer:
``class Mine(EAPOMixin, TheirTrainer)``.

TRL's batches carry no sampling mask: with top_p, top_k or min_p its losses are over the whole vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import require, require_choice
from ..objectives.controllers import EntropyRatio
from ..ops import logit_sums
from ..ops.lm_head import build_projection, resolve_compaction
from ..ops.token_stats import token_stats
from ..types import DEFAULT_OPTIONS, IGNORE_INDEX, Options, TokenStats
from . import require_version
from .head import head_statistics
from .hf import Patched, install_head, next_token_targets, patch_class, run_backbone
from .own_logits import causal_lm, compare_logits
from .weight import AdvantageWeight

require_version("trl", ">=1.16,<1.17")

from trl import GRPOTrainer  # noqa: E402
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head  # noqa: E402

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
"""TRL 1.16's losses. All are positively homogeneous in the advantage, as the weight requires."""

ENTROPY_FROM = ("rollout", "previous")
HEADS = ("trl", "eapo")
_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes",
    "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


class EAPOMixin:
    """Place it before a GRPOTrainer in the bases of a class.

    Metrics: eapo/entropy, eapo/entropy_init, eapo/entropy_ratio, eapo/positive_weight,
    eapo/positive_fraction. The controller's state is in every checkpoint (``eapo_state.json``).
    Evaluation is neither measured nor weighted.

    Attributes:
        eapo: AdvantageWeight, with the controller.
    """

    eapo: AdvantageWeight

    def __init__(
        self,
        *args: Any,
        controller: EntropyRatio | None = None,
        entropy_from: str = "rollout",
        fused_head: str = "trl",
        op_backend: str = "auto",
        op_options: Options | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            args, kwargs: GRPOTrainer's.
            controller: computes the weight; default ``EntropyRatio()``.
            entropy_from: "rollout" measures H_k on the batch just sampled, under the policy that
                sampled it. This costs nothing where TRL computes old log-probs, else one forward
                without gradient. "previous" takes the entropy of the previous batch's training
                forwards: no extra forward, one batch late.
            fused_head: "trl" keeps TRL's head, "eapo" puts this package's op behind its contract.
            op_backend, op_options: for "eapo", as in ``token_stats``.

        Raises:
            EapoError: an unknown choice, a loss that is not homogeneous in the advantage, or a
                combination that is not supported.
        """
        require_choice("entropy_from", entropy_from, ENTROPY_FROM)
        require_choice("fused_head", fused_head, HEADS)
        super().__init__(*args, **kwargs)
        trainer: Any = self
        require_choice("args.loss_type", trainer.loss_type, LOSS_TYPES)
        self.eapo = AdvantageWeight(controller)
        self._entropy_from = entropy_from
        self._recorded: list[Tensor] = []
        self._recorded_model: Any = None
        if fused_head == "eapo":
            require(not trainer.args.cast_lm_head_to_fp32, "fused_head", "'trl' together with cast_lm_head_to_fp32", "'eapo'")
            add_eapo_head(trainer.model, backend=op_backend, options=op_options)
            if trainer.ref_model is not None:
                reference = trainer.accelerator.unwrap_model(trainer.ref_model)
                add_eapo_head(reference, backend=op_backend, options=op_options)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, compute_entropy: bool = False, **kwargs: Any) -> Any:
        """TRL's; while a model is recorded, the entropies of its forwards are kept."""
        record = self._recorded_model is not None and model is self._recorded_model
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
            model, *args, compute_entropy=compute_entropy or record, **kwargs
        )
        if record:
            self._recorded.append(entropies.detach())
        return logps, entropies if compute_entropy else None, aux_loss

    @contextmanager
    def _record_entropies(self, model: Any) -> Iterator[None]:
        """Keep the entropies of this model's forwards in ``_recorded``."""
        self._recorded, self._recorded_model = [], model
        try:
            yield
        finally:
            self._recorded_model = None

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """TRL's rollout and advantages, then the batch's weight on the advantages."""
        trainer: Any = self
        if not trainer.model.training:
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        measure = self._entropy_from == "rollout"
        with self._record_entropies(trainer.model if measure else None):
            output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if measure:
            self.eapo.observe(self._rollout_entropies(output), _loss_mask(output))
        if measure or self.eapo.pending:
            self.eapo.step()
        advantages = output["advantages"]
        output["advantages"] = self.eapo.apply(advantages)
        counts = torch.stack([(advantages > 0).sum(), torch.tensor(advantages.numel(), device=advantages.device)]).double()
        counts = trainer.accelerator.reduce(counts, reduction="sum")
        metrics = {**self.eapo.metrics(), "eapo/positive_fraction": counts[0] / counts[1]}
        for name, value in metrics.items():
            trainer._metrics["train"][name].append(float(value))
        return output

    def _rollout_entropies(self, output: dict[str, Any]) -> Tensor:
        """[B, T]: from TRL's old-policy forward (its first), else from a forward made here."""
        recorded, self._recorded = self._recorded, []
        if "old_per_token_logps" in output:
            return recorded[0]
        trainer: Any = self
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        extras = {name: output[name] for name in _MULTIMODAL if name in output}
        with torch.no_grad():
            _, entropies, _ = super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                trainer.model, ids, attention, output["completion_ids"].size(1),
                batch_size=trainer.args.per_device_train_batch_size, compute_entropy=True, **extras,
            )  # fmt: skip
        return entropies

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        """TRL's loss on the weighted advantages; with "previous" its entropies are observed."""
        trainer: Any = self
        if self._entropy_from != "previous" or not trainer.model.training:
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        with self._record_entropies(model):
            loss = super()._compute_loss(model, inputs)  # type: ignore[misc]
        for entropies in self._recorded:
            self.eapo.observe(entropies, _loss_mask(inputs))
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        trainer: Any = self
        if trainer.args.should_save:
            self.eapo.save(Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}")

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self.eapo.load(checkpoint)


class EAPOTrainer(EAPOMixin, GRPOTrainer):
    """TRL's GRPOTrainer with the EAPO weight; ``EAPOMixin`` describes the additional arguments."""


@dataclass(frozen=True)
class _Head:
    """What a model with this package's head behind TRL's contract computes."""

    inv_temperature: float
    outputs: tuple[str, ...]
    backend: str
    options: Options | None

    def compute(self, targets: Tensor, hidden: Tensor, weight: Tensor, **head: Any) -> tuple[TokenStats, dict[str, Tensor]]:
        """Statistics [b, L] of hidden [b, L, D], and the fields of ``_of_logits``."""
        valid = targets != IGNORE_INDEX
        stats = token_stats(
            hidden, weight, targets, mask=valid, inv_temperature=self.inv_temperature, backend=self.backend,
            options=self.options, entropy="grad" if "entropy" in self.outputs else "none",
            second_moments="log_sum_sq_probs" in self.outputs, **head,
        )  # fmt: skip
        fields = {}
        if "mean_logits" in self.outputs or "is_top1" in self.outputs:
            with torch.no_grad():
                fields = self._of_logits(targets, valid.reshape(-1), hidden, weight, **head)
        return stats, fields

    def _of_logits(self, targets: Tensor, valid: Tensor, hidden: Tensor, weight: Tensor, **head: Any) -> dict[str, Tensor]:
        """mean_logits, the mean over the vocabulary of the logits z (docs/math.md E1), [b, L] fp32, and is_top1, whether
        the target has the largest, [b, L] bool; those of ``outputs``. valid: [b * L]."""
        shape, found = targets.shape, {}
        options = resolve_compaction(self.options or DEFAULT_OPTIONS, targets, True)
        projection = build_projection(
            hidden, weight, head["bias"], self.inv_temperature, head["softcap"], head["logit_scale"], shape
        )
        if "mean_logits" in self.outputs:
            shares = torch.full((projection.vocab,), 1 / projection.vocab, device=weight.device)
            found["mean_logits"] = logit_sums.weighted_logits(projection, shares, valid, options).reshape(shape)
        if "is_top1" in self.outputs:
            largest = logit_sums.largest_logit(projection, valid, options).reshape(shape)
            found["is_top1"] = largest == torch.where(targets == IGNORE_INDEX, -2, targets)
        return found


def add_eapo_head(
    model: Any,
    *,
    temperature: float | None = None,
    outputs: tuple[str, ...] | None = None,
    backend: str = "auto",
    options: Options | None = None,
    check: bool = True,
) -> None:
    """Put this package's op behind the contract of TRL's ``add_fused_lm_head``.

    ``model(..., fused_lm_head=True, labels= | shift_labels=)`` returns TRL's
    ``FusedCausalLMOutput``. Other calls go to the previous forward. LoRA on the head is applied;
    TRL's own head ignores it, and its trainers refuse it.

    Args:
        model: a transformers causal language model, or a peft model around one, not yet wrapped by
            FSDP2, DDP or DeepSpeed. TRL's own head on it, which its trainers add, is replaced.
        temperature: the logits are divided by it. None: that of TRL's head, or 1.
        outputs: per-token fields to fill: log_probs, entropy, log_sum_sq_probs, mean_logits,
            is_top1. None: those of TRL's head, or log_probs and entropy. is_top1, and mean_logits
            of a model with a soft-cap, cost a product with the head each.
        backend, options: as in ``token_stats``.
        check: compare a few log-probs with the model's own logits. Without weights (meta device,
            ZeRO-3) there are none: False.

    Raises:
        EapoError: an unknown field; TRL's head with ``cast_lm_head_to_fp32``; a head that cannot be
            fused (``install_head``), or the check failed.
    """
    base = causal_lm(model)
    previous = _remove_trl_head(base)
    fp32 = previous.get("cast_lm_head_to_fp32", False)
    require(not fp32, "model", "TRL's head without cast_lm_head_to_fp32", "one with it")
    outputs = tuple(previous.get("outputs", ("log_probs", "entropy"))) if outputs is None else outputs
    temperature = previous.get("temperature", 1.0) if temperature is None else temperature
    unknown = sorted(set(outputs) - set(_FIELDS))
    require(not unknown, "outputs", f"some of {', '.join(_FIELDS)}", unknown)
    install_head(base)
    base.eapo_head = _Head(1.0 / temperature, outputs, backend, options)
    patch_class(base, _WithFusedHead)
    if check:
        compare_logits(
            base, lambda ids: base(input_ids=ids, labels=ids, fused_lm_head=True).log_probs, base.eapo_head.inv_temperature
        )


class _WithFusedHead(Patched):
    """A model whose forward keeps the contract of TRL's ``add_fused_lm_head``."""

    eapo_head: _Head

    def eapo_forward(
        self, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return self.previous_forward(*args, **kwargs, **{name: value for name, value in given.items() if value is not None})
        model: Any = self
        text = model.config.get_text_config()
        if getattr(text, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        body = run_backbone(model, *args, **kwargs)
        targets, keep = shift_labels, slice(None)
        if targets is None:
            require(isinstance(labels, Tensor), "labels", "int64 [b, L] with fused_lm_head", labels)
            assert labels is not None
            targets, keep = next_token_targets(labels), slice(None, -1)
        compute = functools.partial(self.eapo_head.compute, targets)
        stats, fields = head_statistics(model.get_output_embeddings(), body.last_hidden_state, None, compute=compute)
        return _output(stats, fields, targets, keep, num_items_in_batch, _router_loss(body, text, kwargs), text)


def _remove_trl_head(model: Any) -> dict[str, Any]:
    """Undo TRL's ``add_fused_lm_head``, whose forward stays bound to this object in deep copies.

    Returns:
        The arguments it was added with; empty without it.
    """
    function: Any = getattr(vars(model).get("forward"), "__func__", None)
    code = getattr(function, "__code__", None)  # the name of the function is that of the model's forward
    if code is None or code not in add_fused_lm_head.__code__.co_consts:
        return {}
    added = inspect.getclosurevars(function).nonlocals
    del model.forward
    original = added["original_forward"]
    if original.__func__ is not type(model).forward:
        model.forward = original
    return dict(added)


def _output(
    stats: TokenStats, fields: dict[str, Tensor], targets: Tensor, keep: slice, items: Any, aux_loss: Tensor | None, text: Any
) -> FusedCausalLMOutput:
    """TRL's output from [b, L] statistics; ``keep`` drops the last position of shifted labels."""
    mask, logp = targets[:, keep] != IGNORE_INDEX, stats.logp[:, keep]
    loss = -logp.sum() / (mask.sum().clamp(min=1) if items is None else items)
    if aux_loss is not None:
        loss = loss + getattr(text, "router_aux_loss_coef", 0.0) * aux_loss
    squares = None if stats.p2 is None else torch.where(mask, stats.p2[:, keep].clamp_min(1e-38).log(), 0.0)
    return FusedCausalLMOutput(
        loss=loss, log_probs=logp, entropy=None if stats.entropy is None else stats.entropy[:, keep], log_sum_sq_probs=squares,
        label_mask=mask, aux_loss=aux_loss, **{name: field[:, keep] for name, field in fields.items()},
    )  # fmt: skip


def _router_loss(body: Any, text: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The load-balancing loss of a mixture of experts, if the call asks for router logits."""
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(
        body.router_logits, text.num_experts, text.num_experts_per_tok, kwargs.get("attention_mask")
    )


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    """[B, T], the tokens that TRL's loss counts."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
