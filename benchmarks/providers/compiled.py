"""Unfused PyTorch under torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..case import Case
from ..truth import Results
from . import Provider
from .common import around
from .eager import token_op


def prepare(case: Case, mode: str) -> Callable[[], Results]:
    op, targets = torch.compile(token_op, dynamic=False), case.targets.clamp_min(0)
    return around(lambda hidden, weight: op(hidden, weight, targets), case, mode)


PROVIDERS = [
    Provider(
        "unfused_compile", "log-prob, entropy, policy loss", prepare, settings="dynamic=False; the loss of [N] stays eager"
    )
]
