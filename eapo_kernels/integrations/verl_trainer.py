"""Importing this module registers the ``eapo_*`` trainers with verl (``verl.register_trainers``).

verl imports the modules named in VERL_USE_EXTERNAL_MODULES and cannot call a function of them.
"""

from .verl import register_trainers

register_trainers()
