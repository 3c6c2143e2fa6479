"""Unfused PyTorch: F.linear, log_softmax, entropy, clipped loss, autograd. What everybody writes first."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import Case
from ..truth import Results
from . import Provider
from .common import around


def token_op(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(logp, entropy) [N] fp32. targets: [N] >= 0."""
    log_p = torch.log_softmax(F.linear(hidden, weight).float(), -1)
    logp = log_p.gather(1, targets[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return logp, entropy


def prepare(case: Case, mode: str) -> Callable[[], Results]:
    targets = case.targets.clamp_min(0)
    return around(lambda hidden, weight: token_op(hidden, weight, targets), case, mode)


PROVIDERS = [Provider("unfused_eager", "log-prob, entropy, policy loss", prepare)]
