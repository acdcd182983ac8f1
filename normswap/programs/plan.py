"""The plan of surgery on a ``.pt2`` file: every normalization as a change or as a skip with a reason."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from normswap import archive
from normswap.engine.plan import Change, Plan, Skip
from normswap.errors import NormswapError
from normswap.files import whole_file
from normswap.programs.edit import apply
from normswap.programs.standin import StandIn
from normswap.provenance import RECIPE, TORCH, VERSION, WEIGHTS, extra_files, read_metadata, state_digest
from normswap.version import __version__


@dataclass
class ProgramPlan:
    """What becomes of the normalizations of a ``.pt2`` file. The file is only read; :meth:`apply` writes another."""

    source: Path
    table: Plan
    """The rows, as those of a module."""
    stood: StandIn = field(repr=False)
    _changed: ExportedProgram | None = field(default=None, repr=False)

    @property
    def changes(self) -> list[Change]:
        return self.table.changes

    @property
    def skips(self) -> list[Skip]:
        return self.table.skips

    def changed(self) -> ExportedProgram:
        """The program with the changes made. Raises :class:`NormswapError` where torch does not take it."""
        if self._changed is None:
            self._changed = apply(self.stood, self.table)
        return self._changed

    def apply(self, out: str | os.PathLike[str], *, force: bool = False) -> list[Path]:
        """Write the program with the changes made to the ``.pt2`` file ``out``, whole or not at all; the paths written.

        Raises :class:`NormswapError` for an output that exists (without ``force``), that is the input or cannot be
        written, and for another suffix."""
        path = Path(out)
        if path.suffix != ".pt2":
            raise NormswapError(f"{path}: a program is written as one: name it *.pt2")
        program = self.changed()
        before = read_metadata(self.source)
        recipes = [*_recipes(before.get(RECIPE)), self.table.recipe]
        entries = {VERSION: __version__, TORCH: str(torch.__version__), WEIGHTS: state_digest(program.state_dict)}
        with whole_file(path, force=force, inputs=(self.source,)) as file:
            metadata = {**before, **entries, RECIPE: json.dumps(recipes)}
            archive.save(program, file, metadata, extra_files(self.source))
        return [path]

    def example_inputs(self) -> tuple[Tensor, ...]:
        """The inputs that the file carries, to compare it with what is written.

        Raises :class:`NormswapError` where it carries none, or others than tensors given by position."""
        found = self.carried()
        if found is None:
            raise NormswapError(f"{self.source} carries no inputs that are tensors by position; pass --input")
        return found

    def carried(self) -> tuple[Tensor, ...] | None:
        """The inputs that the file carries; ``None`` for none, or others than tensors given by position."""
        args, kwargs = self.stood.program.example_inputs or ((), {})
        plain = args and not kwargs and all(isinstance(each, Tensor) for each in args)
        return tuple(args) if plain else None

    def to_dict(self) -> dict[str, Any]:
        return {"source": str(self.source), **self.table.to_dict()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return str(self.table)


def _recipes(text: str | None) -> list[Any]:
    try:
        found = json.loads(text) if text else []
    except ValueError:
        found = []
    return found if isinstance(found, list) else []
