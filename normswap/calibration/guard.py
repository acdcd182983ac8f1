"""Whether a calibration brought the model's output nearer the reference's.

The first batch of a process and every :data:`EVERY` th after it, at most as many as are in flight, are run again by the
model once the values are written; the outputs of the reference, and of the model before, are kept from the pass over
the data. These batches are fitted too, so that the values do not depend on how the batches are shared by processes.
Of fewer than :data:`EVERY` batches all are run again, as many as are in flight; one would tell little. The outputs of
the last pass over all of them, which were computed anyway, are compared first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from normswap.calibration import processes
from normswap.calibration.agreement import Agreement
from normswap.calibration.batches import run
from normswap.calibration.run import Session
from normswap.graph.observe import eval_mode

EVERY = 8


@dataclass
class Fitting:
    """The batches; some are remembered."""

    batches: Iterable[Any]
    most: int
    held: list[Any]
    """Those to be run again, of the first pass."""
    kept: list[Any]
    """What is kept of ``held``, in their order."""
    begun: bool = False

    def __iter__(self) -> Iterator[Any]:
        first, self.begun = not self.begun, True
        for index, batch in enumerate(self.batches):
            if first:
                self._hold(index, batch)
            yield batch

    def _hold(self, index: int, batch: Any) -> None:
        if index < EVERY - 1:
            wanted = index < self.most
        else:
            if index == EVERY - 1:
                del self.held[1:], self.kept[1:]
            wanted = index % EVERY == 0 and index // EVERY < self.most
        if wanted:
            self.held.append(batch)


class Again:
    """Batches that are run again, with the outputs that the reference gave, and the model before."""

    def __init__(self, session: Session, batches: list[Any]) -> None:
        self.session, self.batches = session, batches
        self.count = sum(processes.gathered(len(batches)))
        """Of the batches of all processes."""

    def before(self) -> float:
        """R² of the outputs that the model gave as it was, over all processes."""
        return _score(self.session.kept)

    def after(self) -> float:
        """R² of those that it gives now."""
        error: Exception | None = None
        outputs: list[tuple[Any, Any]] = []
        try:
            with eval_mode(self.session.model):
                for batch, (original, _) in zip(self.batches, self.session.kept, strict=True):
                    outputs.append((original, run(self.session.model, batch, self.session.forward)))
        except Exception as raised:
            error = raised
        processes.fail_together(error)
        return _score(outputs)


def _score(outputs: Iterable[tuple[Any, Any]]) -> float:
    agreement = Agreement()
    for original, output in outputs:
        agreement.add(output, original)
    return agreement.score()
