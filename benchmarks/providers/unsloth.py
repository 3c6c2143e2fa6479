"""unsloth_zoo's fused head: log-probs (recomputed, or the gradient in forward when the head is
frozen) and cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

from ..case import Case, Results
from . import WITH_GRADIENTS, Provider, around, around_mean, import_alone, needs

# unsloth_zoo/__init__ refuses to run without the unsloth package; both patch torch, transformers and trl and set variables of
# the allocator and of Triton for the process; the op's own module needs none of that, so it is imported alone.
_MODULE = "unsloth_zoo.fused_losses.fused_linear"


def _logprobs(case: Case, mode: str) -> Callable[[], Results]:
    fused_linear_logprobs = import_alone(_MODULE).fused_linear_logprobs

    def op(hidden, weight):
        return fused_linear_logprobs(
            hidden, weight, case.targets, mask=case.valid, return_entropy=True, entropy_requires_grad=False
        )

    return around(op, case, mode)


def _cross_entropy(case: Case, mode: str) -> Callable[[], Results]:
    cross_entropy = import_alone(_MODULE).fused_linear_cross_entropy
    return around_mean(lambda h, w: cross_entropy(h, w, None, case.targets, divisor=case.n_valid), case, mode)


_unavailable = needs("unsloth-zoo", _MODULE, load=import_alone)

PROVIDERS = [
    Provider(
        "unsloth_logprobs",
        "log-prob, entropy, policy loss",
        _logprobs,
        unavailable=_unavailable,
        settings="entropy without gradient, as its GRPO trainer asks for a metric; without the unsloth package's patches",
    ),
    Provider(
        "unsloth_ce",
        "mean cross-entropy",
        _cross_entropy,
        WITH_GRADIENTS,
        "cross_entropy",
        _unavailable,
        "defaults; without the unsloth package's patches",
    ),
]
