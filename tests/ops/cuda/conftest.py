"""The kernels' own epilogues, on the host, in the place of the kernels: see ``emulation``."""

from host_library import host

__all__ = ["host"]
