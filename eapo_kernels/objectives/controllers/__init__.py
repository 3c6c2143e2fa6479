"""Numbers that are steered from step to step. They live in the checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType

from ...checks import require_choice
from ...errors import require
from .controller import Controller
from .entropy_ratio import EntropyRatio
from .feedback import Anchor, EntropyHistory, EntropyTrend, ProportionalIntegral, TargetSwitch

__all__ = ["CONTROLLERS", "Controller", "EntropyRatio", "build_controller", "controller_fields"]

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
    require_choice("controller", name, CONTROLLERS)
    return tuple(inspect.signature(CONTROLLERS[name]).parameters)


def build_controller(name: str, settings: Mapping[str, float]) -> Controller:
    """A fresh controller by name.

    Raises:
        EapoError: the name or a setting is unknown, or a number is out of its range.
    """
    fields = controller_fields(name)
    unknown = sorted(set(settings) - set(fields))
    require(not unknown, "controller_settings", f"names among {', '.join(fields)}", ", ".join(unknown))
    return CONTROLLERS[name](**settings)
