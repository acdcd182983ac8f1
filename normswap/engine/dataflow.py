"""The dataflow of a model: its regions with the shapes in them, every call site of every module, every reader of a
tensor.

A region proves what happens inside it. That its insides are not also called from outside is shown by an observed run,
which counts the real calls; without one, by the code of the modules around it, and in doubt the answer is no."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from normswap.fold.passages import Flow
from normswap.graph.observe import Observation, eval_mode, observe
from normswap.graph.reach import Reach, of_method, reach
from normswap.graph.references import Reference
from normswap.graph.shapes import inferred, seen
from normswap.graph.trace import Region, brief, regions

Place = tuple[Flow, fx.Node]
_ITERATES = frozenset(
    {"children", "modules", "named_children", "named_modules", "_modules", "__getitem__", "items", "values"}
)


class Dataflow:
    """Regions, call sites and readers of a model, with the evidence they rest on."""

    def __init__(
        self, model: nn.Module, found: dict[int, Reference], example_inputs: tuple[Any, ...] | None = None
    ) -> None:
        self.references = found
        traced, self.failed = regions(model)
        self.observation: Observation | None = None
        self.untrusted: dict[int, str] = {}
        if example_inputs is not None:
            self.observation = observe(model, example_inputs, [region.module for region in traced])
            with eval_mode(model):
                self.flows = [self._seen(region) for region in traced]
        else:
            self.flows = [Flow(region, inferred(region)) for region in traced]
        self.calls: dict[int, list[Place]] = {}
        self.tensor_reads: dict[int, list[Place]] = {}
        for flow in self.flows:
            self._index(flow)

    @property
    def evidence(self) -> str:
        return "static" if self.observation is None else "observed"

    def _seen(self, region: Region) -> Flow:
        assert self.observation is not None
        run = self.observation.runs.get(id(region.module))
        if run is None:
            return Flow(region, inferred(region))
        args, kwargs, output = run
        try:
            values, result = seen(region, args, kwargs)
        except Exception as error:
            self.untrusted[id(region)] = f"its trace does not run on example_inputs ({brief(error)})"
            return Flow(region, inferred(region))
        if not _same(result, output):
            self.untrusted[id(region)] = "its trace does not compute on example_inputs what the module does"
        return Flow(region, values)

    def _index(self, flow: Flow) -> None:
        for node in flow.region.graph.nodes:
            module = flow.module(node)
            if module is not None:
                self.calls.setdefault(id(module), []).append((flow, node))
            elif node.op == "get_attr":
                tensor = _attribute(flow.region.module, str(node.target))
                if isinstance(tensor, Tensor):
                    self.tensor_reads.setdefault(id(tensor), []).append((flow, node))

    def sites(self, module: nn.Module) -> list[Place]:
        """The calls of a module in all regions."""
        return self.calls.get(id(module), [])

    def unsettled(self, module: nn.Module) -> str | None:
        """Why the calls of a module in the graphs may not be all of its calls, or ``None``."""
        places = self.sites(module)
        if not places:
            reference = self.references[id(module)]
            return self._untraced(reference)
        for flow, _ in places:
            if (reason := self.untrusted.get(id(flow.region))) is not None:
                return reason
        if self.observation is not None:
            return self._miscounted(module, places)
        for flow, node in places:
            if flow.region.name and (reason := self._reached_from_outside(flow, str(node.target))) is not None:
                return reason
        for name in self.references[id(module)].names[1:]:
            if not any(flow.region.qualified(str(node.target)) == name for flow, node in places) and self._uncovered(
                name
            ):
                return f"it is {name} too, which no traced code calls; pass example_inputs to count its calls"
        return None

    def read_in_doubt(self, module: nn.Module) -> str | None:
        """Why code above a module that cannot be traced may read its tensors through a loop variable or an argument."""
        for reference in self.references.values():
            above = reference.name
            if above not in self.failed or not any(_below(name, above) for name in self.references[id(module)].names):
                continue
            if read := _TENSORS & reach(reference.module).foreign:
                holder = above or "the model"
                return f"the code of {holder} cannot be traced and reads the {sorted(read)[0]} of some module"
        return None

    def _uncovered(self, name: str) -> bool:
        """Whether an alias lies where no region's graph looks."""
        above = [name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)] + [""]
        return any(module in self.failed for module in above)

    def _untraced(self, reference: Reference) -> str:
        for name in reference.names:
            above = [name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)] + [""]
            for module in above:
                if module in self.failed:
                    return f"{module or 'the model'} cannot be traced ({self.failed[module]})"
        return "no traced code calls it"

    def _miscounted(self, module: nn.Module, places: Iterable[Place]) -> str | None:
        assert self.observation is not None
        ran = self.observation.modules.get(id(module))
        shown = 0
        for flow, _ in places:
            root = self.observation.modules.get(id(flow.region.module))
            shown += root.count if root is not None else 0
        count = 0 if ran is None else ran.count
        if count == shown:
            return None
        return f"it ran {count} times on example_inputs, the traced code shows {shown}: it is called from elsewhere"

    def _reached_from_outside(self, flow: Flow, target: str) -> str | None:
        """Whether code above a region that cannot be traced may call or read what is inside it."""
        name = flow.region.name
        first = target.partition(".")[0]
        for reference in self.references.values():
            above = reference.name
            if above not in self.failed or not _below(name, above):
                continue
            path = name[len(above) + 1 if above else 0 :].split(".")
            found = reach(reference.module)
            if _touches(found, path, first, flow.region.module):
                holder = above or "the model"
                return (
                    f"the code of {holder} cannot be traced and may reach into {name}; pass example_inputs to settle it"
                )
        return None


_TENSORS = frozenset({"weight", "bias", "running_mean", "running_var"})


def _below(name: str, above: str) -> bool:
    return name != above and (not above or name.startswith(f"{above}."))


def _touches(found: Reach, path: list[str], first: str, root: nn.Module) -> bool:
    if first in found.foreign or _ITERATES & found.foreign or path[0] in found.handled:
        return True
    attributes = {attribute for child, attribute in found.child_reads if child == path[0]}
    if _ITERATES & attributes:
        return True
    inside = path[1] if len(path) > 1 else first
    if inside in attributes:
        return True
    if len(path) > 1:
        return False
    cls: Any = type(root)
    methods = [name for name in attributes if callable(getattr(cls, name, None))]
    for method in methods:
        called = of_method(cls, method)
        if first in called.handled or any(child == first for child, _ in called.child_reads):
            return True
    return False


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _same(ours: Any, theirs: Any) -> bool:
    a, b = ([leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)] for value in (ours, theirs))
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        if x.is_floating_point() and not torch.allclose(
            x, y, rtol=1e-3, atol=1e-3 * float(y.abs().max()) if y.numel() else 0, equal_nan=True
        ):
            return False
    return True
