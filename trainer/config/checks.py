"""Checks of settings, shared by the sections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from eapo_kernels import EapoError

from ..errors import ConfigError


def check(condition: bool, key: str, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


@contextmanager
def section(name: str) -> Iterator[None]:
    """Prefix the section's name to errors of the library's own checks."""
    try:
        yield
    except EapoError as error:
        raise ConfigError(f"{name}.{error}") from None
