"""What holds for every test: one thread, and the same random numbers each time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from normswap.norms.condition import NeedsCondition


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ambient_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that were given no style, label or domain take one that is not the first."""
    own = NeedsCondition.condition

    def condition(self: NeedsCondition) -> object:
        if self.given is not None and self.given.lasts:
            return own(self)
        if self.needs == "style":
            return tuple(torch.linspace(low, 2, int(self.num_features)).reshape(1, -1) for low in (-1.0, 0.5))
        return torch.tensor([1])

    monkeypatch.setattr(NeedsCondition, "condition", condition)
