"""What is to blame where a run differs: the candidate itself, the exporter, the runtime, or its graph optimizations.

The runs of one candidate build on each other: as a module, exported and run as it stands, run with graph optimizations.
So a run is looked into only where those before it are right, and compared with them: an export with the module it was
made from, an optimized run with the same file unoptimized. Whether a node's wrong value is the graph's or the
runtime's, ONNX's own reference implementation of that node decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils._pytree import tree_leaves

from normswap.onnx.export import one_line
from normswap.verification.graph import Graph, module_of
from normswap.verification.inputs import Arguments
from normswap.verification.locate import Search, Values, limit_of
from normswap.verification.measures import Row
from normswap.verification.reference import Reference
from normswap.verification.result import Cause, Layer, Location, Profile
from normswap.verification.runners import EagerRunner, OnnxRunner, Runner
from normswap.verification.tracing import trace

INSIDE = "every value that can be seen inside is right; the outputs are put together otherwise"


@dataclass
class Diagnosis:
    """Locations and profiles of the runs of one candidate."""

    truth: Reference
    rows: Sequence[Row]
    inputs: Mapping[str, Arguments]
    """The sets of inputs by name."""
    outputs: Sequence[str]
    """The names of the reference's tensors, in order."""
    locations: list[Location] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def look(self, runners: Sequence[Runner], *, layers: bool) -> None:
        """Find the place in each run that differs where those before it do not; with ``layers`` see into all runs."""
        module: EagerRunner | None = None
        before = False
        for runner in runners:
            wrong = [row for row in self.rows if row.run == runner.name and row.verdict == "different"]
            try:
                if isinstance(runner, EagerRunner):
                    module = runner
                    if wrong or layers:
                        self._eager(runner, wrong)
                elif isinstance(runner, OnnxRunner) and wrong and not before:
                    self._graph(runner, module, wrong)
                elif isinstance(runner, OnnxRunner) and layers and not runner.optimized:
                    self._graph(runner, None if before else module, wrong)
            except Exception as error:
                self.notes.append(f"{runner.name}: the inside could not be compared ({one_line(error)})")
            before = before or bool(wrong)

    def _chosen(self, wrong: Sequence[Row]) -> str:
        """Of the sets of inputs that show the difference, the smallest; the first where none does."""
        names = list(dict.fromkeys(row.inputs for row in wrong)) or list(self.inputs)[:1]
        return min(names, key=lambda name: _size(self.inputs[name]))

    def _eager(self, runner: EagerRunner, wrong: Sequence[Row]) -> None:
        name = self._chosen(wrong)
        if self.truth.model is None:
            return
        inputs = self.inputs[name]
        values = Values.of(self.truth, inputs)
        search = Search(values, trace(runner.model, inputs), _outputs(wrong, name), self.truth)
        self._search(search, runner, name, "model", wrong)

    def _search(self, search: Search, runner: Runner, name: str, cause: Cause, wrong: Sequence[Row]) -> None:
        search.values.limit = _limit(wrong, name)
        place = search.run()
        self.profiles.append(Profile(runner.name, name, search.layers()))
        if not wrong:
            return
        if place is None:
            self.notes.append(f"{runner.name}: {INSIDE}")
            return
        around = search.around(place.position)
        self.locations.append(Location(runner.name, place.name, place.kind, cause, name, place.detail, around))

    def _graph(self, runner: OnnxRunner, module: EagerRunner | None, wrong: Sequence[Row]) -> None:
        name = self._chosen(wrong)
        graph = Graph(runner.path, self.inputs[name])
        if runner.optimized:
            self._optimized(graph, runner, name, wrong)
            return
        found = graph.trace(self.outputs)
        search = Search(self._expected(module, name), found, _outputs(wrong, name))
        search.values.limit = _limit(wrong, name)
        place = search.run()
        self.profiles.append(Profile(runner.name, name, search.layers()))
        if not wrong:
            return
        if place is None:
            self.notes.append(f"{runner.name}: {INSIDE}")
            return
        cause: Cause = "model" if module is None else "exporter"
        if not place.detail and graph.computes(place.position) is False:
            cause = "runtime"
        entry = place.entry
        kind = place.kind if self.truth.path is not None else search.values.kinds.get(place.name, entry.kind)
        where = "node" if not place.detail else "left out in front of" if "left" in place.detail else "in front of"
        detail = f"{where} {entry.operator} ({entry.kind})"
        around = search.around(place.position)
        self.locations.append(Location(runner.name, place.name, kind, cause, name, detail, around))

    def _expected(self, module: EagerRunner | None, name: str) -> Values:
        inputs = self.inputs[name]
        if module is not None:
            exported = Reference(module.model)
            exported.failure = self.truth.failure
            return Values.of(exported, inputs)
        if self.truth.model is not None:
            return Values.of(self.truth, inputs)
        assert self.truth.path is not None
        return Values(Graph(self.truth.path, inputs).trace(self.outputs), None, inputs)

    def _optimized(self, graph: Graph, runner: OnnxRunner, name: str, wrong: Sequence[Row]) -> None:
        """The file is right, its optimized run is not. Bisected: a value that is looked at is not optimized away."""
        for row in wrong:
            if row.inputs != name or row.output not in self.outputs:
                continue
            output = graph.outputs[list(self.outputs).index(row.output)]
            position = graph.spoiled(output, row.allowed or 1e-3)
            if position is None:
                continue
            node = graph.nodes[position]
            detail = f"node {node.name or node.output[0]}, behind {graph.chain(position)}"
            layer = Layer(module_of(node), node.op_type, row.relative, row.floor, row.excess)
            cause: Cause = "runtime optimizations"
            self.locations.append(Location(runner.name, module_of(node), node.op_type, cause, name, detail, (layer,)))
            return
        self.notes.append(f"{runner.name}: no single node could be found that graph optimizations spoil")


def _outputs(wrong: Sequence[Row], name: str) -> frozenset[str]:
    return frozenset(row.output for row in wrong if row.inputs == name)


def _limit(wrong: Sequence[Row], name: str) -> float:
    return limit_of(max((row.excess for row in wrong if row.inputs == name), default=1.0))


def _size(inputs: Arguments) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
