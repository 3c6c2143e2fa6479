"""Which versions of a framework an adapter is written for, checked when the adapter is imported."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from ..errors import EapoError


def require_version(package: str, low: str, below: str) -> None:
    """Raise unless low <= installed version < below.

    Raises:
        EapoError: another version, or none.
    """
    try:
        installed = version(package)
    except PackageNotFoundError:
        raise EapoError(f"{package}: expected {package}>={low},<{below} to be installed, got none") from None
    if not _numbers(low) <= _numbers(installed) < _numbers(below):
        raise EapoError(f"{package}: expected a version >={low},<{below} (its hooks are private), got {installed}")


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version, padded to three."""
    match = re.match(r"\d+(\.\d+)*", text)
    found = tuple(int(n) for n in match.group().split(".")) if match else ()
    return (*found, 0, 0, 0)[:3]
