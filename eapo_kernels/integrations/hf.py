"""Hugging Face transformers: ``model(..., targets=...)`` returns token statistics, without logits.

    patch_causal_lm(model)
    targets = next_token_targets(ids, response_mask)
    stats = model(input_ids=ids, attention_mask=mask, targets=targets, inv_temperature=1 / t)
    stats.logp, stats.entropy  # [b, L] fp32
    logits = model(input_ids=ids, attention_mask=mask).logits  # as before, bit for bit

Patch the model before FSDP2, DDP or DeepSpeed wraps it, and call the wrapped model: its parameter
gathering then covers the head. Only this one model object changes: its class becomes a subclass
of its own, so that deep copies, pickles and replicas compute with their own weights.
``unpatch_causal_lm`` restores it.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EapoError, ShapeError, describe, require
from ..types import IGNORE_INDEX
from .head import STATISTICS, FusedLMHead, head_statistics
from .own_logits import backbone, causal_lm, compare_logits, fused_linear, logit_transform

_REFUSED = ("labels", "logits_to_keep", "num_logits_to_keep", "output_router_logits")
_PREVIOUS = "eapo_previous_forward"  # attribute of a model: the function that was its own forward


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
        softcap, logit_scale: of the logits; None: learned from the model (``logit_transform``).
        check: compare a few log-probs with the model's own logits. Without weights (meta device,
            ZeRO-3) there are none: False.

    Returns:
        The same model.

    Raises:
        EapoError: already patched; a head that cannot be fused (``fused_linear``,
            ``logit_transform``); a forward on the object that is not a bound method; or the check
            failed.
    """
    base = causal_lm(model)
    install_head(base, softcap=softcap, logit_scale=logit_scale)
    patch_class(base, _WithTargets)
    if check:
        try:
            compare_logits(base, lambda ids: base(input_ids=ids, targets=next_token_targets(ids), entropy="none").logp[:, :-1])
        except EapoError:
            unpatch_causal_lm(model)
            raise
    return model


def unpatch_causal_lm(model: nn.Module) -> nn.Module:
    """Undo ``patch_causal_lm``: the original class and an ``nn.Linear`` with the same parameters.

    Raises:
        EapoError: the model is not patched, or something patched or wrapped it since.
    """
    base = causal_lm(model)
    alone = isinstance(base, _WithTargets) and type(base) is _subclass(_WithTargets, base.eapo_class)
    expected = "one that patch_causal_lm has patched, and nothing else since"
    require(alone and "forward" not in vars(base), "model", expected, "another")
    fused: Any = fused_linear(base.get_output_embeddings())
    _replace(base, fused, fused.to_linear())
    base.__class__ = base.eapo_class
    if _PREVIOUS in vars(base):
        base.forward = types.MethodType(vars(base).pop(_PREVIOUS), base)
    return model


class Patched:
    """First base of a class that ``patch_class`` makes; a subclass of this one has ``eapo_forward``.

    Attributes:
        eapo_class: the class of the model before.
        eapo_mixin: the subclass of this one.
    """

    eapo_class: Any
    eapo_mixin: Any

    def eapo_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``forward`` does."""
        raise NotImplementedError

    def previous_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward before the patch, on this object."""
        return vars(self).get(_PREVIOUS, self.eapo_class.forward)(self, *args, **kwargs)

    def __reduce__(self) -> Any:
        """Deep copies and pickles: the class is made again, with the state of this object."""
        self._require_own_forward()
        return _new, (self.eapo_mixin, self.eapo_class), self.__dict__

    def _replicate_for_data_parallel(self) -> Any:
        self._require_own_forward()
        return super()._replicate_for_data_parallel()  # type: ignore[misc]

    def _require_own_forward(self) -> None:
        """Raise where the replaced forward of the object would compute with this object in a copy of it."""
        cells = getattr(vars(self).get(_PREVIOUS), "__closure__", None) or ()
        held = any(self in (cell.cell_contents, getattr(cell.cell_contents, "__self__", None)) for cell in cells)
        require(not held, "model", "one that can be copied", "one whose replaced forward holds the original in its closure")


class _WithTargets(Patched):
    """A model whose forward has the keywords of ``patch_causal_lm``."""

    def eapo_forward(self, *args: Any, targets: Tensor | None = None, compute: Any = None, **kwargs: Any) -> Any:
        if targets is None and compute is None:
            return self.previous_forward(*args, **kwargs)
        for name in _REFUSED:
            value = kwargs.get(name)
            if isinstance(value, Tensor) or value:
                raise EapoError(f"{name}: expected it not to be given together with targets, got {describe(value)}")
        options = {name: kwargs.pop(name) for name in (*STATISTICS, "process_group") if name in kwargs}
        model: Any = self
        hidden = run_backbone(model, *args, **kwargs).last_hidden_state
        return head_statistics(model.get_output_embeddings(), hidden, targets, compute=compute, **options)


def patch_class(model: Any, mixin: type[Patched]) -> None:
    """Make ``mixin.eapo_forward`` the forward of this one object, through its class.

    A forward on the object would stay bound to it in replicas, and its closure in deep copies.

    Raises:
        EapoError: the object has a forward of its own that is not a method bound to it.
    """
    kind, own = type(model), vars(model).get("forward")
    bound = own is None or (isinstance(own, types.MethodType) and own.__self__ is model)
    expected = "the forward of its class, or a method bound to it (no device_map: patch before accelerate's hooks)"
    require(bound, "model", expected, f"a {type(own).__name__} as forward")
    if own is not None:
        del model.forward
        vars(model)[_PREVIOUS] = own.__func__
    model.__class__ = _subclass(mixin, kind)  # type: ignore[arg-type]


@functools.cache
def _subclass(mixin: Any, kind: Any) -> Any:
    """The patched class, with the name of ``kind``, which transformers writes into checkpoints."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.eapo_forward(*args, **kwargs)

    forward.__doc__ = kind.forward.__doc__
    # generate() and Trainer read the signature. accelerate unwraps __wrapped__, which would undo the patch.
    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    own = {"forward": forward, "eapo_class": kind, "eapo_mixin": mixin, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (mixin, kind), own | {"__qualname__": kind.__qualname__})


def _new(mixin: Any, kind: Any) -> Any:
    """An empty object of the patched class."""
    made = _subclass(mixin, kind)
    return made.__new__(made)


def run_backbone(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the model without its head: an output with ``last_hidden_state`` [b, L, D]."""
    kwargs.setdefault("use_cache", False)
    return backbone(model)(*args, **kwargs)


def install_head(model: Any, *, softcap: float | None = None, logit_scale: float | None = None) -> None:
    """Replace the output head of a transformers model by a ``FusedLMHead`` with its parameters.

    Args:
        softcap, logit_scale: of the logits; None: learned from the model.

    Raises:
        EapoError: already replaced, or a head that cannot be fused (``fused_linear``,
            ``FusedLMHead.from_linear``, ``logit_transform``).
    """
    linear: Any = fused_linear(model.get_output_embeddings())
    require(not isinstance(linear, FusedLMHead), "model", "one that is not patched", "a patched one")
    found = logit_transform(model)
    fused = FusedLMHead.from_linear(
        linear,
        softcap=found.softcap if softcap is None else softcap,
        logit_scale=found.logit_scale if logit_scale is None else logit_scale,
    )
    _replace(model, linear, fused)


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace ``old`` by ``new`` everywhere in the module tree."""
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)
