"""Python numbers under ``torch.compile``.

A number that reaches an op, or fills a tensor, is a constant of the graph: another value compiles it
again, up to dynamo's limit. As a factor of a tensor it is an input of the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import is_factor


def scalar(value: float, device: torch.device) -> Tensor:
    """0-dim fp32."""
    return torch.ones((), device=device) * value


def temperature_and_scale(
    inv_temperature: float | Tensor, logit_scale: float | None, softcap: float | None, device: torch.device
) -> tuple[float | Tensor, float | None]:
    """The same inverse temperature and logit scale as a tensor, if they are not 1. Under a soft-cap the scale stays
    a number, and so does what is not a positive finite one, for the checks."""
    is_tensor = isinstance(inv_temperature, Tensor)
    if not is_tensor and not is_factor(inv_temperature):
        return inv_temperature, logit_scale
    if softcap is None and logit_scale is not None and is_factor(logit_scale):
        inv_temperature, logit_scale = inv_temperature * logit_scale, None
    if not isinstance(inv_temperature, Tensor) and inv_temperature != 1:
        inv_temperature = scalar(inv_temperature, device)
    return inv_temperature, logit_scale
