"""A watched run: what a model returns, which modules ran, and every norm function that was called.

Calls are taken at two levels. A ``TorchFunctionMode`` sees the functions of ``torch`` and ``torch.nn.functional``; a
``TorchDispatchMode`` sees the operators below them, and counts those that no such function made, so that nothing
escapes. It shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.zoo.models import Entry, Inputs

FUNCTIONS: dict[Any, str] = {
    getattr(space, f"{family}_norm"): family
    for space in (F, torch)
    for family in ("batch", "group", "layer", "instance", "rms")
} | {torch.native_batch_norm: "batch", torch.native_group_norm: "group", torch.native_layer_norm: "layer"}
OPERATORS = {
    "native_batch_norm": "batch",
    "_native_batch_norm_legit": "batch",
    "_native_batch_norm_legit_no_training": "batch",
    "_batch_norm_with_update": "batch",
    "_batch_norm_no_update": "batch",
    "_batch_norm_impl_index": "batch",
    "cudnn_batch_norm": "batch",
    "batch_norm": "batch",
    "instance_norm": "instance",
    "native_group_norm": "group",
    "native_layer_norm": "layer",
    "_fused_rms_norm": "rms",
}


@dataclass(frozen=True)
class Call:
    """One call of a norm function, or of a norm operator that no such function made."""

    family: str
    owner: nn.Module | None
    """The innermost module that was running."""
    of_parameter: bool
    """It normalizes a parameter, not an activation: weight standardization."""


@dataclass
class Run:
    """What a model returned and what ran meanwhile."""

    outputs: list[Tensor]
    modules: dict[int, nn.Module] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    def batch_calls(self) -> list[Call]:
        return [call for call in self.calls if call.family == "batch" and not call.of_parameter]


class _Functions(TorchFunctionMode):
    def __init__(self, record: Callable[[str, Any], None], inside: list[str]) -> None:
        super().__init__()
        self.record, self.inside = record, inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        family = FUNCTIONS.get(func)
        if family is None:
            return func(*args, **kwargs)
        self.record(family, args[0] if args else kwargs.get("input"))
        self.inside.append(family)
        try:
            return func(*args, **kwargs)
        finally:
            self.inside.pop()


class _Operators(TorchDispatchMode):
    """Sees the operators below the functions: what is not inside a recorded function has escaped the mode above."""

    def __init__(self, record: Callable[[str, Any], None], inside: list[str]) -> None:
        super().__init__()
        self.record, self.inside = record, inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        family = OPERATORS.get(func._schema.name.removeprefix("aten::"))
        if family is not None and not self.inside:
            self.record(family, args[0] if args else None)
        return func(*args, **(kwargs or {}))


def watch(entry: Entry, model: nn.Module, inputs: Inputs) -> Run:
    """Run the model once under both modes and module hooks."""
    run = Run([])
    stack: list[nn.Module] = []
    inside: list[str] = []
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def record(family: str, tensor: Any) -> None:
        of_parameter = isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in parameters
        run.calls.append(Call(family, stack[-1] if stack else None, of_parameter))

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(module)
        run.modules[id(module)] = module

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        with _Functions(record, inside), _Operators(record, inside):
            run.outputs = entry.outputs(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return run


def relative_error(reference: list[Tensor], candidate: list[Tensor]) -> float:
    """The largest ``max|a - b| / max|a|`` over the outputs; infinite when shapes differ or a value is not finite."""
    if [tensor.shape for tensor in reference] != [tensor.shape for tensor in candidate]:
        return float("inf")
    worst = 0.0
    for a, b in zip(reference, candidate, strict=True):
        error = float((a - b).abs().max() / a.abs().max())
        worst = max(worst, error if error == error else float("inf"))
    return worst
