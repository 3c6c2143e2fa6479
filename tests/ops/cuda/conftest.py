"""The compiled products on the emulator in the place of a GPU (tests/emulator); Triton's kernels
are interpreted.
"""

from __future__ import annotations

import emulated_cuda
import pytest
from host_library import host

from eapo_kernels.ops.cuda import launch
from eapo_kernels.ops.lm_head import Projection

__all__ = ["emulated", "host"]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run on the CPU as on a device with room for three clusters; the products' operands
    stay half precision.
    """
    monkeypatch.setattr(launch.Launch, "__call__", emulated_cuda.run)
    monkeypatch.setattr(launch, "slots", lambda device, tile: 3)
    monkeypatch.setattr(Projection, "operand_dtype", property(lambda p: p.hidden.dtype))
