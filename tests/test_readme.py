"""The Python blocks of README and docs/sparse.md run as they stand; methods are counted right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eapo_kernels import METHODS

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], str(README), "exec"), {"__name__": "pasted"})
    assert "eapo/entropy" in capsys.readouterr().out


def test_the_blocks_of_sparse_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A sampling mask whose unchanged policy has a ratio of 1, and a loss with a gradient tolerance."""
    page = README.parent / "docs" / "sparse.md"
    mask, tolerance = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(compile(mask, str(page), "exec"), {"__name__": "pasted"})
    assert float(re.findall(r"tensor\(([\d.]+)\)", capsys.readouterr().out)[0]) == pytest.approx(1, abs=1e-5)
    exec(compile(tolerance, str(page), "exec"), {"__name__": "pasted"})
    assert "sparse/dense_share" in capsys.readouterr().out


def test_methods_are_counted() -> None:
    counts = {
        name: re.findall(r"(\d+) (?:other )?methods", (README.parent / name).read_text())
        for name in ("README.md", "CHANGELOG.md")
    }
    assert counts == {"README.md": [str(len(METHODS) - 1)], "CHANGELOG.md": [str(len(METHODS))]}
