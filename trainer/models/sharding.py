"""Sharding of the policy over several processes with FSDP2: weights, gradients and optimizer state."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .. import ranks

Model = TypeVar("Model", bound=nn.Module)


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
    mixed = MixedPrecisionPolicy() if dtype is torch.float32 else _cast(dtype)
    layers = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    for module in _sharded(root):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo supports sums only


def _cast(dtype: torch.dtype) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


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
