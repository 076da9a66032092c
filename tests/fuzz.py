"""Settings of tests with random input."""

import os

from hypothesis import HealthCheck, settings


def cases(normal: int = 200, long: int = 20_000) -> settings:
    """Return settings for `normal` cases, the same each time, or SMOLDS_FUZZ_CASES of them ("long": `long`)."""
    asked = os.environ.get("SMOLDS_FUZZ_CASES", str(normal))
    return settings(
        max_examples=long if asked == "long" else int(asked),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
