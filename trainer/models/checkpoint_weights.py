"""A policy's weights in the checkpoint format of its model family: adapters merged, tied weights
once, names as in the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..errors import ModelError
from .policy import Policy
from .sharding import full_tensor

BASE = ".base_layer.weight"
ADAPTER = re.compile(r"\.lora_[AB]\.[^.]+\.weight$")


def checkpoint_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight). W + scale * B A is computed in fp32 when its turn comes. Sharded weights
    are merged in shards and gathered one by one; all ranks iterate together.

    A family whose checkpoint names or layout differ from its module's (experts stacked in memory,
    separate on disk) is converted all at once, which needs memory for a second copy.

    Raises:
        ModelError: adapters other than plain LoRA on linear layers.
    """
    pairs = _merged(policy.language_model)
    if getattr(policy.language_model, "_weight_conversions", None):
        yield from revert_weight_conversion(policy.language_model, dict(pairs)).items()
    else:
        yield from pairs


def _merged(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen or ADAPTER.search(name):
            continue
        seen.add(id(value))
        foreign = [part for part in ("lora_", "modules_to_save", "original_module") if part in name]
        if foreign:
            raise ModelError(f"model: expected plain LoRA on linear layers (or none) to merge, got the weight {name}")
        if not name.endswith(BASE):
            yield name.replace(".base_layer.", "."), full_tensor(value.detach())
            continue
        layer = model.get_submodule(name.removesuffix(BASE))
        if not isinstance(layer, LoraLinear):
            raise ModelError(f"model: expected adapters on linear layers, got {type(layer).__name__} at {name}")
        weight = value.detach().float()
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter).detach().float()
        yield name.replace(".base_layer.", "."), full_tensor(weight)
