"""Profiles of hypothesis. A failure prints its smallest input and a ``@reproduce_failure(...)`` that replays it anywhere."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Seeds are random: every run of the tests looks at other inputs.
settings.register_profile(
    "few", max_examples=30, deadline=None, derandomize=False, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fuzz", settings.get_profile("few"), max_examples=1000)
settings.load_profile("few")
