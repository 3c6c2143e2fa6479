"""What the tests of several backends share."""

from __future__ import annotations

import interpreted  # noqa: F401
import pytest


@pytest.fixture
def narrow_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 operands stay fp16, as on CUDA, where the products take them; a CPU would convert them to fp32."""
    from comparison import keep_fp16

    keep_fp16(monkeypatch)
