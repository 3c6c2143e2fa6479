"""Hugging Face transformers: ``model(..., targets=...)`` returns token statistics, without the logits.

    patch_causal_lm(model)
    stats = model(input_ids=ids, attention_mask=mask, targets=next_token_targets(ids, response_mask), inv_temperature=1 / t)
    stats.logp, stats.entropy  # [b, L] fp32
    logits = model(input_ids=ids, attention_mask=mask).logits  # as before, bit for bit

Patch before the model is wrapped by FSDP2, DDP or DeepSpeed, and call the wrapped model: what they do to its forward then
covers the head. Nothing is patched but this one model, and ``unpatch_causal_lm`` takes it back.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import describe
from ..errors import EapoError, ShapeError, require
from ..types import IGNORE_INDEX, TokenStats
from .head import FusedLMHead, fused_linear, head_statistics

_MARK = "_eapo_previous_forward"
_NOT_FUSED = ("labels", "logits_to_keep", "num_logits_to_keep", "output_router_logits")


def next_token_targets(input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Targets of a causal model: each position's next token where that token counts, else -100.

    Args:
        input_ids: [b, L] int64.
        mask: [b, L] bool or 0/1, the tokens that count (for example the response's); None: all.

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
    """Give ``model.forward`` the keyword ``targets``; without it the model is what it was.

    The output head becomes a ``FusedLMHead`` with the same parameter. Further keywords beside ``targets``: mask,
    inv_temperature, entropy, second_moments, backend, options as in ``token_stats``; process_group, and ``compute`` instead of
    ``targets``, as in ``FusedLMHead.forward``.

    Args:
        model: a transformers causal language model, or a peft model around one. LoRA on the head works (its weight is then
            composed to [V, D] in every forward).
        softcap, logit_scale: of the logits; None: from the model's config.
        check: compare with the model's own logits on a few tokens, so that a head that does more than this is found now.

    Returns:
        The same model.

    Raises:
        EapoError: patched already, a head that cannot be fused (see ``fused_linear``), or the check failed.
    """
    base = causal_lm(model)
    require(_MARK not in vars(base), "model", "one that is not patched", "a patched one")
    install_head(base, softcap=softcap, logit_scale=logit_scale)
    previous = vars(base).get("forward")
    base.forward = types.MethodType(_fused_forward(type(base), previous), base)
    setattr(base, _MARK, [previous])
    if check:
        try:
            _check(base)
        except EapoError:
            unpatch_causal_lm(model)
            raise
    return model


def unpatch_causal_lm(model: nn.Module) -> nn.Module:
    """Undo ``patch_causal_lm``: the class's forward and a plain ``nn.Linear`` with the same parameters.

    Raises:
        EapoError: the model is not patched, or was patched again or wrapped by something else since.
    """
    base = causal_lm(model)
    require(_MARK in vars(base), "model", "one that patch_causal_lm has patched", "another")
    forward = vars(base).get("forward")
    ours = getattr(forward, "__func__", None)
    require(getattr(ours, "eapo", False), "model.forward", "the one patch_causal_lm put there", "another's")
    fused: Any = fused_linear(base.get_output_embeddings())
    plain = fused.to_linear()
    (previous,) = getattr(base, _MARK)
    del base.forward
    if previous is not None:
        base.forward = previous
    delattr(base, _MARK)
    _replace(base, fused, plain)
    return model


def logit_options(config: Any) -> tuple[float | None, float | None]:
    """(softcap, logit_scale) of a model's logits, from the names that transformers' configs use for them."""
    text = config.get_text_config()
    scales = [getattr(text, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    divisor = getattr(text, "logits_scaling", None)
    scale = next((float(s) for s in scales if s is not None), 1.0 / divisor if divisor else None)
    return getattr(text, "final_logit_softcapping", None), None if scale == 1.0 else scale


def run_backbone(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The model's backbone without head: an output with ``last_hidden_state`` [b, L, D].

    Raises:
        EapoError: the model has no backbone apart from itself.
    """
    backbone = model.base_model
    require(backbone is not model, "model", "a causal language model with a backbone (base_model)", type(model).__name__)
    kwargs.setdefault("use_cache", False)
    return backbone(*args, **kwargs)  # type: ignore[operator]


