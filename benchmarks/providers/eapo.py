"""This package: the op with a hand-written loss around it, and the EAPO loss by each schedule, for
every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from eapo_kernels import EAPOConfig, available_backends, eapo_loss, token_stats

from ..case import CLIP, POSITIVE_WEIGHT, Case, Results
from . import WITH_GRADIENTS, Provider, around, gradients, leaves

_BACKENDS = ("torch", "triton", "cuda")


def _op(backend: str) -> Callable[[Case, str], Callable[[], Results]]:
    def prepare(case: Case, mode: str) -> Callable[[], Results]:
        def op(hidden, weight):
            stats = token_stats(
                hidden, weight, case.targets, mask=case.batch.mask, entropy="nograd", support=case.batch.support,
                backend=backend, options=case.options,
            )  # fmt: skip
            return stats.logp, stats.entropy

        return around(op, case, mode)

    return prepare


def _loss(backend: str, schedule: str, *, exact: bool = False) -> Callable[[Case, str], Callable[[], Results]]:
    def prepare(case: Case, mode: str) -> Callable[[], Results]:
        options = replace(case.options, gradient_tolerance=None) if exact else case.options
        hidden, weight = leaves(case, mode)
        config = EAPOConfig(clip_low=CLIP, clip_high=CLIP)

        def run() -> Results:
            out = eapo_loss(
                hidden,
                weight,
                case.batch,
                positive_weight=POSITIVE_WEIGHT,
                config=config,
                schedule=schedule,
                backend=backend,
                options=options,
            )
            sparse = {name: value for name, value in out.metrics.items() if name.startswith("sparse/")}
            return gradients(out.loss, hidden, weight) | sparse

        return run

    return prepare


def _unavailable(backend: str) -> Callable[[str], str | None]:
    return lambda device: available_backends(device)[backend]


_LOSS = "EAPO loss with mean entropy; no per-token output"
_MASKED = (*WITH_GRADIENTS, "sampling_mask")

PROVIDERS = [
    provider
    for name in _BACKENDS
    for provider in (
        Provider(f"eapo_{name}_one_pass", _LOSS, _loss(name, "one_pass"), _MASKED,
                 unavailable=_unavailable(name)),
        Provider(f"eapo_{name}_exact", _LOSS, _loss(name, "one_pass", exact=True), ("sparse_gradient",),
                 unavailable=_unavailable(name), settings="without gradient_tolerance"),
        Provider(f"eapo_{name}_autograd", _LOSS, _loss(name, "autograd"), _MASKED, unavailable=_unavailable(name)),
        Provider(f"eapo_{name}_op", "log-prob, entropy, policy loss", _op(name), ("fwd", *_MASKED),
                 unavailable=_unavailable(name)),
    )
]  # fmt: skip
