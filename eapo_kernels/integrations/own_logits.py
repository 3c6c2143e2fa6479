"""What a causal language model does to its logits beyond the linear head, learned from the model.

Model families scale and cap logits under different names, some multiply where others divide, and
some scale the hidden states instead. No name is read here. ``logit_transform`` calls the model with its
backbone and its head replaced by known values: what reaches the head and what the model returns
then show the scale and the soft-cap, whatever the weights are and whether there are any.
``compare_logits`` compares the log-probs of a few tokens with the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import EapoError, require

_POWERS = 24  # known head outputs are 0 and +-2^k, k from -24 to 24: a soft-cap of 1e-4 to 1e5 is found
_DIRECT = "a head that receives the backbone's last_hidden_state, or a multiple of it"


class LogitTransform(NamedTuple):
    """z = cap(logit_scale * (hidden @ weight.T + bias)), docs/math.md E1; None: no cap, scale 1."""

    softcap: float | None = None
    logit_scale: float | None = None


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


def backbone(model: Any) -> Any:
    """The part of a transformers model that returns ``last_hidden_state`` [b, L, D]: the model
    without its head.

    Raises:
        EapoError: the model has no such part.
    """
    # base_model is the model itself in Llama 4, whose prefix is that of the model with images.
    for found in (model.base_model, getattr(model, "model", None)):
        if isinstance(found, nn.Module) and found is not model:
            return found
    raise EapoError(f"model: expected a causal language model with a backbone (base_model), got {type(model).__name__}")


def fused_linear(head: Any) -> nn.Linear:
    """The linear layer of a head: the head itself, or the layer that a LoRA layer of peft wraps.

    Raises:
        EapoError: another wrapper (``modules_to_save``, quantisation, another adapter).
    """
    if isinstance(head, nn.Linear):
        return head
    kind = f"{type(head).__module__}.{type(head).__name__}"
    expected = "nn.Linear, or peft's LoRA on one (no modules_to_save, no quantisation)"
    require(kind == "peft.tuners.lora.layer.Linear", "head", expected, kind)
    return head.base_layer


@torch.no_grad()
def logit_transform(model: Any) -> LogitTransform:
    """Learn soft-cap and scale of a model's logits from what it returns. No weight is used.

    Args:
        model: a transformers causal language model, without peft around it (``causal_lm``).

    Raises:
        EapoError: the model does something else to its hidden states or logits.
    """
    linear = fused_linear(model.get_output_embeddings())
    given, received, known, logits = _probe(model, linear)
    scale = _hidden_scale(model, given, received)
    transform = _fit(model, known, logits)
    if scale == 1.0:
        return transform
    expected = "no bias in a head whose hidden states are scaled"
    require(linear.bias is None, type(model).__name__, expected, f"a bias and a factor of {scale:g}")
    return transform._replace(logit_scale=_round(scale * (transform.logit_scale or 1.0)))


@torch.no_grad()
def compare_logits(model: Any, logp_of: Callable[[Tensor], Tensor], inv_temperature: float = 1.0) -> None:
    """Compare the log-probs of five tokens with those of the model's own logits.

    Args:
        model: a transformers causal language model.
        logp_of: from ids [1, L] int64 to log p of each next token, [1, L - 1] (nats).
        inv_temperature: what ``logp_of`` multiplies the model's logits by.

    Raises:
        EapoError: no weights to compare with, or a difference.
    """
    linear = fused_linear(model.get_output_embeddings())
    if linear.weight.is_meta or linear.weight.numel() == 0:
        raise EapoError("model: expected weights to compare logits with (or check=False), got none (meta device or ZeRO-3)")
    ids = _ids(linear)
    with _evaluating(model):
        ours = logp_of(ids)
        logits = model(input_ids=ids, use_cache=False).logits
    require_same(type(model).__name__, ours, logits[:, :-1] * inv_temperature, ids[:, 1:])


def require_same(name: str, logp: Tensor, logits: Tensor, targets: Tensor) -> None:
    """Compare log-probs with a model's own logits.

    Args:
        name: of the model, for the message.
        logp: [...] log p of the targets (nats).
        logits: [..., V] of the model, in its dtype.
        targets: [...] int64.

    Raises:
        EapoError: they differ by more than 1e-3 of the largest log-prob (0.25 nats for half-precision logits).
    """
    expected = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    error = (logp - expected).abs().max().item()
    exact = logits.dtype in (torch.float32, torch.float64)
    bound = 1e-3 * max(1.0, expected.abs().max().item()) if exact else 0.25
    if not error < bound:
        raise EapoError(
            f"{name}: expected log-probs within {bound:.2g} of its own logits, got a difference of {error:.3g}: its head "
            "does not compute cap(logit_scale * (hidden @ weight.T + bias)) with this softcap and logit_scale; do not fuse it"
        )


class _Known:
    """What the replaced backbone returns: ``last_hidden_state``, also as the first element, and None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, key: Any) -> Any:
        return (self.last_hidden_state,)[key] if isinstance(key, slice) or key == 0 else None


