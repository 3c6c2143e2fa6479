"""The interpreter of triton 3.6 does not run with numpy 2.4: neither pip nor the tests accept the pair."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import interpreted
import pytest
from packaging.requirements import Requirement


@pytest.mark.parametrize(
    ("triton", "numpy", "refused"), [("3.6.0", "2.4.6", True), ("3.6.0", "2.3.5", False), ("3.7.1", "2.4.6", False)]
)
def test_the_pair_is_refused(triton: str, numpy: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    if refused:
        with pytest.raises(pytest.UsageError, match=r"expected triton >= 3.7 or numpy < 2.4, got triton 3.6.0, numpy 2.4.6"):
            interpreted.refuse_broken_pair()
    else:
        interpreted.refuse_broken_pair()


def test_the_extra_with_the_tests_excludes_it() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    (triton,) = (r for r in map(Requirement, project["optional-dependencies"]["dev"]) if r.name == "triton")
    assert not triton.specifier.contains("3.6.0")
    assert triton.specifier.contains("3.7.1")
