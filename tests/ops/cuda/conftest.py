"""The kernels' own epilogues, on the host, in the place of the kernels: see ``emulation``."""

from __future__ import annotations

import ctypes

import emulation
import pytest
from host_library import host

from eapo_kernels.ops.cuda import launch, products
from eapo_kernels.ops.projection import Projection

__all__ = ["emulated", "host"]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, host: ctypes.CDLL) -> None:
    """Launches run on the host, as on a device with room for three clusters; the products' operands stay half precision."""
    monkeypatch.setattr(launch.Launch, "__call__", lambda one: emulation.run(one, host))
    monkeypatch.setattr(launch, "slots", lambda device, tile: 3)
    monkeypatch.setattr(products, "slots", lambda device, tile: 3)
    monkeypatch.setattr(Projection, "operand_dtype", property(lambda p: p.hidden.dtype))
