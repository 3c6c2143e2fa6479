"""The implementations that are measured, a file a package, and what these files share.

A provider turns a case and a mode into a function that does the job once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec
from types import ModuleType

import torch
from torch import Tensor

from ..case import Case, Results, policy_loss

_FILES = (
    "bare_gemms",
    "unfused",
    "eapo",
    "torch_lce",
    "liger",
    "trl",
    "verl",
    "cut_cross_entropy",
    "quack",
    "unsloth",
)


WITH_GRADIENTS = ("fwd_bwd", "frozen_head", "half_zero_rows", "sparse_gradient")
"""The modes of providers that yield no log-probs."""

WITHOUT_MASKS = ("fwd", *WITH_GRADIENTS)

INSTALL = "pip install --no-deps --requirement requirements-peers.txt"

_IMPORT_ERRORS = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, OSError, KeyError, AssertionError)
"""What a peer's import raises when its own dependencies are missing or too new."""

TokenOp = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(hidden [N, D], weight [V, D]) -> logp [N], entropy [N] or None."""


def _always(device: str) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One way to do the job.

    Attributes:
        name: ours start with ``eapo``; the floor is ``bare_gemms``.
        job: what it computes, in words.
        prepare: (case, mode) -> function without arguments that does the job once and returns its
            results. The import of a peer and everything that its users do once belongs here,
            outside what is timed. May raise: the reason goes into the row.
        modes: those it can do.
        objective: the loss that its gradients belong to, see ``case.OBJECTIVES``.
        unavailable: device type -> why it cannot run here at all, or None when it can.
        settings: where they differ from what its users get by default, and why; else "defaults".
    """

    name: str
    job: str
    prepare: Callable[[Case, str], Callable[[], Results]]
    modes: tuple[str, ...] = field(default=WITHOUT_MASKS)
    objective: str = "policy"
    unavailable: Callable[[str], str | None] = _always
    settings: str = "defaults"


def load_providers() -> list[Provider]:
    """All providers, the floor first. Importing them imports no peer."""
    return [p for name in _FILES for p in import_module(f"{__name__}.{name}").PROVIDERS]


def chosen(only: list[str] | None, without: list[str]) -> list[Provider]:
    """Those whose names begin with one of ``only`` (None: all) and with none of ``without``."""
    able = [p for p in load_providers() if only is None or p.name.startswith(tuple(only))]
    return [p for p in able if not p.name.startswith(tuple(without))]


def leaves(case: Case, mode: str) -> tuple[Tensor, Tensor]:
    """hidden and weight of the case, requiring the gradients that the mode wants; the storage is
    shared."""
    hidden = case.hidden.detach().requires_grad_(mode != "fwd")
    weight = case.weight.detach().requires_grad_(mode not in ("fwd", "frozen_head"))
    return hidden, weight


def gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> Results:
    """loss, d_hidden and, where the weight requires it, d_weight."""
    wanted = {"d_hidden": hidden} | ({"d_weight": weight} if weight.requires_grad else {})
    return {"loss": loss.detach()} | dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def around(op: TokenOp, case: Case, mode: str) -> Callable[[], Results]:
    """The job of a provider whose op yields log-probs (and entropies): the op, then ``policy_loss``
    in plain PyTorch."""
    hidden, weight = leaves(case, mode)

    def run() -> Results:
        logp, entropy = op(hidden, weight)
        results = {"logp": logp.detach()} | ({} if entropy is None else {"entropy": entropy.detach()})
        return results if mode == "fwd" else results | gradients(policy_loss(case, logp), hidden, weight)

    return run


def around_mean(op: Callable[[Tensor, Tensor], Tensor], case: Case, mode: str) -> Callable[[], Results]:
    """The job of a provider that yields nothing but the mean cross-entropy."""
    hidden, weight = leaves(case, mode)
    return lambda: gradients(op(hidden, weight), hidden, weight)


def require_dtype(case: Case, peer: str, *dtypes: torch.dtype) -> None:
    """Raise where the peer's kernels would refuse the case's dtype."""
    if case.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{peer}: expected {names}, got {case.shape()['dtype']}")


def import_alone(name: str) -> ModuleType:
    """Import a module without running the ``__init__`` of the packages above it, for peers where
    that does more than import.

    Those packages stay in ``sys.modules`` as they are on disk, but empty.
    """
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if parent not in sys.modules:
            spec = find_spec(parent)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {parent!r}", name=parent)
            sys.modules[parent] = module_from_spec(spec)
    return import_module(name)


def needs(
    package: str,
    *modules: str,
    cuda: bool = False,
    capability: tuple[int, int] | None = None,
    install: str = INSTALL,
    load: Callable[[str], ModuleType] = import_module,
) -> Callable[[str], str | None]:
    """An ``unavailable`` for a peer: ``package`` must be installed and ``modules`` must import.

    cuda: it needs a CUDA device; capability: of exactly this compute capability.
    install: the command that installs what is missing.
    """

    def unavailable(device: str) -> str | None:
        if cuda and device != "cuda":
            return f"{package} needs a CUDA device"
        if capability and (found := torch.cuda.get_device_capability()) != capability:
            return "{} needs a GPU of compute capability {}.{}, this one has {}.{}".format(package, *capability, *found)
        if installed(package) == "missing":
            return f"{package} is not installed: {install}"
        for module in modules:
            try:
                load(module)
            except _IMPORT_ERRORS as error:
                why = next(iter(str(error).strip().splitlines()), type(error).__name__)
                return f"{package} is installed but {module} cannot be imported: {why} ({install})"
        return None

    return unavailable


def installed(package: str) -> str:
    """Its version, or "missing"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
