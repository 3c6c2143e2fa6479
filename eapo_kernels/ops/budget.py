"""Bytes of logit-sized workspace where the caller names none: what the device's memory suggests. Nothing here synchronises."""

from __future__ import annotations

import functools

import torch

from ..types import Options
from . import plans


def workspace_bytes(wanted: int | None, device: torch.device) -> int:
    """``Options.memory_budget``, or the device's default."""
    if wanted is not None:
        return wanted
    if device.type != "cuda":
        return plans.default_budget(None)
    return plans.default_budget(_total_memory(torch.cuda.current_device() if device.index is None else device.index))


def of_options(options: Options) -> int | None:
    """The budget that the options name, by bytes or by asking for the plan of least memory; None: the device's default."""
    least = options.memory_budget is None and options.plan == "recompute"
    return plans.RECOMPUTE_BUDGET if least else options.memory_budget


@functools.cache
def _total_memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).total_memory
