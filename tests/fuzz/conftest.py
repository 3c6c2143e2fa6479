"""Profiles of hypothesis. A failure prints its smallest input and a ``@reproduce_failure(...)`` that replays it anywhere."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Seeds are random: every run of the tests looks at other inputs. Not in CI (.ci/run), which judges a change by its own faults.
settings.register_profile(
    "few", max_examples=30, deadline=None, derandomize="CI" in os.environ, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.register_profile("fuzz", settings.get_profile("few"), max_examples=1000, derandomize=False)
settings.load_profile("few")
