"""How much of the package a reader opens to follow one call: limits on the files and lines that it executes."""

from __future__ import annotations

import interpreted  # noqa: F401
import call_path
import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the files of interpreted kernels")


LIMITS = [("eapo_loss, one pass", 20, 3410), ("eapo_loss, autograd", 22, 4070), ("token_stats", 14, 2690)]


@pytest.mark.parametrize(("name", "files", "lines"), LIMITS)
def test_a_call_stays_within_few_files(name: str, files: int, lines: int) -> None:
    path = call_path.trace(call_path.CALLS[name]())
    assert len(path.files) <= files, "\n".join(path.files)
    assert path.lines <= lines