def _probe(model: Any, linear: nn.Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call the model with known hidden states for its backbone and known outputs for its head.

    Returns:
        (hidden states given [1, L, D], those that the head received; head outputs given [1, L, V]
        fp64, logits returned).
    """
    device = torch.device("cpu") if linear.weight.is_meta else linear.weight.device
    ids = _ids(linear, device)
    # Eighths of small integers are exact in every dtype.
    hidden = torch.arange(ids.numel() * linear.in_features, device=device).reshape(*ids.shape, -1)
    hidden = ((hidden % 31 - 15) / 8).to(linear.weight.dtype)
    powers = torch.arange(-_POWERS, _POWERS + 1, device=device, dtype=torch.float64).exp2()
    points = torch.cat([powers, -powers, powers.new_zeros(1)])
    outputs = points[torch.arange(ids.numel() * linear.out_features, device=device) % len(points)].reshape(*ids.shape, -1)
    received: list[Tensor] = []
    calls: list[str] = []

    def known_hidden(*_: Any, **__: Any) -> Any:
        calls.append("backbone")
        return _Known(hidden.clone())

    def known_output(x: Tensor, *_: Any, **__: Any) -> Tensor:
        calls.append("head")
        received.append(x)
        return outputs.clone()

    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(_replaced(backbone(model), known_hidden))
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        if isinstance(decoder, nn.Module) and decoder not in (model, backbone(model)):  # OPT calls it directly
            stack.enter_context(_replaced(decoder, known_hidden))
        stack.enter_context(_replaced(model.get_output_embeddings(), known_output))
        try:
            logits = model(input_ids=ids, use_cache=False).logits
        except RuntimeError as error:  # shapes, dtypes or devices of a layer between the two
            raise EapoError(f"{type(model).__name__}: expected {_DIRECT}, got a layer that fails on it: {error}") from error
    expected = f"one call of the backbone, then one of the head, whose output becomes the logits {list(outputs.shape)}"
    fits = calls == ["backbone", "head"] and isinstance(received[0], Tensor) and logits.shape == outputs.shape
    require(fits, type(model).__name__, expected, f"calls of {', '.join(calls)} and logits {list(logits.shape)}")
    return hidden, received[0], outputs, logits


def _hidden_scale(model: Any, given: Tensor, received: Tensor) -> float:
    """a where the head receives a * (the backbone's output)."""
    require(given.shape == received.shape, type(model).__name__, _DIRECT, f"{list(received.shape)} from {list(given.shape)}")
    x, h = received.double(), given.double()
    scale = ((x * h).sum() / (h * h).sum()).item()
    error = (x - scale * h).abs().max().item()
    tolerance = 4 * torch.finfo(received.dtype).eps * abs(scale) * h.abs().max().item()
    fits = scale > 0 and error <= tolerance
    require(fits, type(model).__name__, _DIRECT, f"hidden states off by {error:.3g} from {scale:.3g} times it")
    return _round(scale)


def _fit(model: Any, known: Tensor, logits: Tensor) -> LogitTransform:
    """Soft-cap and scale that turn ``known`` into ``logits``, [1, L, V] each."""
    u, z = known.flatten(), logits.double().flatten()
    top, bottom = 2.0**_POWERS, 2.0**-_POWERS
    largest = z[u == top].mean().item()
    slope = z[u == bottom].mean().item() / bottom
    linear = abs(largest - slope * top) <= 1e-4 * abs(largest)
    scale = _round(largest / top if linear else slope)
    softcap = None if linear else _round(largest)
    fitted = scale * u if softcap is None else softcap * (scale * u / softcap).tanh()
    error = ((z - fitted).abs() / fitted.abs().clamp_min(bottom * abs(scale))).nan_to_num(torch.inf).max().item()
    fits = scale > 0 and (softcap is None or softcap > 0) and error <= 32 * torch.finfo(logits.dtype).eps + 1e-6
    require(fits, type(model).__name__, "logits that are a scaled or soft-capped output of the head, the same in every column",
            f"a relative difference of {error:.3g} from scale {scale:.4g} and softcap {softcap}")  # fmt: skip
    return LogitTransform(softcap, None if scale == 1.0 else scale)


def _round(value: float) -> float:
    """The number of six digits that ``value`` is up to rounding in fp32, if it is one."""
    short = float(f"{value:.6g}")
    return short if abs(short - value) <= torch.finfo(torch.float32).eps * abs(value) else value


def _ids(linear: nn.Linear, device: torch.device | None = None) -> Tensor:
    """[1, 5] int64."""
    return torch.arange(1, 6, device=device or linear.weight.device)[None] % linear.out_features


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, then as before."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module.forward`` replaced, then as before."""
    previous = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if previous is not None:
            module.forward = previous
