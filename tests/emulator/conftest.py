"""The emulator's own tests import triton with the package's launchers."""

from __future__ import annotations

import interpreted  # noqa: F401
