"""``normswap diff``: what differs between two checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normswap import report
from normswap.checkpoint import read
from normswap.checkpoints.difference import differences
from normswap.commands.parameters import AsJson, Key, TrustPickle
from normswap.console import show, working


def diff(
    before: Annotated[Path, typer.Argument(help="A checkpoint.")],
    after: Annotated[Path, typer.Argument(help="Another.")],
    key: Key = None,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Tell which tensors of two checkpoints are not the same; the exit status is 0 either way."""
    with working("comparing"):
        pair = [read(path, key=key, trust_pickle=trust_pickle) for path in (before, after)]
        found = differences(*pair)
    same = len(pair[0].tensors) - sum(each.what != "added" for each in found)
    record = {"same": same, "differences": [each.to_dict() for each in found]}
    show(report.differences_report(found, same), record, as_json)
