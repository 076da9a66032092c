"""Random inputs for input checks; SMOLDS_FUZZ_CASES is the number per check, by default 200."""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def cases() -> settings:
    number = int(os.environ.get("SMOLDS_FUZZ_CASES", "200"))
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=number, derandomize=True, database=None, deadline=None, suppress_health_check=slow)


ODD = st.sampled_from(
    [None, True, -5, 0, 10**7, 10**18, 10**400, 1e300, float("nan"), float("inf"), "", "../..", "\x1b[31m", "\ud800", [], {}]
)  # fmt: skip
VALUES = ODD | st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, values: dict) -> object:
    """Generate `values` with one or two fields, at any depth, replaced or removed; sometimes another value."""
    if draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    copy = _deep_copy(values)
    for _ in range(draw(st.integers(1, 2))):
        at = copy
        while at:
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if isinstance(at[key], dict | list) and at[key] and draw(st.integers(0, 3)):
                at = at[key]
                continue
            if draw(st.integers(0, 4)) == 0:
                del at[key]
            else:
                at[key] = draw(VALUES)
            break
    return copy


def _deep_copy(values: object) -> object:
    if isinstance(values, dict):
        return {key: _deep_copy(value) for key, value in values.items()}
    return [_deep_copy(value) for value in values] if isinstance(values, list) else values


def flipped(content: bytes) -> st.SearchStrategy[bytes]:
    """Generate `content` with a byte replaced, truncated or duplicated."""
    places = st.integers(0, max(0, len(content) - 1))
    return st.builds(lambda at, new: content[:at] + new + content[at + 1 :], places, st.binary(max_size=2))
