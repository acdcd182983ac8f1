"""Reports to keep: what they say, that a name in them is only a name, and that a page needs nothing but itself."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from torch import nn

import normswap
from normswap import NormswapError, report
from normswap.report import Section
from normswap.reporting import check_report, markdown, write, write_report
from normswap.reporting.content import FLOOR, TOLERANCE, WIDER, Content
from normswap.reporting.drawing import COLOURS, shortened
from normswap.reporting.html import html
from normswap.reporting.markdown import escape, table
from normswap.reporting.plot import Depth, plot
from normswap.verification import Layer, Location, Profile, Verification
from normswap.verification.inputs import Variation
from normswap.verification.measures import Row

HOSTILE = """<script>alert("$x_1$")</script></style>'&|@me*_"""
RUNS = ("eager", "onnxruntime, graph optimizations off", "onnxruntime")


def layers(*names: str, wrong_from: str | None = None) -> tuple[Layer, ...]:
    found, wrong = [], False
    for name in names:
        wrong = wrong or name == wrong_from
        error = 0.02 if wrong else 2e-7
        found.append(Layer(name, "Conv2d", error, 1.5e-7, error / 1e-6))
    return tuple(found)


def failed(name: str = "body.conv2", runs: tuple[str, ...] = RUNS) -> Verification:
    """A comparison that failed, all of whose runs first differ in the layer called ``name``."""
    names = ("stem", "body.conv1", name, "body.relu", "head")
    profiles = tuple(Profile(run, "given", layers(*names, wrong_from=name)) for run in runs)
    rows = tuple(
        Row(
            run, "output", "given", (2, 5), "float32", 0.1, 0.01, 1e-7, 5.0, 0.02, 1e-7, 1e-6, 2e4, "largest", 30.0, 0.5
        )
        for run in runs
    )
    places = tuple(Location(each.run, name, "Conv2d", "model", "given", around=each.layers[1:4]) for each in profiles)
    inputs = (Variation("given"), Variation("seed 0, magnitude 0.1", 0, 0.1))
    return Verification(False, "onnxruntime", "error below", rows, inputs, ("a note",), places, profiles)


def passed() -> Verification:
    model = nn.Linear(3, 4).eval()
    return normswap.verify(model, model, (torch.randn(2, 3),), backend="eager")


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.parts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], (self.open, tag)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.parts.append((self.open[-1] if self.open else "", data))

    def text(self, tag: str) -> list[str]:
        return [data for within, data in self.parts if within == tag]


