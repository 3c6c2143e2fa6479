"""Hugging Face transformers: ``model(..., targets=...)`` returns token statistics, without logits.

    patch_causal_lm(model)
    targets = next_token_targets(ids, response_mask)
    stats = model(input_ids=ids, attention_mask=mask, targets=targets, inv_temperature=1 / t)
    stats.logp, stats.entropy  # [b, L] fp32
    logits = model(input_ids=ids, attention_mask=mask).logits  # as before, bit for bit

Patch the model before FSDP2, DDP or DeepSpeed wraps it, and call the wrapped model: its parameter
gathering then covers the head. Only this one model object changes; ``unpatch_causal_lm`` restores
it.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EapoError, ShapeError, describe, require
from ..types import IGNORE_INDEX, TokenStats
from .head import STATISTICS, FusedLMHead, fused_linear, head_statistics

_REFUSED = ("labels", "logits_to_keep", "num_logits_to_keep", "output_router_logits")
_PREVIOUS = "eapo_previous_forward"  # attribute of our forward function


def next_token_targets(input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Targets of a causal model: the next token at each position, -100 where that token is masked.

    Args:
        input_ids: [b, L] int64.
        mask: [b, L] bool or 0/1, the tokens that count (for example the response); None: all.

    Returns:
        [b, L] int64; the last position has no next token and is -100.

    Raises:
        ShapeError: the shapes differ.
    """
    if not (isinstance(input_ids, Tensor) and input_ids.dtype == torch.int64 and input_ids.dim() == 2):
        raise ShapeError(f"input_ids: expected int64 [b, L], got {describe(input_ids)}")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == input_ids.shape):
        raise ShapeError(f"mask: expected bool {list(input_ids.shape)}, got {describe(mask)}")
    targets = torch.full_like(input_ids, IGNORE_INDEX)
    following = input_ids[:, 1:]
    targets[:, :-1] = following if mask is None else torch.where(mask[:, 1:].bool(), following, IGNORE_INDEX)
    return targets


def patch_causal_lm(
    model: nn.Module, *, softcap: float | None = None, logit_scale: float | None = None, check: bool = True
) -> nn.Module:
    """Add the keyword ``targets`` to ``model.forward``. Calls without it behave as before.

    The output head becomes a ``FusedLMHead`` with the same parameter. Further keywords beside
    ``targets``: mask, inv_temperature, entropy, second_moments, backend, options as in
    ``token_stats``; process_group, and ``compute`` in place of ``targets``, as in
    ``FusedLMHead.forward``.

    Args:
        model: a transformers causal language model, or a peft model around one. LoRA on the head is
            supported: its weight is composed to [V, D] in every forward.
        softcap, logit_scale: of the logits; None: from the model's config.
        check: compare a few log-probs with the model's own logits, to reject a head that does more
            than softcap and scale.

    Returns:
        The same model.

    Raises:
        EapoError: already patched, a head that cannot be fused (``fused_linear``), or the check
            failed.
    """
    base = causal_lm(model)
    previous = vars(base).get("forward")
    require(not _is_ours(previous), "model", "one that is not patched", "a patched one")
    install_head(base, softcap=softcap, logit_scale=logit_scale)
    kind = type(base)

    # wraps() keeps the signature of the class: generate() and Trainer read it.
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, targets: Tensor | None = None, compute: Any = None, **kwargs: Any) -> Any:
        if targets is None and compute is None:
            return previous(*args, **kwargs) if previous is not None else kind.forward(self, *args, **kwargs)
        for name in _REFUSED:
            value = kwargs.get(name)
            if isinstance(value, Tensor) or value:
                raise EapoError(f"{name}: expected it not to be given together with targets, got {describe(value)}")
        options = {name: kwargs.pop(name) for name in (*STATISTICS, "process_group") if name in kwargs}
        hidden = run_backbone(self, *args, **kwargs).last_hidden_state
        return head_statistics(self.get_output_embeddings(), hidden, targets, compute=compute, **options)

    setattr(forward, _PREVIOUS, previous)
    base.forward = types.MethodType(forward, base)
    if check:
        try:
            _check(base)
        except EapoError:
            unpatch_causal_lm(model)
            raise
    return model


