"""Which versions of a framework an adapter is written for: by number where it imports one, else by the method it follows."""

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


def require_hook(derived: type, mixin: type, method: str, framework: str) -> None:
    """Raise unless a base behind ``mixin`` has the method that the mixin follows; without it the weight would never be applied.

    Raises:
        EapoError: no base has it: another version of the framework, or the bases in the other order.
    """
    bases = derived.__mro__
    behind = bases[bases.index(mixin) + 1 :]
    if not any(method in vars(base) for base in behind if base is not object):
        names = [base.__name__ for base in derived.__bases__]
        wanted = f"{mixin.__name__} before a class with {method}() ({framework})"
        raise EapoError(f"{derived.__name__}: expected {wanted}, got {', '.join(names)}")


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version, padded to three."""
    match = re.match(r"\d+(\.\d+)*", text)
    found = tuple(int(n) for n in match.group().split(".")) if match else ()
    return (*found, 0, 0, 0)[:3]
