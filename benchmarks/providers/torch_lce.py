"""F.linear_cross_entropy of PyTorch: unfused by default, in chunks of tokens when asked."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..case import Case, Results
from . import WITH_GRADIENTS, Provider, around, around_mean


def _unavailable(device: str) -> str | None:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no torch.nn.LinearCrossEntropyOptions: torch 2.13 has"


def _options(chunked: bool) -> object:
    return torch.nn.LinearCrossEntropyOptions() if chunked else None


def _per_token(chunked: bool) -> Callable[[Case, str], Callable[[], Results]]:
    def prepare(case: Case, mode: str) -> Callable[[], Results]:
        options = _options(chunked)

        def op(hidden, weight):
            return -F.linear_cross_entropy(hidden, weight, case.targets, reduction="none", options=options), None

        return around(op, case, mode)

    return prepare


def _mean(case: Case, mode: str) -> Callable[[], Results]:
    options = _options(True)
    return around_mean(lambda h, w: F.linear_cross_entropy(h, w, case.targets, options=options), case, mode)


_JOB = "log-prob, policy loss; no entropy"

PROVIDERS = [
    Provider(
        "torch_lce", _JOB, _per_token(False), unavailable=_unavailable, settings="reduction none; else defaults: no chunks"
    ),
    Provider(
        "torch_lce_chunked",
        _JOB,
        _per_token(True),
        unavailable=_unavailable,
        settings="LinearCrossEntropyOptions() turns chunks on; reduction none computes the logits again in backward",
    ),
    Provider(
        "torch_lce_chunked_mean",
        "mean cross-entropy",
        _mean,
        WITH_GRADIENTS,
        "cross_entropy",
        _unavailable,
        "LinearCrossEntropyOptions() turns chunks on; gradients are taken in forward",
    ),
]