class TestPage:
    def test_names_the_layer_at_a_glance(self) -> None:
        page = Page(html(Content(failed(), title="a.pt compared with b.pt")))
        text = " ".join(data for tag, data in page.parts if tag not in ("style", "title"))
        before_the_plot = text[: text.index("Error along the depth")]
        for expected in ("Not equivalent", "body.conv2", "20,000 times", "cause: the model", *RUNS):
            assert expected in before_the_plot
        assert "first differs: body.conv2" in page.text("text")
        assert not page.open

    def test_one_drawing_holds_all_runs(self) -> None:
        text = html(Content(failed()))
        assert text.count("<svg ") == 1
        page = Page(text)
        for run in (*RUNS, "allowed"):
            assert run in page.text("text")
        assert len([tag for tag, _ in page.tags if tag == "circle"]) == 3 * (5 + 1)  # The layers and the output.
        assert any(
            "body.relu (Conv2d)" in data and "error 2.00e-02, floor 1.50e-07, of allowed 2e+04" in data
            for data in page.text("title")
        )

    def test_one_drawing_for_each_set_of_inputs(self) -> None:
        found = failed()
        first, *others = found.profiles
        text = html(Content(replace(found, profiles=(replace(first, inputs="seed 3"), *others))))
        assert text.count("<svg ") == 2
        assert "“seed 3”" in text

    def test_a_name_is_only_a_name(self) -> None:
        found = failed(HOSTILE)
        found = replace(found, notes=(HOSTILE,), criterion=HOSTILE, inputs=(Variation(HOSTILE),))
        net = nn.Sequential()
        net.add_module(HOSTILE.replace(".", ""), nn.BatchNorm2d(4))
        page = Page(html(Content(found, normswap.plan_convert(net, "group"), HOSTILE)))
        assert not page.open
        assert "script" not in {tag for tag, _ in page.tags}
        assert len([tag for tag, _ in page.tags if tag == "style"]) == 1
        assert not [attributes for _, attributes in page.tags for name in attributes if name.startswith("on")]
        for tag in ("h1", "div", "td", "li", "title"):
            assert any(HOSTILE in data for data in page.text(tag)) or tag == "h1", tag
        assert f"first differs: {HOSTILE}" in page.text("text")

    @pytest.mark.parametrize("name", ["ns.层.ü", "$", r"a\b${c}", "x" * 300, "", "_hidden", "a" + ".b" * 30])
    def test_odd_names(self, name: str) -> None:
        assert not Page(html(Content(failed(name)))).open

    def test_needs_nothing_else(self) -> None:
        text = html(Content(failed()))
        for tag, attributes in Page(text).tags:
            assert tag not in ("script", "link", "img", "iframe", "object", "embed", "image")
            for name, value in attributes.items():
                if name.rpartition(":")[2] in ("href", "src"):
                    assert (value or "").startswith("#")
        assert "http://" not in text
        assert "https://" not in text
        assert "@import" not in text
        assert set(re.findall(r"url\((.)", text)) <= {"#"}
        assert "default-src 'none'" in text

    def test_colours_are_those_of_the_style_sheet(self) -> None:
        text = html(Content(failed()))
        style, drawing = text[: text.index("</style>")], text[text.index("<svg") : text.index("</svg>")]
        assert not [colour for colour in COLOURS if colour in text]
        used = set(re.findall(r"var\((--[\w-]+)\)", text))
        for scheme in (
            r":root \{(.*?)\}",
            r"prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}",
            r"@media print.*?:root \{(.*?)\}",
        ):
            found = re.search(scheme, style, re.DOTALL)
            assert found is not None
            assert used - {"--sans", "--mono"} <= set(re.findall(r"(--[\w-]+):", found[1]))
        assert {"--ink", "--band", "--alarm", "--run-0", "--run-1", "--run-2"} <= set(re.findall(r"--[\w-]+", drawing))
        assert "<style" not in drawing

    def test_long_tables_are_folded_away(self) -> None:
        plan = normswap.plan_convert(nn.Sequential(nn.BatchNorm2d(4), nn.LazyBatchNorm2d()), "group")
        page = Page(html(Content(failed(), plan)))
        summaries = page.text("summary")
        assert summaries[:3] == [f"Layers, {run} (6)" for run in RUNS]
        assert summaries[-2:] == ["Changes (1)", "Skipped (1)"]
        assert "details" in {tag for tag, _ in page.tags}
        assert not [attributes for tag, attributes in page.tags if tag == "details" and "open" in attributes]

    def test_says_the_same_twice(self) -> None:
        assert html(Content(failed())) == html(Content(failed()))

    def test_without_profiles(self) -> None:
        text = html(Content(passed()))
        assert "<svg" not in text
        assert "Equivalent</h1>" in text


