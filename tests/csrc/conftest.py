"""The library that the tests of the headers call."""

from host_library import host

__all__ = ["host"]
