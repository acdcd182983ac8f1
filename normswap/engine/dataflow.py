"""The dataflow of a model: its regions with the shapes in them, every call site of every module, every reader of a
tensor.

A region proves what happens inside it. That its insides are not also called from outside is shown by an observed run,
which counts the real calls; without one, by the code of the modules around it, and in doubt the answer is no."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from copy import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from normswap import registry
from normswap.errors import Refusal
from normswap.fold.passages import Flow, value_users
from normswap.graph.magnitudes import levels
from normswap.graph.observe import Observation, eval_mode, observe
from normswap.graph.reach import Reach, of_method, reach
from normswap.graph.record import record
from normswap.graph.references import Reference
from normswap.graph.shapes import inferred, seen
from normswap.graph.trace import Region, brief, otherwise, regions

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
        self.by_name = {name: reference for reference in found.values() for name in reference.names}
        traced, self.failed = regions(model, bare=False)
        self.opaque = [reference for reference in found.values() if reference.name in self.failed]
        """The modules that could not be traced."""
        self.observation: Observation | None = None
        self.notes: list[str] = []
        """What the answers assume."""
        self.untrusted = {id(region): region.doubt for region in traced if region.doubt is not None}
        if example_inputs is not None:
            self.observation = observe(model, example_inputs, [region.module for region in traced])
            with eval_mode(model):
                self.flows = [self._seen(region) for region in traced]
        else:
            self.flows = [Flow(region, inferred(region)) for region in traced]
            self.flows += [Flow(region, inferred(region)) for each in traced for region in self._otherwise(each)]
        self._reached: dict[str, Reach] = {}
        self.calls: dict[int, list[Place]] = {}
        self.tensor_reads: dict[int, list[Place]] = {}
        self.doubts: dict[int, str] = {}
        """Why the calls of modules, by ``id``, are known not to be all of their calls."""
        self._index_all()

    def along(self, model: nn.Module, example_inputs: tuple[Any, ...]) -> Dataflow:
        """The dataflow of the path that ``example_inputs`` take, for a model that cannot be traced whole.

        Raises what the run raises, and :class:`Refusal` where it cannot be seen."""
        if any(module.training for module in model.modules()):
            raise Refusal("example_inputs speak for eval mode only: call eval() on the model")
        region, values = record(model, example_inputs)
        path = copy(self)
        path.failed, path.opaque, path.flows = {}, [], [Flow(region, values)]
        path.untrusted = {} if region.doubt is None else {id(region): region.doubt}
        path.calls, path.tensor_reads = {}, {}
        path._index_all()
        return path

    @property
    def evidence(self) -> str:
        return "static" if self.observation is None else "observed"

    def _seen(self, region: Region) -> Flow:
        assert self.observation is not None
        runs = self.observation.runs.get(id(region.module), [])
        flow = Flow(region, inferred(region))
        for run in runs:
            try:
                values, result = seen(region, run.args, run.kwargs)
            except Exception as error:
                self.untrusted[id(region)] = f"its trace does not run on example_inputs ({brief(error)})"
                return flow
            if not _same(result, run.output):
                self.untrusted[id(region)] = "its trace does not compute on example_inputs what the module does"
            if run is runs[0]:
                flow = Flow(region, values)
        return flow

    def _otherwise(self, region: Region) -> Iterator[Region]:
        """The region under other circumstances, in which a fold must hold too."""
        if not any(registry.registered(module) for module in region.module.modules()):
            return
        for when, retrace in otherwise(region):
            try:
                yield Region.of(region.name, region.module, retrace(), when)
            except Exception as error:
                if when.endswith("no tensor"):  # it asked in order to raise
                    continue
                if region.name or "given" not in when:
                    self.untrusted[id(region)] = f"{when} it cannot be traced ({brief(error)}); pass example_inputs"
                else:
                    self.notes.append(
                        f"{when} the model cannot be traced ({brief(error)}): the plan holds for calls without"
                    )

    def _index_all(self) -> None:
        for flow in self.flows:
            self._index(flow)
        read = [identity for flow in self.flows for identity in flow.region.reads]
        self.read_elsewhere = {*read, *_held(self.references), *(self.observation.reads if self.observation else ())}
        """The ``id`` of tensors that are read by other means than an operation in a graph."""
        told = {i for i, places in self.tensor_reads.items() if any(value_users(node) for _, node in places)}
        self.value_reads = self.read_elsewhere | told
        """``id`` of the tensors of which more is read than type, place or shape."""
        for identity in self.read_elsewhere:
            self.tensor_reads.setdefault(identity, [])

    def _index(self, flow: Flow) -> None:
        for node in flow.region.graph.nodes:
            module = flow.module(node)
            if module is not None:
                self.calls.setdefault(id(module), []).append((flow, node))
            elif node.op == "get_attr":
                if str(node.target) in flow.region.constants:
                    continue
                tensor = _attribute(flow.region.module, str(node.target))
                if isinstance(tensor, Tensor):
                    self.tensor_reads.setdefault(id(tensor), []).append((flow, node))

    def sites(self, module: nn.Module) -> list[Place]:
        """The calls of a module in all regions."""
        return self.calls.get(id(module), [])

    def may_run(self, module: nn.Module) -> bool:
        """Whether anything calls a module, or could where no graph looks."""
        if self.sites(module):
            return True
        if self.observation is not None:
            return id(module) in self.observation.modules
        return any(self._uncovered(name) for name in self.references[id(module)].names)

    def unsettled(self, module: nn.Module, places: list[Place] | None = None) -> str | None:
        """Why the calls of a module in the graphs may not be all of its calls, or ``None``.

        ``places``: the reads of a parameter by the module's own code, which stand for its calls."""
        if id(module) in self.doubts:
            return self.doubts[id(module)]
        places = self.sites(module) if places is None else places
        if not places:
            reference = self.references[id(module)]
            return self._untraced(reference)
        for flow, _ in places:
            if (reason := self.untrusted.get(id(flow.region))) is not None:
                return reason
        if self.observation is not None and id(module) in self.observation.modules:
            return self._miscounted(module, places)
        for name in self.references[id(module)].names:
            for above in (name, *_prefixes(name)[:-1]):
                if above in self.by_name and (holder := self.by_name[above].captured) is not None:
                    return f"{holder} also holds {above} in a closure, method or object; pass example_inputs"
        for flow, node in places:
            if flow.region.name and (reason := self._reached_from_outside(flow, str(node.target))) is not None:
                return reason
            for above in _prefixes(flow.region.qualified(_called(node)).rstrip("."))[:-1]:
                if above in self.failed and _below(above, flow.region.name):
                    return f"{above} cannot be traced ({self.failed[above]}) and may call it too; pass example_inputs"
        for name in self._aliases(module):
            called = (flow.region.qualified(_called(node)) for flow, node in places)
            if not any(above.rstrip(".") == name for above in called) and self._uncovered(name):
                return f"it is {name} too, which no traced code calls; pass example_inputs to count its calls"
        return None

    def read_in_doubt(self, module: nn.Module, names: Set[str] = frozenset()) -> str | None:
        """Why code above a module that cannot be traced may read its tensors through a loop variable or an argument;
        ``names``: of tensors besides the usual ones."""
        for reference in self.opaque:
            above = reference.name
            if not any(_below(name, above) for name in self.references[id(module)].names):
                continue
            found = reach(reference.module)
            holder = above or "the model"
            if read := (_TENSORS | names) & found.foreign:
                return f"the code of {holder} cannot be traced and reads the {sorted(read)[0]} of some module"
            if self.observation is None and (tricks := found.tricks & _READS_ANY):
                return f"the code of {holder} cannot be traced and uses {sorted(tricks)[0]}; pass example_inputs"
        return None

    def asked_for(self, module: nn.Module, was: type | None = None) -> str | None:
        """Why the code around a module may take another path when a module of another class stands there.

        ``was``: the module's class, if it is another one for the time being."""
        kind: Any = was or type(module)
        for holder, found in self.above(module):
            for cls in found.classes:
                if issubclass(kind, cls):
                    return f"the code of {holder} asks for a {cls.__name__}"
            for text in found.asked:
                offered = hasattr(module, text) or hasattr(kind, text)
                if (offered and not hasattr(_PLAIN, text)) or text in kind.__name__:
                    return f"the code of {holder} asks for {text!r}"
        return None

    def asked_for_baked(self, module: nn.Module, becomes: type, gone: Set[str]) -> str | None:
        """Why the code around a layer may take another path when it becomes plain and loses attributes."""
        old, new = type(module), becomes
        for holder, found in self.above(module):
            for cls in found.classes:
                if issubclass(old, cls) != issubclass(new, cls):
                    return f"the code of {holder} asks for a {cls.__name__}"
            for text in found.asked:
                offered = text not in _TENSORS and hasattr(old, text) != hasattr(new, text)
                if text in gone or offered or (text in old.__name__) != (text in new.__name__):
                    return f"the code of {holder} asks for {text!r}"
        return None

    def asks_for_bias(self, module: nn.Module) -> str | None:
        """Why the code around a layer may take another path when the layer gets a bias."""
        for holder, found in self.above(module):
            if "bias" in found.asked or "bias" in found.foreign:
                return f"the code of {holder} asks for a bias, which this layer does not have"
        return None

    def above(self, module: nn.Module) -> Iterator[tuple[str, Reach]]:
        """What the code of every module above one can reach."""
        seen: set[str] = set()
        for name in self.references[id(module)].names:
            for above in _prefixes(name):
                if above not in seen and above in self.by_name:
                    seen.add(above)
                    if above not in self._reached:
                        self._reached[above] = reach(self.by_name[above].module)
                    yield above or "the model", self._reached[above]

    def _aliases(self, module: nn.Module) -> Iterator[str]:
        """Other names of a module, and those it has by other names of the modules above it."""
        known, *others = self.references[id(module)].names
        yield from others
        for above in _prefixes(known)[:-1]:
            for other in self.by_name[above].names[1:] if above in self.by_name else ():
                yield f"{other}{known.removeprefix(above)}"

    def _uncovered(self, name: str) -> bool:
        """Whether an alias lies where no region's graph looks."""
        return any(module in self.failed for module in _prefixes(name))

    def _untraced(self, reference: Reference) -> str:
        for name in reference.names:
            for module in _prefixes(name):
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
            ranks = {len(shape) for shape in ran.shapes} if ran is not None else set()
            return "it ran on inputs of different ranks" if len(ranks) > 1 else None
        return f"it ran {count} times on example_inputs, the traced code shows {shown}: it is called from elsewhere"

    def _reached_from_outside(self, flow: Flow, target: str) -> str | None:
        """Whether code above a region that cannot be traced may call or read what is inside it."""
        name = flow.region.name
        first = target.partition(".")[0]
        for reference in self.opaque:
            above = reference.name
            if not _below(name, above):
                continue
            path = name[len(above) + 1 if above else 0 :].split(".")
            if _touches(reach(reference.module), reference.module, path, first):
                holder = above or "the model"
                return (
                    f"the code of {holder} cannot be traced and may reach into {name}; pass example_inputs to settle it"
                )
        return None


