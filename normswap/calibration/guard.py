"""Whether a calibration brought the model's output nearer the reference's.

Every :data:`EVERY` th batch of a process is run again, at most as many as are in flight: by the reference, and by the
model before and after the values are written. They are fitted too, so that the values do not depend on how the batches
are shared by processes. With fewer batches in every process the outputs of the last pass over the data are compared,
which were computed anyway."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from normswap.calibration import processes
from normswap.calibration.batches import run
from normswap.calibration.run import Session
from normswap.calibration.trial import Agreement
from normswap.graph.observe import eval_mode

EVERY = 8


@dataclass
class Fitting:
    """The batches; some are remembered."""

    batches: Iterable[Any]
    most: int
    held: list[Any] = field(default_factory=list)
    """Those to be run again, of the first pass."""

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.batches):
            turn, place = divmod(index, EVERY)
            if place == EVERY - 1 and len(self.held) <= turn < self.most:
                self.held.append(batch)
            yield batch


class Again:
    """The reference's outputs for batches, and how near a model's are to them."""

    def __init__(self, session: Session, batches: list[Any]) -> None:
        assert session.reference is not None
        self.session, self.batches = session, batches
        self.count = sum(processes.gathered(len(batches)))
        """Of the batches of all processes."""
        self.originals = self._outputs(session.reference)

    def score(self) -> float:
        """R² of the model's outputs as it is now, over all processes."""
        agreement = Agreement()
        for output, original in zip(self._outputs(self.session.model), self.originals, strict=True):
            agreement.add(output, original)
        return agreement.score()

    def _outputs(self, model: nn.Module) -> list[Any]:
        """With several processes, one that fails makes all raise."""
        error: Exception | None = None
        found: list[Any] = []
        try:
            with eval_mode(model):
                found = [run(model, batch, self.session.forward) for batch in self.batches]
        except Exception as raised:
            error = raised
        processes.fail_together(error)
        return found