class TestContent:
    @pytest.mark.parametrize(
        ("change", "heading"),
        [
            (lambda found: found, "Not equivalent"),
            (lambda found: replace(found, equivalent=True), "Equivalent"),
            (
                lambda found: replace(found, rows=tuple(replace(row, verdict="inconclusive") for row in found.rows)),
                "Inconclusive",
            ),
            (lambda found: None, "Not verified"),
        ],
    )
    def test_heading(self, change: Callable[[Verification], Any], heading: str) -> None:
        content = Content(change(failed()))
        assert content.heading == heading
        for text in (markdown(content), html(content)):
            assert heading in text

    def test_criterion(self) -> None:
        class Single(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if x.dtype == torch.float64:
                    raise RuntimeError("no float64 here")
                return super().forward(x)

        torch.manual_seed(0)
        x = (torch.randn(2, 3),)
        plain, single = nn.Linear(3, 4).eval(), Single(3, 4).eval()
        found = [
            normswap.verify(plain, plain, x, backend="eager"),
            normswap.verify(plain, plain, x, backend="eager", atol=1e-3),
            normswap.verify(single, single, x, backend="eager"),
        ]
        assert [Content(each).criterion for each in found] == [FLOOR, TOLERANCE, WIDER]

    def test_runs_that_differ_in_one_place_for_one_cause_are_told_once(self) -> None:
        found = failed()
        *first, last = found.locations
        (place,) = Content(found).places
        assert place.runs == RUNS
        assert place.excess == pytest.approx(2e4)
        apart = Content(replace(found, locations=(*first, replace(last, cause="runtime optimizations")))).places
        assert [(each.runs, each.first.cause) for each in apart] == [
            (RUNS[:2], "model"),
            (RUNS[2:], "runtime optimizations"),
        ]

    def test_the_empty_name_is_the_model(self) -> None:
        assert Content(failed("")).places[0].name == "the model itself"

    def test_summary(self) -> None:
        assert Content(failed()).summary == (
            "Compared: 3 runs, 1 output, 2 sets of inputs. The error reaches 20,000 times what is allowed."
        )
        assert re.fullmatch(
            r"Compared: 1 run, 1 output, .*at most \d+% of what is allowed\.", Content(passed()).summary
        )

    def test_versions(self) -> None:
        assert f"normswap {normswap.__version__}" in Content().versions
        assert f"torch {torch.__version__}".partition("+")[0] in Content().versions


class TestMarkdown:
    def test_leads_with_verdict_and_place(self) -> None:
        first, second, third, *_ = markdown(Content(failed(), title="a.pt")).split("\n\n")
        assert first == "## ❌ Not equivalent: a.pt"
        assert second.startswith("Compared: 3 runs")
        assert third.startswith(
            "**First differs in body.conv2** (Conv2d, 20,000 times the allowed error); cause: **the model**"
        )

    def test_tables_have_as_many_cells_as_columns(self) -> None:
        text = markdown(Content(failed(HOSTILE), title=HOSTILE))
        block: list[str] = []
        for line in [*text.splitlines(), ""]:
            if line.startswith("|"):
                block.append(line)
            elif block:
                assert len({line.count("|") for line in block}) == 1, block
                block = []

    def test_a_name_is_only_a_name(self) -> None:
        assert escape("<b>@me #7 a|b") == "&lt;b&gt;&#64;me &#35;7 a&#124;b"
        assert escape("*a* `b` [c](d) _e_ f_g \\ ~h~ $i$") == r"\*a\* \`b\` \[c\](d) \_e\_ f_g \\ \~h\~ \$i\$"
        assert escape("two\nlines") == "two lines"
        text = markdown(Content(failed(HOSTILE), title=HOSTILE))
        assert "<script" not in text
        assert "@me" not in text

    def test_a_long_table_is_cut(self) -> None:
        text = table(Section("Changes", ("name",), tuple((f"n{index}",) for index in range(100))))
        assert "n59" in text
        assert "n60" not in text
        assert text.endswith("… and 40 more")

    def test_plan_alone(self) -> None:
        plan = normswap.plan_convert(nn.Sequential(nn.BatchNorm2d(4), nn.LazyBatchNorm2d()), "group")
        text = markdown(Content(None, plan))
        assert "➖ Not verified" in text
        assert "<summary>Changes (1)</summary>" in text
        assert "<summary>Skipped (1)</summary>" in text
        assert "not initialised" in text


class TestPlot:
    def test_runs_share_what_they_have_in_common(self) -> None:
        one = Profile("one", "given", layers("a", "b", "b", "d"))
        two = Profile("two", "given", layers("a", "x", "b", "b", "c", "d", "e"))
        depth = Depth.of([one, two])
        assert depth.keys == [("a", 0), ("x", 0), ("b", 0), ("b", 1), ("c", 0), ("d", 0), ("e", 0)]
        assert [value == value for value in depth.series(0)] == [True, False, True, True, False, True, False]
        assert depth.allowed() == pytest.approx([1e-6] * 7)
        assert depth.floor() == pytest.approx([1.5e-7] * 7)

    def test_above_the_band_is_what_is_wrong(self) -> None:
        """One channel of many is wrong: the largest error hides it, and the measure by channel does not."""
        right = Profile("right", "given", (Layer("a", "Conv2d", 1e-6, 1e-6, 0.2),))
        hidden = Profile("hidden", "given", (Layer("a", "Conv2d", 2e-6, 1e-6, 3.0),))
        depth = Depth.of([right, hidden])
        (allowed,) = depth.allowed()
        assert allowed == pytest.approx(5e-6)
        assert depth.series(0) == pytest.approx([1e-6])
        assert depth.series(1) == pytest.approx([15e-6])

    def test_an_inside_that_cannot_be_seen_has_its_outputs(self) -> None:
        found = failed()
        text = html(Content(replace(found, profiles=found.profiles[:2])))
        assert "Layers, onnxruntime (1)" in text
        assert Page(text).text("text").count("→ output") == 1

    @pytest.mark.parametrize(
        "odd",
        [
            Layer("b", "Conv2d", None, None, None),
            Layer("b", "Conv2d", 0.0, 0.0, 0.0),
            Layer("b", "Conv2d", float("inf"), 1e-7, float("inf")),
            Layer("b", "Conv2d", float("nan"), 1e-7, float("nan")),
        ],
    )
    @pytest.mark.parametrize("alone", [True, False])
    def test_odd_values(self, odd: Layer, alone: bool) -> None:
        found = (odd,) if alone else (*layers("a"), odd, *layers("c"))
        svg = plot([Profile("eager", "given", found)], ["b", "not there"])
        ElementTree.fromstring(svg)
        assert "first differs: b<" in svg
        assert "not there" not in svg

    def test_many_layers(self) -> None:
        names = [f"stage{index // 100}.block{index // 10}.conv{index}" for index in range(600)]
        svg = plot([Profile("eager", "given", layers(*names, wrong_from=names[400]))], [names[400]])
        ElementTree.fromstring(svg)
        assert "first differs: stage4.block40.conv400" in svg
        assert len(re.findall(r">stage\d</text>", svg)) == 6

    def test_shortened(self) -> None:
        assert shortened("a" * 48) == "a" * 48
        assert shortened("a" * 30 + "b" * 30) == "a" * 23 + "…" + "b" * 23


class TestWrite:
    @pytest.mark.parametrize("name", ["report.html", "report.md"])
    def test_whole_or_not_at_all(self, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / name
        write_report(path, failed(), title="mine")
        before = path.read_text(encoding="utf-8")
        assert "mine" in before
        with pytest.raises(NormswapError, match=r"exists; pass force=True"):
            write_report(path, passed())
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(NormswapError, match="No partial file was left"):
            write_report(path, passed(), force=True)
        assert [each.read_text(encoding="utf-8") for each in tmp_path.iterdir()] == [before]

    @pytest.mark.parametrize(
        ("name", "message"), [("report.pdf", r"end in \.html or \.md"), ("none/report.md", "none does not exist")]
    )
    def test_refused_early(self, tmp_path: Path, name: str, message: str) -> None:
        with pytest.raises(NormswapError, match=message):
            check_report(tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_without_the_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = write.importlib.util.find_spec
        monkeypatch.setattr(
            write.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name)
        )
        with pytest.raises(NormswapError, match=r"needs matplotlib: pip install normswap\[report\]"):
            write_report(tmp_path / "report.html", passed())
        write_report(tmp_path / "report.md", passed())


class TestTerminal:
    def drawn(self, found: Verification, *, colour: bool = False, width: int = 160) -> str:
        file = io.StringIO()
        system: Any = "standard" if colour else None
        report.show(
            report.verification_report(found), Console(file=file, force_terminal=True, width=width, color_system=system)
        )
        return file.getvalue()

    def test_tables(self) -> None:
        text = self.drawn(failed())
        lines = text.splitlines()
        assert lines[0] == "NOT equivalent on 2 sets of inputs"
        assert lines[1] == "criterion: error below"
        titles = [
            line.strip()
            for line in lines
            if line.strip() in ("Outputs", "What differs", "First differs in", "Around it")
        ]
        assert titles == ["Outputs", "What differs", "First differs in", "Around it"]
        assert "note: a note" in lines
        assert "2e+04 times the allowed error (largest)" in text
        assert text.count("body.relu") == 3

    def test_verdict_is_coloured(self) -> None:
        assert "\x1b[1;31mNOT equivalent" in self.drawn(failed(), colour=True)
        assert "\x1b[1;31mdifferent" in self.drawn(failed(), colour=True)
        assert "\x1b[32mequivalent" in self.drawn(passed(), colour=True)

    def test_nothing_but_outputs_when_equivalent(self) -> None:
        text = self.drawn(passed())
        assert "Outputs" in text
        assert "differs" not in text

    def test_a_narrow_terminal_loses_nothing(self) -> None:
        text = self.drawn(failed("a.very.long.name.of.a.layer"), width=60)
        assert max(map(len, text.splitlines())) <= 60
        assert "layer" in text

    def test_a_pipe_gets_plain_text(self) -> None:
        file = io.StringIO()
        report.show(report.verification_report(failed()), Console(file=file, width=40))
        assert file.getvalue() == f"{failed()}\n"
