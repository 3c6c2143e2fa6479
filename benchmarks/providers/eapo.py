"""This package: the op alone, and the loss by each schedule of each backend that can run on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from eapo_kernels import EAPOConfig, available_backends, eapo_loss, token_stats

from ..case import CLIP, POSITIVE_WEIGHT, Case
from . import Provider, Results


def _prepare(backend: str, schedule: str) -> Callable[[Case, str], Callable[[], Results]]:
    def prepare(case: Case, mode: str) -> Callable[[], Results]:
        hidden = case.inputs.hidden.detach().requires_grad_(mode != "fwd")
        weight = case.inputs.weight.detach().requires_grad_(mode == "fwd_bwd")
        leaves = [hidden, weight] if mode == "fwd_bwd" else [hidden]
        config = EAPOConfig(clip_low=CLIP, clip_high=CLIP)

        def run() -> Results:
            if mode == "fwd":
                stats = token_stats(hidden, weight, case.inputs.targets, entropy="nograd", backend=backend)
                assert stats.entropy is not None
                return {"logp": stats.logp, "entropy": stats.entropy}
            out = eapo_loss(
                hidden, weight, case.batch, positive_weight=POSITIVE_WEIGHT, config=config, schedule=schedule, backend=backend
            )
            gradients = torch.autograd.grad(out.loss, leaves)
            return {"loss": out.loss.detach()} | dict(zip(("d_hidden", "d_weight"), gradients, strict=False))

        return run

    return prepare


def _providers() -> list[Provider]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    able = [name for name, reason in available_backends(device).items() if reason is None]
    found = []
    for backend in able:
        found.append(
            Provider(
                f"eapo_{backend}_one_pass",
                "log-prob, entropy, EAPO loss",
                _prepare(backend, "one_pass"),
                ("fwd_bwd", "frozen_head"),
            )
        )
        found.append(Provider(f"eapo_{backend}_autograd", "log-prob, entropy, EAPO loss", _prepare(backend, "autograd")))
    return found


PROVIDERS = _providers()
