"""Importing this module swaps the op of verl's fused kernels (``verl.install_fused_op``).

verl imports the modules named in VERL_USE_EXTERNAL_MODULES and cannot call a function of them.
"""

from .verl import install_fused_op

install_fused_op()
