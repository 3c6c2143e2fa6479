"""Imported by name only, as the request to use this package's op: VERL_USE_EXTERNAL_MODULES is what reaches verl's workers."""

from .verl import install_fused_op

install_fused_op()