def _prefixes(name: str) -> list[str]:
    """The names of all modules above one, the nearest first."""
    return [name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)] + [""] * bool(name)


_PLAIN = nn.Identity()
_TENSORS = frozenset({"weight", "bias", "running_mean", "running_var"})
_READS_ANY = frozenset({"parameters", "named_parameters", "state_dict", "get_parameter", "__dict__"})


def _called(node: fx.Node) -> str:
    """The name, inside a region, of the module that a node calls or whose tensor it reads."""
    return str(node.target).rpartition(".")[0] if node.op == "get_attr" else str(node.target)


def _below(name: str, above: str) -> bool:
    return name != above and (not above or name.startswith(f"{above}."))


def _touches(found: Reach, holder: nn.Module, path: list[str], inner: str) -> bool:
    """Whether code of ``holder`` may use ``inner`` of the module at ``path`` below it, not only call that module."""
    if inner in found.foreign or found.tricks or path[0] in found.handled | found.foreign:
        return True
    attributes = {attribute for child, attribute in found.child_reads if child == path[0]}
    if _ITERATES & attributes or (path[1] if len(path) > 1 else inner) in attributes:
        return True
    child = holder._modules.get(path[0])
    cls: Any = type(child)
    for method in attributes:
        if child is None or not callable(getattr(cls, method, None)):
            continue
        called = of_method(cls, method)
        if len(path) == 1 and (inner in called.loaded or called.tricks):
            return True
        if len(path) > 1 and _touches(called, child, path[1:], inner):
            return True
    return False


def _held(found: dict[int, Reference]) -> Iterator[int]:
    """The ``id`` of tensors that modules hold in plain lists, tuples and dicts, where any code may read them."""
    for reference in found.values():
        for name, value in vars(reference.module).items():
            if name not in _INTERNAL and isinstance(value, (list, tuple, dict)):
                items = value.values() if isinstance(value, dict) else value
                yield from (id(item) for item in items if isinstance(item, Tensor))


_INTERNAL = frozenset(vars(nn.Module()))


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
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return False
        elif not _near(x, y):
            return False
    return True


def _near(x: Tensor, y: Tensor) -> bool:
    """Whether two floating-point tensors of a shape are alike up to 1e-3 of what is large beside each value."""
    if x.is_meta or y.is_meta:
        return False
    finite = x.isfinite() & y.isfinite()
    if not bool((finite | (x == y) | (x.isnan() & y.isnan())).all()):
        return False
    scales = (finite & each for each in levels(y))
    return all(float((x - y)[each].abs().max()) <= 1e-3 * float(y[each].abs().max()) for each in scales if each.any())
