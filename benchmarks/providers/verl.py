"""verl's two fused heads (use_fused_kernels): PyTorch chunks and the Triton kernel."""

from __future__ import annotations

from collections.abc import Callable

from ..case import Case, Results
from . import Provider, around, import_alone, needs

# verl/__init__ imports ray and tensordict and sets an environment variable and the log level; the two modules used here need
# nothing of that, so they are imported alone. The Triton module sets Triton's allocator for device-side descriptors for good.
_TORCH, _TRITON = "verl.utils.experimental.torch_functional", "verl.utils.kernel.linear_cross_entropy"
_TRITON_WIDTH = 128


def _torch(case: Case, mode: str) -> Callable[[], Results]:
    head, targets = import_alone(_TORCH).FusedLinearForPPO(), case.targets.clamp_min(0)[None]

    def op(hidden, weight):
        logp, entropy = head(hidden[None], weight, targets, temperature=1.0)
        return logp[0], entropy[0]

    return around(op, case, mode)


def _triton(case: Case, mode: str) -> Callable[[], Results]:
    if case.d % _TRITON_WIDTH:
        raise ValueError(f"verl_triton: expected D a multiple of {_TRITON_WIDTH}, got {case.d}")
    linear_cross_entropy, targets = import_alone(_TRITON).linear_cross_entropy, case.targets.clamp_min(0)[None]

    def op(hidden, weight):
        return linear_cross_entropy(hidden[None], weight, targets, 1.0, "none")

    return around(op, case, mode)


_JOB = "log-prob, entropy, policy loss"
_ROWS = "one packed sequence; masked tokens keep a target and are masked in the loss, as verl does"

PROVIDERS = [
    Provider("verl_torch", _JOB, _torch, unavailable=needs("verl", _TORCH, load=import_alone), settings=f"defaults; {_ROWS}"),
    Provider(
        "verl_triton",
        _JOB,
        _triton,
        unavailable=needs("verl", _TRITON, "verl.utils.kernel.kernels", cuda=True, load=import_alone),
        settings=f"defaults; {_ROWS}; D a multiple of {_TRITON_WIDTH}",
    ),
]