def _fused_forward(kind: type, previous: Callable[..., Any] | None) -> Callable[..., Any]:
    # The signature stays the class's: generate() and the Trainer look at it.
    @functools.wraps(kind.forward)  # type: ignore[attr-defined]
    def forward(
        self: Any, *args: Any, targets: Tensor | None = None, compute: Callable[..., Any] | None = None, **kwargs: Any
    ) -> Any:
        if targets is None and compute is None:
            return previous(*args, **kwargs) if previous is not None else type(self).forward(self, *args, **kwargs)
        for name in _NOT_FUSED:
            value = kwargs.get(name)
            if isinstance(value, Tensor) or value:
                raise EapoError(f"{name}: expected it not to be given together with targets, got {describe(value)}")
        options = {name: kwargs.pop(name) for name in _STATISTICS if name in kwargs}
        hidden = run_backbone(self, *args, **kwargs).last_hidden_state
        return head_statistics(self.get_output_embeddings(), hidden, targets, compute=compute, **options)

    forward.eapo = True  # type: ignore[attr-defined]
    return forward


_STATISTICS = ("mask", "inv_temperature", "entropy", "second_moments", "backend", "options", "process_group")


def install_head(model: Any, *, softcap: float | None = None, logit_scale: float | None = None) -> None:
    """Put a ``FusedLMHead`` with the same parameter in the place of a transformers model's output head.

    Raises:
        EapoError: a head that cannot be fused (see ``fused_linear`` and ``FusedLMHead.from_linear``).
    """
    linear = fused_linear(model.get_output_embeddings())
    own_softcap, own_scale = logit_options(model.config)
    fused = FusedLMHead.from_linear(
        linear,  # type: ignore[arg-type]
        softcap=own_softcap if softcap is None else softcap,
        logit_scale=own_scale if logit_scale is None else logit_scale,
    )
    _replace(model, linear, fused)


def causal_lm(model: Any) -> Any:
    """The transformers model, out of peft's wrapper if there is one.

    Raises:
        EapoError: it is not a causal language model with an output head.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    ok = isinstance(base, nn.Module) and hasattr(base, "get_output_embeddings") and hasattr(base, "base_model")
    require(ok, "model", "a transformers causal language model, or a peft model around one", type(model).__name__)
    require(
        base.get_output_embeddings() is not None, "model", "a causal language model with an output head", type(base).__name__
    )
    return base


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` where ``old`` is registered, at every place."""
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


@torch.no_grad()
def _check(model: Any) -> None:
    """Compare log-probs with the model's own logits on five tokens."""
    weight: Any = fused_linear(model.get_output_embeddings()).weight
    if weight.is_meta or weight.numel() == 0:
        raise EapoError("model: expected weights to compare logits with (or check=False), got none (meta device or ZeRO-3)")
    vocabulary = int(weight.shape[0])
    ids = torch.arange(1, 6, device=weight.device)[None] % vocabulary
    targets = next_token_targets(ids)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        stats: TokenStats = model(input_ids=ids, targets=targets, entropy="none")
        logits = model(input_ids=ids).logits.float()
    finally:
        for module, mode in training.items():
            module.training = mode
    theirs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    error = (stats.logp[:, :-1] - theirs).abs().max().item()
    bound = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 0.25
    if not error < bound:
        raise EapoError(
            f"{type(model).__name__}: expected log-probs within {bound} of its own logits, got a difference of {error:.3g}: "
            "its head does something that logit_options() does not know; give softcap and logit_scale, or do not fuse it"
        )
