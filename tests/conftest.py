"""Fixtures for every test: the device, and scratch memory that is poisoned so that reading it unwritten shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture
def device() -> str:
    """The GPU where there is one: the same tests are the GPU gate."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty``, ``empty_like`` and ``new_empty`` return NaN (floats) or an absurd number (integers)."""

    def poison(make: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else -(2**30)) if out.numel() else out

        return wrapped

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
