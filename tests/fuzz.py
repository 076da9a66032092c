"""Settings of tests with random input."""

import os

from hypothesis import HealthCheck, settings


def cases(normal: int = 200, long: int = 20_000) -> settings:
    """Return settings for the same `normal` cases each time, or the number in SMOLDS_FUZZ_CASES; `long` if that is "long"."""
    asked = os.environ.get("SMOLDS_FUZZ_CASES", str(normal))
    return settings(
        max_examples=long if asked == "long" else int(asked),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
