"""The op and the EAPO weight in other trainers; docs/integrations.md shows the lines to add.

For any trainer: ``AdvantageWeight`` and ``scale_positive``, ``FusedLMHead``, ``linear_cross_entropy``, all importable from
here. For one framework each: the modules ``hf`` (transformers), ``trl``, ``verl`` and ``liger``.
"""

from importlib.metadata import PackageNotFoundError, version

from ..errors import require
from .cross_entropy import linear_cross_entropy
from .head import FusedLMHead
from .weight import AdvantageWeight, scale_positive

__all__ = ["AdvantageWeight", "FusedLMHead", "linear_cross_entropy", "require_version", "scale_positive"]


def require_version(package: str, allowed: str) -> None:
    """Check the installed version of a framework whose private methods an adapter overrides.

    Args:
        package: name of the distribution.
        allowed: version specifiers, for example ">=1.16,<1.17".

    Raises:
        EapoError: another version is installed, or none.
    """
    from packaging.specifiers import SpecifierSet

    try:
        installed = version(package)
    except PackageNotFoundError:
        installed = "none"
    ok = installed != "none" and SpecifierSet(allowed).contains(installed, prereleases=True)
    require(ok, package, f"version {allowed}", installed)
