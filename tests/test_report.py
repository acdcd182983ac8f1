"""Reports: every norm has its line, columns line up, nothing is taken for markup, no line is cut."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

import normswap
from normswap import report
from normswap.engine import Site


def model() -> nn.Module:
    shared = nn.BatchNorm2d(8)
    return nn.Sequential(nn.Conv2d(3, 8, 1), shared, nn.Conv2d(8, 8, 1), shared, nn.LazyBatchNorm2d())


def drawn(shown: report.Report, *, terminal: bool, width: int = 200) -> str:
    file = io.StringIO()
    report.show(shown, Console(file=file, force_terminal=terminal, width=width, color_system=None))
    return file.getvalue()


def test_sites_without_a_terminal() -> None:
    text = drawn(report.sites_report(normswap.find(model())), terminal=False)
    lines = text.splitlines()
    assert lines[0] == "Normalizations"
    (header,) = (line for line in lines if line.startswith("  name"))
    (shared,) = (line for line in lines if line.startswith("  1 = 3"))
    assert shared.index("batch(8") == header.index("computes")
    assert any("not initialised" in line for line in lines)
    assert lines[-1] == "2 found: 1 batch, 1 unknown"


@pytest.mark.parametrize("terminal", [True, False])
def test_every_norm_of_a_plan_is_there(terminal: bool) -> None:
    plan = normswap.plan_convert(model(), "group", groups=2)
    text = drawn(report.plan_report(plan), terminal=terminal)
    for expected in ("1 = 3", "group(8, groups=2", "approximate", "running statistics", "not initialised"):
        assert expected in text


def test_a_narrow_terminal_loses_nothing() -> None:
    plan = normswap.plan_convert(model(), "group", groups=2)
    text = drawn(report.plan_report(plan), terminal=True, width=50)
    assert max(map(len, text.splitlines())) <= 50
    assert "initialised" in text.replace("\n", "").replace(" ", "")


def test_a_pipe_does_not_wrap() -> None:
    plan = normswap.plan_convert(model(), "group", groups=2)
    assert drawn(report.plan_report(plan), terminal=False, width=20) == f"{plan}\n"


def test_names_are_not_markup() -> None:
    site = Site("[red]x[/red]:smile:", None, nn.Identity(), "because [bold]")
    for terminal in (True, False):
        text = drawn(report.sites_report([site]), terminal=terminal)
        assert "[red]x[/red]:smile:" in text
        assert "because [bold]" in text


def test_no_site() -> None:
    assert str(report.sites_report([])) == "no normalization found"


def test_site_record_goes_through_json() -> None:
    records = [report.site_record(site) for site in normswap.find(model()[:4], (torch.randn(2, 3, 4, 5),))]
    assert json.loads(json.dumps(records)) == [
        {
            "name": "1",
            "aliases": ["3"],
            "kind": "batch",
            "computes": "batch(8, eps=1e-05)",
            "channels": 8,
            "reason": None,
            "evidence": "observed",
            "shapes": [[2, 8, 4, 5], [2, 8, 4, 5]],
        }
    ]


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_verification_leads_with_the_verdict(shift: float) -> None:
    first = nn.Linear(3, 4)
    second = nn.Linear(3, 4)
    second.load_state_dict({name: tensor + shift for name, tensor in first.state_dict().items()})
    verification = normswap.verify(first.eval(), second.eval(), (torch.randn(2, 3),), backend="eager")
    text = drawn(report.verification_report(verification), terminal=True)
    assert text.startswith("NOT equivalent" if shift else "equivalent")
