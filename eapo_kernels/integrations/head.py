"""``FusedLMHead``: an output head that keeps its parameter and returns token statistics instead of logits; ``PrimeHead``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import FACTORS, EapoError, is_factor, require
from ..ops.token_stats import token_stats
from ..ops.vocab_shard import VocabShard
from ..types import IGNORE_INDEX, Options, TokenStats
from .own_logits import fused_linear, require_same

T = TypeVar("T")

STATISTICS = ("mask", "inv_temperature", "entropy", "second_moments", "backend", "options")
"""Keywords that a call with ``targets`` passes on to ``token_stats``."""


class FusedLMHead(nn.Linear):
    """A linear output head that also answers ``head(hidden, targets=...)`` with ``TokenStats``.

    It is an ``nn.Linear`` with the same parameter under the same name in the state dict. Weight
    tying and adapters keep working, and without ``targets`` it returns the logits of ``nn.Linear``
    bit for bit. The weight is read inside ``forward``, where FSDP2 and DeepSpeed ZeRO-3 have
    gathered it.

    Attributes:
        softcap, logit_scale: what the model applies to the logits after the head (docs/math.md E1).
            They enter the statistics only: returned logits are those of ``nn.Linear``. ``check``
            compares them with a model's logits; ``patch_causal_lm`` learns them from the model.
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
            EapoError: softcap or logit_scale is not a positive finite number.
        """
        for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
            require(
                value is None or is_factor(value),
                name,
                "a positive finite number or None",
                f"{value!r:.99} (bounds: {FACTORS})",
            )
        super().__init__(in_features, out_features, bias, device, dtype)
        self.softcap, self.logit_scale = softcap, logit_scale

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, softcap: float | None = None, logit_scale: float | None = None) -> FusedLMHead:
        """A head that shares the parameters of ``linear`` and can replace it.

        Raises:
            EapoError: not a plain ``nn.Linear``, or it has a replaced forward or hooks, which the
                replacement would lose.
        """
        require(type(linear) is nn.Linear, "head", "a plain nn.Linear", type(linear).__name__)
        shape: dict[str, Any] = {"bias": linear.bias is not None, "device": "meta"}
        head = cls(linear.in_features, linear.out_features, softcap=softcap, logit_scale=logit_scale, **shape)
        return _share_parameters(linear, head)

    @torch.no_grad()
    def check(self, hidden: Tensor, logits: Tensor) -> None:
        """Compare this head's log-probs with those of a model's own logits.

        Args:
            hidden: [..., D], what the head receives; a few positions are enough.
            logits: [..., V], what the model returns for them.

        Raises:
            EapoError: they differ: the model applies another bias, softcap or logit_scale.
        """
        same = logits.shape == (*hidden.shape[:-1], self.out_features)
        require(same, "logits", f"{[*hidden.shape[:-1], self.out_features]}", list(logits.shape))
        for targets in (logits.argmax(-1), logits.argmin(-1)):
            stats = self(hidden, targets, entropy="none")
            require_same("logits", stats.logp, logits, targets)

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` that shares this head's parameters.

        Raises:
            EapoError: as ``from_linear``.
        """
        return _share_parameters(self, nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"))

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
        """Logits; token statistics with ``targets``; the result of ``compute`` if it is given.

        Args:
            hidden: [..., D].
            targets: [...] int64, the token that follows each position; -100 masks a row.
            compute: called as ``compute(hidden, weight, bias=, softcap=, logit_scale=)`` in place
                of ``token_stats``, for example a closure on ``eapo_loss``. With sharded parameters
                it must return tensors, or a tuple or dict of tensors: FSDP2 attaches its backward
                hooks to them. It receives every row, padding and prompts too. On a GPU those rows
                cost nothing only if its batch has a ``mask`` (``Options.compact``).
            weight_delta: [V, D] or None, added to the weight (LoRA).
            process_group: tensor-parallel group over which the rows of the weight are split, as in
                ``token_stats``. The weight is then this rank's rows, or a DTensor ``Shard(0)`` on
                the mesh of the group, which is not gathered. ``compute`` is called with
                ``process_group=`` as well. The group is never inferred: a parameter sharded by
                FSDP2 looks the same.
            arguments: mask, inv_temperature, entropy, second_moments, backend, options, as in
                ``token_stats``.

        Returns:
            [..., V] logits, or TokenStats of [...] fp32, or what ``compute`` returned.

        Raises:
            EapoError: arguments for statistics without ``targets``; a weight that is still sharded
                inside the forward and not over ``process_group``; ``weight_delta`` together with
                ``process_group``.
            ShapeError, BackendUnavailable: as ``token_stats``.
        """
        if targets is None and compute is None:
            require(not arguments and weight_delta is None, "targets", f"int64 [...] with {sorted(arguments)}", None)
            return super().forward(hidden)
        require(targets is None or compute is None, "compute", "None together with targets", compute)
        given: dict[str, Any] = {"softcap": self.softcap, "logit_scale": self.logit_scale}
        if process_group is None:
            weight = _require_gathered("weight", self.weight)
            given["bias"] = None if self.bias is None else _require_gathered("bias", self.bias)
        else:
            require(weight_delta is None, "weight_delta", "None (no LoRA) on a head split over processes", "a tensor")
            hidden, weight, given["bias"], given["process_group"] = _local_head(hidden, self.weight, self.bias, process_group)
        if weight_delta is not None:
            weight = weight + weight_delta
        if compute is not None:
            require(not arguments, "compute", "no further arguments (bind them)", sorted(arguments))
            return compute(hidden, weight, **given)
        assert targets is not None
        unknown = sorted(set(arguments) - set(STATISTICS))
        require(not unknown, "arguments with targets", f"some of {', '.join(STATISTICS)}", unknown)
        options = arguments.get("options")
        require(options is None or isinstance(options, Options), "options", "Options or None", options)
        if isinstance(targets, Tensor):  # masked rows of padding and prompts are compacted away
            given["mask"] = targets != IGNORE_INDEX
        return token_stats(hidden, weight, targets, **given | arguments)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, softcap={self.softcap}, logit_scale={self.logit_scale}"


class MissingArgument(EapoError, AssertionError):
    """prime-rl asserts these arguments: an AssertionError too, for callers that expect one."""


class PrimeHead(FusedLMHead):
    """A ``FusedLMHead`` with the call of prime-rl's FusedOutputLinear and GemmaFusedOutputLinear.

    model.lm_head = PrimeHead(in_features, out_features, chunk_size); model.lm_head.weight = old.weight

    Unlike prime-rl's, the entropy is differentiable.
    """

    def __init__(
        self, in_features: int, out_features: int, chunk_size: int | None = None, softcap: float | None = None, *,
        entropy: str = "grad", backend: str = "auto", options: Options | None = None, **where: Any,
    ) -> None:  # fmt: skip
        """
        Args:
            chunk_size: no effect: ``options.memory_budget`` bounds the memory.
            softcap: of the logits, or None.
            entropy: "grad", or "nograd" for its value only, which lets the forward keep what the
                backward of the log-probs needs (docs/plans.md).
            backend, options: as in ``token_stats``.
            where: device, dtype.
        """
        super().__init__(in_features, out_features, softcap=softcap, **where)
        self._call: dict[str, Any] = {"entropy": entropy, "backend": backend, "options": options}

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, labels: Tensor | None = None, temperature: Tensor | None = None
    ) -> dict[str, Tensor | None]:
        """prime-rl's PrimeLmOutput.

        Args:
            hidden_states: [b, s, D].
            labels: [b, s] int64, the token that each position predicts; -100 masks one.
            temperature: [b, s] float > 0.

        Returns:
            {"logprobs": [b, s] fp32, "entropy": [b, s] fp32}, both in nats, zeros where masked.

        Raises:
            MissingArgument: no labels or no temperature. Others as ``token_stats``.
        """
        for name, value in (("labels", labels), ("temperature", temperature)):
            if value is None:
                raise MissingArgument(f"{name}: expected a tensor [b, s], got None (FusedOutputLinear requires {name})")
        assert temperature is not None
        stats = super().forward(hidden_states, labels, inv_temperature=1.0 / temperature, **self._call)
        assert isinstance(stats, TokenStats)
        return {"logprobs": stats.logp, "entropy": stats.entropy}


