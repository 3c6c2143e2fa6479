"""Numbers that are steered from step to step. They live in the checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ...checks import require_choice
from ...errors import require
from .controller import Controller
from .entropy_ratio import EntropyRatio
from .feedback import Anchor, EntropyHistory, EntropyTrend, ProportionalIntegral, TargetSwitch

__all__ = ["CONTROLLERS", "Controller", "EntropyRatio", "build_controller", "controller_defaults", "controller_fields"]

CONTROLLERS: MappingProxyType[str, Callable[..., Controller]] = MappingProxyType(
    {
        "entropy_ratio": EntropyRatio,
        "proportional_integral": ProportionalIntegral,
        "entropy_history": EntropyHistory,
        "anchor": Anchor,
        "entropy_trend": EntropyTrend,
        "target_switch": TargetSwitch,
    }
)


def controller_fields(name: str) -> tuple[str, ...]:
    """The names of a controller's settings."""
    return tuple(controller_defaults(name))


def controller_defaults(name: str) -> dict[str, Any]:
    """A controller's settings by name, with their defaults."""
    require_choice("controller", name, CONTROLLERS)
    return {p.name: p.default for p in inspect.signature(CONTROLLERS[name]).parameters.values()}


def build_controller(name: str, settings: Mapping[str, float]) -> Controller:
    """A fresh controller by name.

    Raises:
        EapoError: the name or a setting is unknown, or a number is out of its range.
    """
    fields = controller_fields(name)
    unknown = sorted(set(settings) - set(fields))
    require(not unknown, "controller_settings", f"names among {', '.join(fields)}", ", ".join(unknown))
    return CONTROLLERS[name](**settings)
