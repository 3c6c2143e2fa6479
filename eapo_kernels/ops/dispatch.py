"""The table of backends. "auto" takes the first one that is proven for the device and supports the inputs."""

from __future__ import annotations

import functools
import importlib
import logging
from types import MappingProxyType

import torch

from ..errors import BackendUnavailable, require
from . import plans
from .backend import Backend
from .projection import Projection

logger = logging.getLogger("eapo_kernels")

_MODULES = MappingProxyType({"cuda": ".cuda.backend", "triton": ".triton.backend", "torch": ".torch_chunked"})
"""name -> module with a ``BACKEND``, imported at first use, in the order in which "auto" tries them."""

NAMES = ("auto", *_MODULES)

_NEEDS = MappingProxyType(
    {"cuda": "triton and the packages of eapo-kernels[cuda]", "triton": "triton (eapo-kernels[triton])", "torch": "torch"}
)
"""name -> what its module imports."""


def _load(name: str) -> Backend:
    """Import a backend; raises BackendUnavailable when a package it needs is missing."""
    try:
        return importlib.import_module(_MODULES[name], __package__).BACKEND
    except ImportError as error:
        raise BackendUnavailable(f"backend {name!r}: it needs {_NEEDS[name]}: {error}") from error


def resolve(name: str, projection: Projection, schedule: str) -> Backend:
    """The backend for these inputs.

    Raises:
        EapoError: the name is unknown.
        BackendUnavailable: a backend asked for by name cannot run these inputs.
    """
    require(name in NAMES, "backend", f"one of {', '.join(NAMES)}", repr(name))
    if name != "auto":
        backend = _load(name)
        reason = backend.supports(projection)
        if reason is not None:
            raise BackendUnavailable(f"backend {name!r}: {reason}")
        return backend
    device = projection.hidden.device.type
    for candidate in _MODULES:
        if (device, candidate, schedule) in plans.PROVEN:
            backend = _load(candidate)
            if backend.supports(projection) is None:
                _log_choice(device, schedule, candidate)
                return backend
    return _load("torch")


@functools.cache
def _log_choice(device: str, schedule: str, name: str) -> None:
    logger.info("backend for %s (%s schedule): %s", device, schedule, name)


def available_backends(device: str | torch.device = "cpu") -> dict[str, str | None]:
    """Backend name -> None when it can run on the device, else the reason why it cannot."""
    probe = torch.empty(1, 8, device=device, dtype=torch.bfloat16)  # which every backend takes
    answer: dict[str, str | None] = {}
    for name in _MODULES:
        try:
            answer[name] = _load(name).supports(Projection(probe, probe))
        except BackendUnavailable as error:
            answer[name] = str(error)
    return answer
