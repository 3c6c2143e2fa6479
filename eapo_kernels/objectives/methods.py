"""All methods by name, and how to change their numbers."""

from __future__ import annotations

from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from ..errors import require
from . import plain
from .config import EAPOConfig
from .controllers import controller_fields
from .method import Method, make_controller
from .shaping import bands, controlled, covariance, dynamics, nucleus, position, replay, sequence, steer, target, teacher, turns

__all__ = ["METHODS", "Method", "get_method", "make_controller"]

_FAMILIES = (plain, covariance, steer, dynamics, nucleus, target, sequence, turns, bands, controlled, replay, position, teacher)

METHODS: MappingProxyType[str, Method] = MappingProxyType({m.name: m for family in _FAMILIES for m in family.METHODS})


def get_method(method: str | Method, **changes: Any) -> Method:
    """A method by name or itself, with numbers changed: of its config, its token_weighting, its controller, or ``positive_weight``.

    Raises:
        EapoError: the name or a number's name is unknown, or a value is out of range.
    """
    if isinstance(method, str):
        require(method in METHODS, "method", f"one of {', '.join(METHODS)}", repr(method))
        method = METHODS[method]
    require(isinstance(method, Method), "method", "a name or a Method", method)
    if not changes:
        return method
    parts = {
        "method": ("positive_weight",),
        "token_weighting": () if method.token_weighting is None else tuple(f.name for f in fields(method.token_weighting)),
        "controller": () if method.controller is None else controller_fields(method.controller),
        "config": tuple(f.name for f in fields(EAPOConfig)),
    }
    known = [name for names in parts.values() for name in names]
    unknown = sorted(set(changes) - set(known))
    require(not unknown, "config", f"fields among {', '.join(known)}", ", ".join(unknown))
    own = {part: {name: changes.pop(name) for name in names if name in changes} for part, names in parts.items()}
    if own["method"]:
        method = replace(method, **own["method"])
    if own["token_weighting"] and method.token_weighting is not None:
        method = replace(method, token_weighting=replace(method.token_weighting, **own["token_weighting"]))
    if own["controller"]:
        method = replace(method, controller_settings={**method.controller_settings, **own["controller"]})
        make_controller(method)
    return replace(method, config=replace(method.config, **own["config"])) if own["config"] else method
