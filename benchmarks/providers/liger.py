"""Liger-Kernel: fused linear cross-entropy, chunked GRPO loss, scaled cross-entropy with
entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..case import CLIP, N_RESPONSES, Case, Results
from . import WITH_GRADIENTS, Provider, around, around_mean, gradients, leaves, needs, require_dtype

_PACKAGE, _IGNORE = "liger-kernel", -100
_FLCE, _CUTE_FLCE = "liger_kernel.transformers.functional", "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90"
_CUTE_INSTALL = "pip install 'nvidia-cutlass-dsl>=4.6' 'apache-tvm-ffi>=0.1'"
_TUNED = {"accum_dtype": torch.float32, "chunk_mem_const": 16}


def _flce_mean(options: dict) -> Callable[[Case, str], Callable[[], Results]]:
    def prepare(case: Case, mode: str) -> Callable[[], Results]:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as flce

        return around_mean(lambda h, w: flce(h, w, case.targets, **options), case, mode)

    return prepare


def _flce_none(options: dict) -> Callable[[Case, str], Callable[[], Results]]:
    def prepare(case: Case, mode: str) -> Callable[[], Results]:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as flce

        return around(lambda h, w: (-flce(h, w, case.targets, reduction="none", **options), None), case, mode)

    return prepare


def _cute_flce(case: Case, mode: str) -> Callable[[], Results]:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90 as flce

    require_dtype(case, "liger_cute_flce", torch.bfloat16)
    return around_mean(lambda h, w: flce(h, w, case.targets), case, mode)


def _grpo(chunk_size: int) -> Callable[[Case, str], Callable[[], Results]]:
    def prepare(case: Case, mode: str) -> Callable[[], Results]:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        hidden, weight = leaves(case, mode)
        per_response = (N_RESPONSES, case.n // N_RESPONSES)
        targets, mask = case.targets.clamp_min(0).view(per_response), case.valid.long().view(per_response)
        advantages, old_logp = case.advantages.view(per_response)[:, 0], case.old_logp.view(per_response)
        loss_of = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, chunk_size=chunk_size
        )

        def run() -> Results:
            rows = hidden.view(*per_response, case.d)
            loss, _ = loss_of(rows, weight, targets, mask, advantages, old_per_token_logps=old_logp)
            return gradients(loss, hidden, weight)

        return run

    return prepare


def _scaled(case: Case, mode: str) -> Callable[[], Results]:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as ScaledCrossEntropy

    if _scaled_uses_cute(case.hidden.device.type):
        require_dtype(case, "liger_scaled_ce", torch.bfloat16)

    def op(hidden, weight):
        nll, entropy = ScaledCrossEntropy.apply(hidden, weight, case.targets, 1.0, _IGNORE, 1, True)
        return -nll, entropy

    return around(op, case, mode)


def _scaled_uses_cute(device: str) -> bool:
    return device == "cuda" and torch.cuda.get_device_capability() == (9, 0)


def _scaled_unavailable(device: str) -> str | None:
    """Its own dispatch has no way back from the CuTe kernel on Hopper: without that package the
    call itself fails."""
    if _scaled_uses_cute(device):
        return needs(_PACKAGE, "liger_kernel.ops.cutedsl.ops", install=_CUTE_INSTALL)(device)
    return needs(_PACKAGE, "liger_kernel.ops")(device)


_on_gpu = needs(_PACKAGE, _FLCE, cuda=True)
_MEAN, _NONE = "mean cross-entropy", "log-prob, policy loss; no entropy"
_WIDE = "accum_dtype float32, chunk_mem_const 16: 16 times longer chunks"

PROVIDERS = [
    Provider("liger_flce", _MEAN, _flce_mean({}), WITH_GRADIENTS, "cross_entropy", _on_gpu),
    Provider("liger_flce_tuned", _MEAN, _flce_mean(_TUNED), WITH_GRADIENTS, "cross_entropy", _on_gpu, _WIDE),
    Provider("liger_flce_none", _NONE, _flce_none({}), unavailable=_on_gpu, settings="reduction none; else defaults"),
    Provider("liger_flce_none_tuned", _NONE, _flce_none(_TUNED), unavailable=_on_gpu, settings=f"reduction none, {_WIDE}"),
    Provider(
        "liger_cute_flce",
        _MEAN,
        _cute_flce,
        WITH_GRADIENTS,
        "cross_entropy",
        needs(_PACKAGE, _CUTE_FLCE, cuda=True, capability=(9, 0), install=_CUTE_INSTALL),
        "called by name; bfloat16, N a multiple of 128, V of 256",
    ),
    Provider(
        "liger_grpo",
        "GRPO loss; no log-prob, no entropy",
        _grpo(1),
        WITH_GRADIENTS,
        unavailable=needs(_PACKAGE, "liger_kernel.chunked_loss"),
        settings="beta 0, no reference model; else defaults: DAPO mean over tokens, one response per chunk, compiled loss",
    ),
    Provider(
        "liger_grpo_whole",
        "GRPO loss; no log-prob, no entropy",
        _grpo(N_RESPONSES),
        WITH_GRADIENTS,
        unavailable=needs(_PACKAGE, "liger_kernel.chunked_loss"),
        settings="as liger_grpo, all responses in one chunk; tiles of 2048 tokens x 4096 columns still bound the memory",
    ),
    Provider(
        "liger_scaled_ce",
        "log-prob, entropy, policy loss",
        _scaled,
        unavailable=_scaled_unavailable,
        settings="defaults: the CuTe kernel on compute capability 9.0 (bfloat16 only), elsewhere 512-token chunks in PyTorch",
    ),
]
