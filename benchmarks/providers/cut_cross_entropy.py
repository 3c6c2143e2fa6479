"""Cut cross-entropy: the filtered kernel that users get, the exact one, and its compiled
PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..case import Case, Results
from . import Provider, around, needs, require_dtype


def _prepare(options: dict) -> Callable[[Case, str], Callable[[], Results]]:
    def prepare(case: Case, mode: str) -> Callable[[], Results]:
        from cut_cross_entropy import linear_cross_entropy

        if "impl" not in options:
            require_dtype(case, "cut_cross_entropy", torch.bfloat16, torch.float16)
        return around(lambda h, w: (-linear_cross_entropy(h, w, case.targets, reduction="none", **options), None), case, mode)

    return prepare


_JOB = "log-prob, policy loss; no entropy"
_PACKAGE = "cut-cross-entropy"
_on_gpu = needs(_PACKAGE, "cut_cross_entropy", cuda=True)

PROVIDERS = [
    Provider(
        "cce",
        _JOB,
        _prepare({}),
        unavailable=_on_gpu,
        settings="reduction none; else defaults: tiles whose softmax gradient stays below 2^-12 (bfloat16) are skipped",
    ),
    Provider(
        "cce_exact", _JOB, _prepare({"filter_eps": None}), unavailable=_on_gpu, settings="reduction none, filter_eps None"
    ),
    Provider(
        "cce_torch_compile",
        _JOB,
        _prepare({"impl": "torch_compile"}),
        unavailable=needs(_PACKAGE, "cut_cross_entropy"),
        settings="reduction none, impl torch_compile: logits are stored",
    ),
]
