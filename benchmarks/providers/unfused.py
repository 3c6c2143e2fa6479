"""Unfused PyTorch, eager and compiled: F.linear, log_softmax, entropy, clipped loss, autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import MODES, SPARSE_MODES, Case, Results
from . import Provider, around


def token_op(hidden: Tensor, weight: Tensor, targets: Tensor, removed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(logp, entropy) [N] fp32. targets: [N] >= 0. removed: [N, V] bool, the logits that do not count, or None."""
    z = F.linear(hidden, weight).float()
    log_p = torch.log_softmax(z if removed is None else z.masked_fill(removed, torch.finfo(z.dtype).min), -1)
    logp = log_p.gather(1, targets[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return logp, entropy


def _eager(case: Case, mode: str) -> Callable[[], Results]:
    targets = case.targets.clamp_min(0)
    removed = None
    if case.support is not None:
        removed = torch.ones(case.n, case.v, dtype=torch.bool, device=targets.device).scatter_(1, case.support, False)
    return around(lambda hidden, weight: token_op(hidden, weight, targets, removed), case, mode)


def _compiled(case: Case, mode: str) -> Callable[[], Results]:
    op, targets = torch.compile(token_op, dynamic=False), case.targets.clamp_min(0)
    return around(lambda hidden, weight: op(hidden, weight, targets), case, mode)


_JOB = "log-prob, entropy, policy loss"

PROVIDERS = [
    Provider("unfused_eager", _JOB, _eager, (*MODES, *SPARSE_MODES)),
    Provider("unfused_compile", _JOB, _compiled, settings="dynamic=False; the loss of [N] stays eager"),
]
