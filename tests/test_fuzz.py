"""Random networks fold without a difference; seeds that once failed stay here."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing import check

FOUND = {
    8: "a norm whose statistics another call reads",
    57: "a root that changes its input in place",
    68: "a norm whose weight is read, chosen by index",
    91: "methods chosen by name, in a forward that cannot be traced",
}


@pytest.mark.parametrize("seed", FOUND)
def test_found(seed: int) -> None:
    check(seed)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31))
def test_folding_changes_nothing(seed: int) -> None:
    check(seed)