def head_statistics(head: nn.Module, hidden: Tensor, targets: Tensor | None, **arguments: Any) -> Any:
    """``FusedLMHead.forward`` of a head that may carry a LoRA adapter; its weight is W + s B A.

    Raises:
        EapoError: the adapter is not plain LoRA, or its dropout is active.
    """
    base = fused_linear(head)
    require(isinstance(base, FusedLMHead), "head", "a FusedLMHead (patch_causal_lm)", type(base).__name__)
    return base(hidden, targets, weight_delta=None if head is base else _lora_delta(head), **arguments)


def _lora_delta(head: Any) -> Tensor | None:
    """[V, D]: sum of s B A over the active adapters, differentiable; None if merged or disabled."""
    if head.disable_adapters or head.merged:
        return None
    deltas = []
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        plain = name not in head.lora_variant and not head.lora_bias[name]
        require(plain, "head", "plain LoRA without bias (no DoRA or other variant)", f"adapter {name!r} with one")
        dropout = head.lora_dropout[name]
        active = isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training
        require(not active, "head", "lora_dropout 0 on the output head in training", getattr(dropout, "p", None))
        deltas.append(head.get_delta_weight(name).to(head.weight.dtype))
    return sum(deltas[1:], deltas[0]) if deltas else None


def _share_parameters(source: nn.Linear, target: Any) -> Any:
    """``target`` with the parameters of ``source``; raise where it would lose a forward or hooks."""
    found = [name for name, value in vars(source).items() if name.endswith("_hooks") and value]
    if "forward" in vars(source):
        found = ["a replaced forward"]
    expected = "a linear layer without own forward or hooks (patch and unpatch before FSDP2 or DeepSpeed wraps the model)"
    require(not found, "head", expected, ", ".join(found))
    target.weight = source.weight
    if source.bias is not None:
        target.bias = source.bias
    return target.train(source.training)


