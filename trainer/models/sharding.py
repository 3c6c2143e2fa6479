"""The policy over several processes: FSDP2, each rank keeping its share of every weight, gradient and optimizer state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .. import ranks


def shard(root: nn.Module, model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Shard the layers of ``model`` one by one and what is left of ``root``, in place.

    Gradients are added up over the ranks, not averaged: losses are divided by counts over all of them. Layers are gathered in
    ``dtype``, in which autocast would compute anyway; embedding, final norm and head stay as they are, so that the residual
    stream is what it is on one process. The root is gathered anew for the backward pass: a copy that stayed would miss weights
    that are changed in between.
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
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other; the factor is 1 anyway


def _cast(dtype: torch.dtype) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _sharded(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


@contextmanager
def unsharded(root: nn.Module) -> Iterator[None]:
    """Within it every rank has all weights, so that ranks may call parts of the model as often as each of them likes.

    This takes the memory of the whole model on every rank. All ranks enter and leave it; without shards it does nothing.
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


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; all ranks ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded, not copied."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
