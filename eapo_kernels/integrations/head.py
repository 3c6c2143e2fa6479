"""An output head that keeps its parameter and hands out token statistics instead of logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import is_number
from ..errors import EapoError, require
from ..ops.token_stats import token_stats
from ..ops.vocab_shard import VocabShard
from ..types import IGNORE_INDEX, Options, TokenStats

T = TypeVar("T")


class FusedLMHead(nn.Linear):
    """A linear output head that also answers ``head(hidden, targets=...)`` with ``TokenStats``.

    It is an ``nn.Linear``: same parameter, same name in the state dict, ties and adapters on it keep working, and without
    ``targets`` it returns the same logits bit for bit. The weight is read inside ``forward``, so whatever gathers a module's
    parameters for its forward and backward (FSDP2, DeepSpeed ZeRO-3) has gathered it.

    Attributes:
        softcap, logit_scale: what the model applies to the logits after the head (docs/math.md E1); used for statistics only,
            the logits are returned as ``nn.Linear`` returns them.
    """

    softcap: float | None
    logit_scale: float | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        softcap: float | None = None,
        logit_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Raises:
            EapoError: soft-cap or scale is not a positive finite number.
        """
        for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
            ok = value is None or (is_number(value) and 0 < value < math.inf)
            require(ok, name, "a positive finite number or None", repr(value))
        super().__init__(in_features, out_features, bias, device, dtype)
        self.softcap, self.logit_scale = softcap, logit_scale

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, softcap: float | None = None, logit_scale: float | None = None) -> FusedLMHead:
        """A head with the *same* parameters as ``linear``, to put in its place.

        Raises:
            EapoError: not a plain ``nn.Linear``, or one whose forward was replaced or that carries hooks, which would be lost.
        """
        require(type(linear) is nn.Linear, "head", "a plain nn.Linear", type(linear).__name__)
        _require_untouched(linear)
        head = cls(
            linear.in_features, linear.out_features, linear.bias is not None, softcap=softcap, logit_scale=logit_scale,
            device="meta",
        )  # fmt: skip
        return _share(linear, head)

    def to_linear(self) -> nn.Linear:
        """The way back: a plain linear layer with the same parameters.

        Raises:
            EapoError: as ``from_linear``.
        """
        _require_untouched(self)
        return _share(self, nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"))

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        compute: Callable[..., T] | None = None,
        weight_delta: Tensor | None = None,
        process_group: dist.ProcessGroup | VocabShard | None = None,
        **arguments: Any,
    ) -> Tensor | TokenStats | T:
        """Logits, or with ``targets`` token statistics, or with ``compute`` whatever it returns.

        Args:
            hidden: [..., D].
            targets: [...] int64, the token that follows each position; -100 leaves a row out.
            compute: called as ``compute(hidden, weight, bias=, softcap=, logit_scale=)`` instead of ``token_stats``: for
                example a closure on ``eapo_loss``. What it returns should be tensors, or a tuple or dict of them, where
                parameters are sharded: the sharding finds its place in the backward through them. Rows of padding and prompts
                come along: on a GPU they cost nothing only where its batch has a ``mask`` (``Options.compact``).
            weight_delta: [V, D] or None, added to the weight (LoRA).
            process_group: the tensor-parallel group over which the weight's rows are split, as in ``token_stats``. The weight
                is this process's rows, or a DTensor ``Shard(0)`` on that group's mesh, which is not gathered; ``compute`` is
                then called with ``process_group=`` as well. It has to be said: what FSDP2 has sharded looks the same.
            arguments: mask, inv_temperature, entropy, second_moments, backend, options, as in ``token_stats``.

        Returns:
            [..., V] logits, or TokenStats of [...] fp32, or ``compute``'s.

        Raises:
            EapoError: arguments for statistics without ``targets``, a weight that is still sharded inside the forward and not
                over ``process_group``, or one that is and a ``weight_delta``.
            ShapeError, BackendUnavailable: as ``token_stats``.
        """
        if targets is None and compute is None:
            require(not arguments and weight_delta is None, "targets", f"int64 [...] with {sorted(arguments)}", None)
            return super().forward(hidden)
        require(targets is None or compute is None, "compute", "None together with targets", compute)
        given: dict[str, Any] = {"softcap": self.softcap, "logit_scale": self.logit_scale}
        if process_group is not None:
            require(weight_delta is None, "weight_delta", "None (no LoRA) on a head split over processes", "one")
            hidden, weight, given["bias"], given["process_group"] = _split(hidden, self.weight, self.bias, process_group)
        else:
            weight = _whole("weight", self.weight)
            given["bias"] = None if self.bias is None else _whole("bias", self.bias)
        if weight_delta is not None:
            weight = weight + weight_delta
        if compute is not None:
            require(not arguments, "compute", "no further arguments (bind them)", sorted(arguments))
            return compute(hidden, weight, **given)
        assert targets is not None
        if isinstance(targets, Tensor):  # models run over padding and prompts: leaving their rows out pays
            given["mask"] = targets != IGNORE_INDEX
        return token_stats(hidden, weight, targets, **given | _checked(arguments))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, softcap={self.softcap}, logit_scale={self.logit_scale}"


