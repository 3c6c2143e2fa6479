"""A policy's weights as a checkpoint of its model family has them: adapters merged, tied ones once, names as in the files."""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..errors import ModelError
from .policy import Policy

BASE = ".base_layer.weight"
ADAPTER = re.compile(r"\.lora_[AB]\.[^.]+\.weight$")


def checkpoint_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) one after the other. W + scale * B A is formed when it is its turn, in fp32.

    A family whose files have other names or another layout than its module (experts stacked in memory, one by one on disk) is
    converted at once, which needs the memory of a second copy.

    Raises:
        ModelError: adapters other than plain LoRA on linear layers.
    """
    pairs = merged_weights(policy.language_model)
    if getattr(policy.language_model, "_weight_conversions", None):
        yield from revert_weight_conversion(policy.language_model, dict(pairs)).items()
    else:
        yield from pairs


def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The same under the names that the module has without adapters."""
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen or ADAPTER.search(name):
            continue
        seen.add(id(value))
        foreign = [part for part in ("lora_", "modules_to_save", "original_module") if part in name]
        if foreign:
            raise ModelError(f"model: expected plain LoRA on linear layers (or none) to merge, got the weight {name}")
        if not name.endswith(BASE):
            yield name.replace(".base_layer.", "."), value.detach()
            continue
        layer = model.get_submodule(name.removesuffix(BASE))
        if not isinstance(layer, LoraLinear):
            raise ModelError(f"model: expected adapters on linear layers, got {type(layer).__name__} at {name}")
        weight = value.detach().float()
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter).detach().float()
        yield name.replace(".base_layer.", "."), weight
