"""What a plan did to the stand-in of a program, done to the program: its graph, its signature, its tensors.

Inputs and outputs keep their names and their order, sizes and guards stay. The layers that took in a norm get new
values under the old names, and a parameter where they had no bias; the calls of the norms go, or become calls of other
norms; tensors that nothing reads any more leave the signature and the state dict.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from normswap.engine.plan import Plan
from normswap.errors import NormswapError
from normswap.programs.layers import RESULTS, source, tensors_of
from normswap.programs.operators import given, name_of
from normswap.programs.standin import LIFTED, StandIn, targets

KINDS = ("group", "instance", "layer")
"""What the norms of a program may become: those that one operator computes."""

_aten = torch.ops.aten


def apply(stood: StandIn, plan: Plan) -> ExportedProgram:
    """Make the changes of a plan for the stand-in in the stand-in and in the program itself, and return the program.

    Raises :class:`NormswapError` for a program that torch does not take any more; it is of no use then."""
    edit = _Edit(stood, plan.apply(inplace=True))
    for change in plan.changes:
        for name in (change.name, *change.aliases):
            if name in stood.calls:
                edit.norm(name)
        for name in change.into:
            edit.layer(name)
    return edit.done()


class _Edit:
    def __init__(self, stood: StandIn, changed: nn.Module) -> None:
        self.program, self.calls, self.changed = stood.program, stood.calls, changed
        self.graph = stood.program.graph_module.graph
        self.signature = stood.program.graph_signature
        self.names = targets(stood.program)
        self.placeholders = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        self.unread = {node.name for node in self.placeholders.values() if not node.users}
        """Inputs that nothing read before either."""
        self.owners: set[str] = set()
        """Beginnings of the names of the tensors of norms that went."""
        self.fake = detect_fake_mode([node.meta.get("val") for node in self.graph.nodes])
        self.written: set[str] = set()

    def layer(self, name: str) -> None:
        """Give a layer the values that it has in the stand-in."""
        if name in self.written:
            return
        self.written.add(name)
        module = self.changed.get_submodule(name)
        before = {**tensors_of(self.calls[name][0], given(self.calls[name][0]))}
        for field, node in before.items():
            value = getattr(module, field)
            if value is None:
                continue
            if isinstance(node, fx.Node):
                self._assign(self.names[node.name], value)
                node.meta["val"] = self._fake(value)
            else:
                self._give(name, field, self._new(f"{name}.{field}", value))

    def _assign(self, target: str, value: Tensor) -> None:
        where: Any = self.program.state_dict if target in self.program.state_dict else self.program.constants
        where[target] = value if isinstance(where[target], nn.Parameter) else value.detach()

    def _give(self, name: str, field: str, value: fx.Node) -> None:
        for call in self.calls[name]:
            if name_of(call.target) == "aten::mm.default":
                call.target, call.args, call.kwargs = _aten.addmm.default, (value, *call.args), {}
                continue
            schema = call.target._schema  # type: ignore[union-attr]
            at = next(index for index, each in enumerate(schema.arguments) if each.name == field)
            a = given(call)
            args = [a[each.name] for each in schema.arguments[: max(at + 1, len(call.args))]]
            args[at] = value
            call.args = tuple(args)
            call.kwargs = {key: each for key, each in call.kwargs.items() if key != field}

    def _new(self, wanted: str, value: Tensor) -> fx.Node:
        """A parameter of the program that it did not have."""
        target = wanted
        while target in self.program.state_dict or target in self.program.constants:
            target += "_"
        specs = self.signature.input_specs
        last = max((i for i, spec in enumerate(specs) if spec.kind is InputKind.PARAMETER), default=-1)
        following = specs[last + 1].arg.name if last + 1 < len(specs) else None
        places = (n for n in self.graph.nodes if n.name == following or n.op != "placeholder")
        with self.graph.inserting_before(next(places)):
            node: fx.Node = self.graph.placeholder("p_" + target.replace(".", "_"))
        node.meta["val"] = self._fake(value)
        specs.insert(last + 1, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), target))
        self.program.state_dict[target] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
        self.names[node.name] = target
        self.placeholders[node.name] = node
        return node

    def _fake(self, value: Tensor) -> Any:
        return value if self.fake is None else self.fake.from_tensor(value.detach(), static_shapes=True)

    # --- norms -------------------------------------------------------------------------------------------------------

    def norm(self, name: str) -> None:
        """Take a norm's calls out of the graph, or put the calls of another norm there."""
        module = self.changed.get_submodule(name)
        for call in self.calls[name]:
            a = given(call)
            held = [value.name for key, value in a.items() if isinstance(value, fx.Node) and key != "input"]
            self.owners |= {self.names[each].rpartition(".")[0] for each in held if each in self.names}
            ends = [call]
            if name_of(call.target) in RESULTS:
                for user in [user for user in call.users if not user.users]:
                    self.graph.erase_node(user)
                ends = list(call.users)
            put = self._instead(name, module, call, source(call, a))
            for end in ends:
                self._replace(end, put)
            if call not in ends:
                self.graph.erase_node(call)

    def _instead(self, name: str, module: nn.Module, call: fx.Node, x: fx.Node) -> fx.Node:
        if isinstance(module, nn.Identity):
            return x
        if not isinstance(module, (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)):
            raise NormswapError(f"{name}: {type(module).__name__} is no norm that a program has an operator for")
        a = given(call)
        values = [self._affine(name, field, getattr(module, field), a.get(field)) for field in ("weight", "bias")]
        args: tuple[Any, ...] = (x, *values, None, None, True, 0.1, module.eps, False)
        operator = _aten.instance_norm.default
        if isinstance(module, nn.GroupNorm):
            args, operator = (x, module.num_groups, *values, module.eps, False), _aten.group_norm.default
        with self.graph.inserting_before(call):
            made: fx.Node = self.graph.call_function(operator, args)
        value = call.meta.get("val")
        made.meta = {**call.meta, "val": value[0] if isinstance(value, (tuple, list)) else value}
        made.meta.pop("tensor_meta", None)
        return made

    def _affine(self, name: str, field: str, value: Tensor | None, node: Any) -> fx.Node | None:
        if value is None:
            return None
        if not isinstance(node, fx.Node):
            return self._new(f"{name}.{field}", value)
        self._assign(self.names[node.name], value)
        return node

    def _replace(self, end: fx.Node, put: fx.Node) -> None:
        """Let all that read ``end`` read ``put``; an output keeps its name."""
        end.replace_all_uses_with(put)
        self.graph.erase_node(end)
        specs = [spec for spec in self.signature.output_specs if spec.arg.name == end.name]
        taken = any(spec.arg.name == put.name for spec in self.signature.output_specs)
        if specs and put.op == "call_function" and not taken:
            put.name = end.name
        for spec in specs:
            spec.arg.name = put.name

    # --- the end -----------------------------------------------------------------------------------------------------

    def done(self) -> ExportedProgram:
        self.graph.eliminate_dead_code()
        gone = [name for name in self._gone() if name in self.names]
        for name in gone:
            self.graph.erase_node(self.placeholders[name])
        specs = self.signature.input_specs
        specs[:] = [spec for spec in specs if spec.kind not in LIFTED or spec.arg.name not in gone]
        left = {spec.target for spec in specs}
        for target in {self.names[name] for name in gone} - left:
            self.program.state_dict.pop(target, None)
            self.program.constants.pop(target, None)
        try:
            self.graph.lint()
            self.program.graph_module.recompile()
            self.program.validate()
        except Exception as error:
            raise NormswapError(f"torch does not take the changed program: {error}") from error
        return self.program

    def _gone(self) -> Iterable[str]:
        """Inputs that lost their last reader, and the batch counters of norms that went."""
        for name, node in self.placeholders.items():
            owner, _, last = self.names.get(name, "").rpartition(".")
            counter = last == "num_batches_tracked" and owner in self.owners
            if not node.users and (name not in self.unread or counter):
                yield name
