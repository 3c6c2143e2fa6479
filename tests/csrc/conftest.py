"""The library of the kernels' headers. Triton's ``finalize``, which completes their sums, is
interpreted.
"""

from __future__ import annotations

import interpreted  # noqa: F401
from host_library import host

__all__ = ["host"]