def _require_gathered(name: str, parameter: Tensor) -> Tensor:
    """The parameter; raise if it is a DTensor or an empty ZeRO-3 shard inside the forward."""
    if type(parameter).__name__ == "DTensor":
        raise EapoError(
            f"{name}: expected a full tensor inside the head's forward, got a DTensor {list(parameter.shape)}: call the "
            "model that fully_shard wrapped, not its parts; with a head split over a tensor-parallel group give process_group"
        )
    if parameter.numel() == 0:
        raise EapoError(
            f"{name}: expected a gathered parameter inside the head's forward, got an empty one (ZeRO-3): call the engine, "
            "not the bare model"
        )
    return parameter


def _local_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, process_group: Any
) -> tuple[Tensor, Tensor, Tensor | None, dist.ProcessGroup | VocabShard]:
    """(hidden, weight, bias, group) for ``token_stats``: the full hidden, this rank's rows of the others.

    Raises:
        EapoError: a DTensor that is not split by rows over this group alone.
    """
    if type(weight).__name__ != "DTensor":
        return hidden, weight, bias, process_group
    local = {name: _local_rows(name, t, process_group) for name, t in (("weight", weight), ("bias", bias)) if t is not None}
    if isinstance(process_group, dist.ProcessGroup):
        process_group = VocabShard.chunked(process_group, weight.shape[0])
    if type(hidden).__name__ == "DTensor":
        mesh = hidden.device_mesh  # type: ignore[attr-defined]
        same = mesh == weight.device_mesh  # type: ignore[attr-defined]
        require(same, "hidden", "a plain tensor, or a DTensor on the mesh of the weight", mesh)
        hidden = hidden.full_tensor()  # type: ignore[attr-defined]
    return hidden, local["weight"], local.get("bias"), process_group


def _local_rows(name: str, parameter: Any, process_group: Any) -> Tensor:
    """This rank's rows of a DTensor, differentiable, without communication."""
    group = process_group.group if isinstance(process_group, VocabShard) else getattr(process_group, "group_name", None)
    expected = "a DTensor [Shard(0)] on the one-dimensional mesh of process_group"
    require(type(parameter).__name__ == "DTensor", name, expected, "a plain tensor")
    mesh, placements = parameter.device_mesh, parameter.placements
    fits = mesh.ndim == 1 and placements[0].is_shard(0) and mesh.get_group().group_name == group
    require(fits, name, expected, f"{placements} on {mesh}")
    return parameter.to_local()
