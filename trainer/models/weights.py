"""The weights of a model: sharded over several processes with FSDP2, exchanged with those of a reference
policy, and as the files of its family have them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from .. import ranks
from ..errors import ModelError

Model = TypeVar("Model", bound=nn.Module)
BASE = ".base_layer.weight"
ADAPTER = re.compile(r"\.lora_[AB]\.[^.]+\.weight$")
CHUNK = 1 << 20
"""Weights of a reference that are exchanged at once."""


def skeleton(model: Model) -> Model:
    """A copy of a model with its parameters on the meta device. Buffers keep their values, because
    not all of them are in a state dict (rotary frequencies); tied parameters stay tied.
    """
    hollow = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, hollow)


def fill(model: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a sharded skeleton its weights, one full tensor at a time. weights: its state dict on
    rank 0, nothing on the others.
    """
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def shard(root: nn.Module, model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Shard the layers of ``model`` one by one, then the rest of ``root``, in place.

    Gradients are summed over the ranks, not averaged: losses are divided by counts over all ranks.
    Layers are gathered in ``dtype``, in which autocast would compute anyway. Embedding, final norm
    and head keep fp32, so that the residual stream equals that of one process. The root is gathered
    again for the backward pass, because weights may be exchanged in between.
    """
    mesh = init_device_mesh(device.type, (ranks.size(),))
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mixed = MixedPrecisionPolicy() if dtype is torch.float32 else mixed
    layers = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    for module in _sharded(root):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo supports sums only


def _sharded(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


@contextmanager
def unsharded(root: nn.Module) -> Iterator[None]:
    """Within this context every rank holds all weights, so ranks may run different numbers of
    forward passes.

    It takes the memory of the full model on every rank. All ranks enter and leave it together.
    Without shards it does nothing.
    """
    modules = _sharded(root)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Reference:
    """The reference of a KL penalty: trained weights of an earlier policy. ``follow`` sets them to keep *
    reference + (1 - keep) * policy; keep = 1 leaves them.
    """

    def __init__(self, trained: Sequence[Tensor], keep: float) -> None:
        self.trained, self.keep = trained, keep
        self.weights = [weight.detach().clone() for weight in trained]
        # Allocated before the first exchange, so that being out of memory cannot leave two policies mixed.
        self._buffer = torch.empty(CHUNK, device=trained[0].device)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within this context the policy has the reference's weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the weights in place: FSDP2 gathers from the memory that a sharded parameter is
        a view of.
        """
        for pair in zip(self.weights, self.trained, strict=True):
            for a, b in zip(*(local_tensor(weight).view(-1).split(CHUNK) for weight in pair), strict=True):
                kept = self._buffer[: len(a)].copy_(a)
                a.copy_(b)
                b.copy_(kept)

    @torch.no_grad()
    def follow(self) -> None:
        """Move towards the present policy."""
        if self.keep < 1:
            for weight, trained in zip(self.weights, self.trained, strict=True):
                local_tensor(weight).lerp_(local_tensor(trained), 1 - self.keep)


def write_model(
    directory: Path, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> None:
    """Write a model and its tokenizer in the format of transformers and peft. options: of ``save_pretrained``."""
    model.save_pretrained(directory, **options)
    tokenizer.save_pretrained(directory)
    for file in directory.glob("*.safetensors"):  # written for the owner alone
        file.chmod((directory / "tokenizer_config.json").stat().st_mode)


def checkpoint_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight) as in the files of the model's family: adapters merged, tied weights once.
    W + scale * B A is computed in fp32 when its turn comes. Sharded weights are merged in shards and
    gathered one by one; all ranks iterate together.

    A family whose files differ from its module (experts stacked in memory, separate on disk) is
    converted all at once, which needs memory for a second copy.

    Raises:
        ModelError: adapters other than plain LoRA on linear layers.
    """
    pairs = _merged(model)
    if getattr(model, "_weight_conversions", None):
        yield from revert_weight_conversion(model, dict(pairs)).items()
    else:
        yield from pairs


def _merged(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, weight in model.state_dict().items():
        if name in model.all_tied_weights_keys or ADAPTER.search(name):
            continue
        if any(part in name for part in ("lora_", "modules_to_save", "original_module")):
            raise ModelError(f"model: expected plain LoRA on linear layers (or none) to merge, got the weight {name}")
        if name.endswith(BASE):
            layer = model.get_submodule(name.removesuffix(BASE))
            if not isinstance(layer, LoraLinear):
                raise ModelError(f"model: expected adapters on linear layers, got {type(layer).__name__} at {name}")
            weight = sum((layer.get_delta_weight(a).detach().float() for a in layer.active_adapters), weight.float())
        yield name.replace(".base_layer.", "."), full_tensor(weight)
