"""Random networks fold without a difference; seeds that once failed stay here."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import fuzzing, fuzzing_source

STEPS = {
    8: "a norm whose statistics another call reads",
    57: "a root that changes its input in place",
    68: "a norm whose weight is read, chosen by index",
    200247: "a norm in train mode whose tensors a function reads as fixed ones",
    91: "methods chosen by name, in a forward that cannot be traced",
}
SOURCE = {
    654: "a write in place through a view or a copy, by the memory layout",
    958: "the same behind a transpose",
    3102: "a number computed from parameters while a forward is traced",
    3224: "undo of a function that is called without a bias",
    3344: "the class of a norm whose forward calls the function",
    3450: "a hook on the empty activation behind a norm",
    100968: "a norm called by a method of a child whose own forward cannot be traced, and calls it too",
    201425: "a functional norm in a forward that untraceable code calls with an optional argument",
    20990: "a shape that is not known, taken for one size",
}


@pytest.mark.parametrize("seed", STEPS)
def test_found_by_steps(seed: int) -> None:
    fuzzing.check(seed)


@pytest.mark.parametrize("seed", SOURCE)
def test_found_by_source(seed: int) -> None:
    fuzzing_source.check(seed)


@settings(max_examples=24, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31))
def test_folding_networks_of_steps_changes_nothing(seed: int) -> None:
    fuzzing.check(seed)


@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31))
def test_folding_networks_of_source_changes_nothing(seed: int) -> None:
    fuzzing_source.check(seed)