def head_statistics(head: nn.Module, hidden: Tensor, targets: Tensor | None, **arguments: Any) -> Any:
    """``FusedLMHead.forward`` of a head that may carry a LoRA adapter (see ``fused_linear``); the weight is W + s B A.

    Raises:
        EapoError: the adapter is not plain LoRA, or its dropout is active.
    """
    base = fused_linear(head)
    require(isinstance(base, FusedLMHead), "head", "a FusedLMHead (patch_causal_lm)", type(base).__name__)
    delta = None if head is base else _lora_delta(head)
    return base(hidden, targets, weight_delta=delta, **arguments)


def fused_linear(head: nn.Module) -> nn.Module:
    """The linear layer inside a head: the head itself, or what a LoRA layer of peft wraps.

    Raises:
        EapoError: the head is another wrapper (``modules_to_save``, quantised, another adapter).
    """
    if isinstance(head, nn.Linear):
        return head
    if type(head).__module__ == "peft.tuners.lora.layer" and type(head).__name__ == "Linear":
        return head.base_layer  # type: ignore[return-value]
    kind = f"{type(head).__module__}.{type(head).__name__}"
    raise EapoError(f"head: expected nn.Linear, or peft's LoRA on one (no modules_to_save, no quantisation), got {kind}")


def _lora_delta(head: Any) -> Tensor | None:
    """[V, D] or None: the sum of the active adapters' s B A, differentiable; nothing when merged or disabled."""
    if head.disable_adapters or head.merged:
        return None
    deltas = []
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        if name in head.lora_variant or head.lora_bias[name]:
            raise EapoError(f"head: expected plain LoRA without bias (no DoRA or other variant), got adapter {name!r} with one")
        dropout = head.lora_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training:
            raise EapoError(f"head: expected lora_dropout 0 on the output head in training, got {dropout.p}")
        deltas.append(head.get_delta_weight(name).to(head.weight.dtype))
    return sum(deltas[1:], deltas[0]) if deltas else None


def _checked(arguments: dict[str, Any]) -> dict[str, Any]:
    known = {"mask", "inv_temperature", "entropy", "second_moments", "backend", "options"}
    unknown = sorted(set(arguments) - known)
    require(not unknown, "arguments with targets", f"some of {sorted(known)}", unknown)
    options = arguments.get("options")
    require(options is None or isinstance(options, Options), "options", "Options or None", options)
    return arguments


def _require_untouched(linear: nn.Linear) -> None:
    """Raise where a forward or hooks of the layer (those of DeepSpeed or FSDP2, for example) would be lost with it."""
    found = [name for name, value in vars(linear).items() if name.endswith("_hooks") and value]
    if "forward" in vars(linear):
        found = ["a replaced forward"]
    if found:
        raise EapoError("head: expected a linear layer without forward or hooks of its own (patch before, and unpatch without, "
                        f"what wraps the model), got {', '.join(found)}")  # fmt: skip


def _share(source: nn.Linear, target: Any) -> Any:
    target.weight = source.weight
    if source.bias is not None:
        target.bias = source.bias
    return target.train(source.training)


def _whole(name: str, parameter: Tensor) -> Tensor:
    """A parameter as this process's whole tensor.

    Raises:
        EapoError: it is a DTensor (its module was not wrapped by what sharded it) or an empty ZeRO-3 shard.
    """
    if type(parameter).__name__ == "DTensor":
        raise EapoError(
            f"{name}: expected a whole tensor inside the head's forward, got a DTensor {list(parameter.shape)}: call the "
            "model that fully_shard wrapped, not its parts; with a head split over a tensor-parallel group give process_group"
        )
    if parameter.numel() == 0:
        raise EapoError(f"{name}: expected a gathered parameter inside the head's forward, got an empty one (ZeRO-3): call "
                        "the engine, not the bare model")  # fmt: skip
    return parameter


def _split(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, process_group: Any
) -> tuple[Tensor, Tensor, Tensor | None, dist.ProcessGroup | VocabShard]:
    """(hidden, weight, bias, group) as ``token_stats`` takes them: whole hidden, this process's rows of the others.

    Raises:
        EapoError: a DTensor that is not split over this group alone, by rows.
    """
    if type(weight).__name__ != "DTensor":
        return hidden, weight, bias, process_group
    local = {name: _local_rows(name, t, process_group) for name, t in (("weight", weight), ("bias", bias)) if t is not None}
    if isinstance(process_group, dist.ProcessGroup):
        process_group = VocabShard.chunked(process_group, weight.shape[0])
    if type(hidden).__name__ == "DTensor":
        same = hidden.device_mesh == weight.device_mesh  # type: ignore[attr-defined]
        require(same, "hidden", "a plain tensor, or a DTensor on the mesh of the weight", hidden.device_mesh)  # type: ignore[attr-defined]
        hidden = hidden.full_tensor()  # type: ignore[attr-defined]
    return hidden, local["weight"], local.get("bias"), process_group


def _local_rows(name: str, parameter: Any, process_group: Any) -> Tensor:
    """This process's rows of a DTensor, differentiable; no communication."""
    wanted = process_group.group if isinstance(process_group, VocabShard) else getattr(process_group, "group_name", None)
    expected = "a DTensor [Shard(0)] on the one-dimensional mesh of process_group"
    require(type(parameter).__name__ == "DTensor", name, expected, "a plain tensor")
    mesh, placements = parameter.device_mesh, parameter.placements
    fits = mesh.ndim == 1 and placements[0].is_shard(0) and mesh.get_group().group_name == wanted
    require(fits, name, expected, f"{placements} on {mesh}")
    return parameter.to_local()
