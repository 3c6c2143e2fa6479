"""QuACK's linear cross-entropy: chunked (scaled-exp on Hopper), its base path, and unchunked per
token."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..case import Case, Results
from . import WITH_GRADIENTS, Provider, around, around_mean, needs, require_dtype

_MODULE, _ALIGN = "quack.linear_cross_entropy", 8


def _check(case: Case) -> None:
    require_dtype(case, "quack", torch.bfloat16, torch.float16)
    for name, size in case.shape().items():
        if isinstance(size, int) and size % _ALIGN:
            raise ValueError(f"quack: expected {name} a multiple of {_ALIGN}, got {size}")


def _chunked(options: dict) -> Callable[[Case, str], Callable[[], Results]]:
    def prepare(case: Case, mode: str) -> Callable[[], Results]:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        _check(case)
        return around_mean(lambda h, w: chunked_linear_cross_entropy(h, w, case.targets, **options), case, mode)

    return prepare


def _per_token(case: Case, mode: str) -> Callable[[], Results]:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    _check(case)
    return around(lambda h, w: (-linear_cross_entropy_func(h, w, None, case.targets, reduction="none"), None), case, mode)


# Importing quack adds methods and an index syntax to CuTe's tensor classes for the whole process; what CuTe code could already
# say keeps its meaning, so Liger's CuTe kernels beside it compile to the same.
_on_gpu = needs("quack-kernels", _MODULE, cuda=True, install="pip install 'quack-kernels[cu13]==0.6.5'")
_MEAN = "mean cross-entropy"

PROVIDERS = [
    Provider(
        "quack",
        _MEAN,
        _chunked({}),
        WITH_GRADIENTS,
        "cross_entropy",
        _on_gpu,
        "defaults: 4096-token chunks, tuned GEMMs, the scaled-exp path where it can (Hopper, bfloat16, V a multiple of 128)",
    ),
    Provider(
        "quack_base",
        _MEAN,
        _chunked({"use_scaled_exp": False}),
        WITH_GRADIENTS,
        "cross_entropy",
        _on_gpu,
        "use_scaled_exp False; else defaults",
    ),
    Provider(
        "quack_per_token",
        "log-prob, policy loss; no entropy",
        _per_token,
        unavailable=_on_gpu,
        settings="linear_cross_entropy_func with reduction none, as its module without chunk_size runs: logits are stored",
    ),
]
