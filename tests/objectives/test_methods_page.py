"""docs/methods.md: its tables are the registry's, its example runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from token_steps import SIZES, compare, group_normalised, make_step, of_policy

from eapo_kernels import METHODS, EapoError

SCRIPT = Path(__file__).parents[2] / "docs" / "methods_table.py"
SPEC = importlib.util.spec_from_file_location("methods_table", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
methods_table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(methods_table)
main = methods_table.main
TEXT = methods_table.PAGE.read_text()


def test_the_page_is_up_to_date() -> None:
    assert main(["--check"]) == 0
    for name in METHODS:
        assert TEXT.count(f"\n| `{name}` |") >= 2


def test_an_old_page_is_found_and_made_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "methods.md"
    page.write_text(TEXT.replace("| `steer` |", "| `stear` |"))
    assert main(["--check"], page) == 1
    assert "methods.md: expected the tables of METHODS" in capsys.readouterr().err
    assert main([], page) == 0
    assert page.read_text() == TEXT
    page.write_text(TEXT.replace(methods_table.BEGIN, ""))
    with pytest.raises(EapoError, match=r"docs/methods.md: expected one '<!-- generated"):
        main(["--check"], page)


def test_a_row_has_as_many_cells_as_its_head() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ")]
    cells = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    assert set(cells[-len(METHODS) :]) == {5}
    assert set(cells[-2 * len(METHODS) - 2 : -len(METHODS) - 2]) == {8}


def test_the_example_runs() -> None:
    """The tenth of each response's tokens above the 0.9-quantile of its entropies is masked."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, object] = {"__name__": "docs_methods"}
    exec(compile(code, "docs/methods.md", "exec", dont_inherit=True), names)
    step = make_step()
    h, keep = step.old["entropy"].float().double(), torch.zeros_like(step.valid)
    for i in range(len(SIZES)):
        own = step.valid & (step.ids == i)
        keep |= own & (h <= h[own].quantile(0.9))
    assert int(keep.sum()) < int(step.valid.sum())
    compare(step, names["method"], of_policy(step, group_normalised(step)[step.ids], keep=keep))
