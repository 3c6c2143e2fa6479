"""Errors a caller can catch. Every message says what was expected and what was given."""

from __future__ import annotations


class EapoError(ValueError):
    """Base of all errors raised on bad input or an impossible request."""


class ShapeError(EapoError):
    """A tensor has the wrong shape, dtype or device."""


class BackendUnavailable(EapoError):
    """The backend (or plan) asked for by name cannot run these inputs; the message says why."""


def require(condition: bool, name: str, expected: object, got: object, error: type[EapoError] = EapoError) -> None:
    """Raise ``error`` as ``name: expected ..., got ...`` unless ``condition`` holds."""
    if not condition:
        raise error(f"{name}: expected {expected}, got {got}")
