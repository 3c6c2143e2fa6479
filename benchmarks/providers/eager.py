"""Unfused PyTorch: F.linear, log_softmax, entropy, clipped loss, autograd. What everybody writes first."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..case import CLIP, Case
from . import Provider, Results


def prepare(case: Case, mode: str) -> Callable[[], Results]:
    hidden = case.inputs.hidden.detach().requires_grad_(mode != "fwd")
    weight = case.inputs.weight.detach().requires_grad_(mode == "fwd_bwd")
    old_logp = case.batch.old_logp
    leaves = [hidden, weight] if mode == "fwd_bwd" else [hidden]

    def run() -> Results:
        log_p = torch.log_softmax(F.linear(hidden, weight).float(), -1)
        logp = log_p.gather(1, case.inputs.targets[:, None])[:, 0]
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
        results = {"logp": logp.detach(), "entropy": entropy}
        if mode == "fwd":
            return results
        ratio = (logp - old_logp).exp()
        gain = torch.minimum(ratio * case.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * case.advantages)
        loss = -gain.mean()
        gradients = torch.autograd.grad(loss, leaves)
        return results | {"loss": loss.detach()} | dict(zip(("d_hidden", "d_weight"), gradients, strict=False))

    return run


PROVIDERS = [Provider("unfused_eager", "log-prob, entropy, policy loss", prepare)]