def unpatch_causal_lm(model: nn.Module) -> nn.Module:
    """Undo ``patch_causal_lm``: the original forward and an ``nn.Linear`` with the same parameters.

    Raises:
        EapoError: the model is not patched, or something patched or wrapped it since.
    """
    base = causal_lm(model)
    forward = vars(base).get("forward")
    require(_is_ours(forward), "model", "one that patch_causal_lm has patched, and nothing else since", "another")
    assert forward is not None
    fused: Any = fused_linear(base.get_output_embeddings())
    plain = fused.to_linear()
    del base.forward
    previous = getattr(forward.__func__, _PREVIOUS)
    if previous is not None:
        base.forward = previous
    _replace(base, fused, plain)
    return model


def _is_ours(forward: Any) -> bool:
    return hasattr(getattr(forward, "__func__", None), _PREVIOUS)


def logit_options(config: Any) -> tuple[float | None, float | None]:
    """(softcap, logit_scale) of a model's logits, under the names that transformers' configs use."""
    text = config.get_text_config()
    scales = [getattr(text, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    divisor = getattr(text, "logits_scaling", None)
    scale = next((float(s) for s in scales if s is not None), 1.0 / divisor if divisor else None)
    return getattr(text, "final_logit_softcapping", None), None if scale == 1.0 else scale


def run_backbone(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the model without its head: an output with ``last_hidden_state`` [b, L, D].

    Raises:
        EapoError: the model has no separate backbone.
    """
    backbone = model.base_model
    require(backbone is not model, "model", "a causal language model with a backbone (base_model)", type(model).__name__)
    kwargs.setdefault("use_cache", False)
    return backbone(*args, **kwargs)  # type: ignore[operator]


def install_head(model: Any, *, softcap: float | None = None, logit_scale: float | None = None) -> None:
    """Replace the output head of a transformers model by a ``FusedLMHead`` with its parameters.

    Raises:
        EapoError: a head that cannot be fused (``fused_linear``, ``FusedLMHead.from_linear``).
    """
    linear: Any = fused_linear(model.get_output_embeddings())
    own_softcap, own_scale = logit_options(model.config)
    fused = FusedLMHead.from_linear(
        linear,
        softcap=own_softcap if softcap is None else softcap,
        logit_scale=own_scale if logit_scale is None else logit_scale,
    )
    _replace(model, linear, fused)


def causal_lm(model: Any) -> Any:
    """The transformers model, unwrapped from peft.

    Raises:
        EapoError: not a causal language model with an output head.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    ok = isinstance(base, nn.Module) and hasattr(base, "get_output_embeddings") and hasattr(base, "base_model")
    require(ok, "model", "a transformers causal language model, or a peft model around one", type(model).__name__)
    found = base.get_output_embeddings() is not None
    require(found, "model", "a causal language model with an output head", type(base).__name__)
    return base


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace ``old`` by ``new`` everywhere in the module tree."""
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


@torch.no_grad()
def _check(model: Any) -> None:
    """Compare the log-probs of five tokens with those of the model's own logits."""
    weight: Any = fused_linear(model.get_output_embeddings()).weight
    if weight.is_meta or weight.numel() == 0:
        raise EapoError("model: expected weights to compare logits with (or check=False), got none (meta device or ZeRO-3)")
    ids = torch.arange(1, 6, device=weight.device)[None] % int(weight.shape[0])
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        stats: TokenStats = model(input_ids=ids, targets=next_token_targets(ids), entropy="none")
        logits = model(input_ids=ids).logits.float()
    finally:
        for module, mode in training.items():
            module.training = mode
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    error = (stats.logp[:, :-1] - expected).abs().max().item()
    bound = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 0.25
    if not error < bound:
        raise EapoError(
            f"{type(model).__name__}: expected log-probs within {bound} of its own logits, got a difference of {error:.3g}: "
            "its head applies more than logit_options() finds in the config; give softcap and logit_scale, or do not fuse it"
        )
