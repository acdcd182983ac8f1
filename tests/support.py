"""Checks shared by the tests: random parameters and statistics, the oracle, round trips, and an exact picture of a
model."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normswap import Norm, Plan, apply_recipe, plan_convert, plan_fold, read, reference, registry
from normswap.engine.carry import fresh
from normswap.norms import moments
from normswap.norms.affine import ChannelAffine
from normswap.norms.passes import Passes

DOUBLE = 1e-9
SINGLE = 2e-5
"""Relative tolerances: arithmetic in float64, and in float32 (norms that upcast their input go down to it)."""


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and buffer random values, in place: statistics of a fresh norm (0 and 1) hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_meta or not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.rpartition(".")[2] in ("running_var", "weight"):
                values = values.abs() + 0.5
            if name.rpartition(".")[2] == "share":
                values = values.sigmoid()
            tensor.copy_(values)
    return module


def sample(*shape: int, seed: int = 1) -> Tensor:
    """A float64 input whose channels (axis 1) and samples differ in mean and scale, with values away from zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.rand((*shape[:2], *[1] * (len(shape) - 2)), generator=generator, dtype=torch.float64) + 0.5
    shift = torch.randn(scale.shape, generator=generator, dtype=torch.float64)
    return x * scale + shift


def distance(a: Tensor, b: Tensor) -> float:
    """The greatest difference, relative to the greatest value of ``b``."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def tolerance(norm: Norm) -> float:
    return SINGLE if norm.upcast else DOUBLE


def expected(x: Tensor, norm: Norm, *, training: bool = False) -> Tensor:
    """What a module that reads as ``norm`` must give: the oracle, then the followers."""
    out = reference(x, norm, training=training)
    for module in norm.then:
        out = module(out)
    return out


def check_reader(module: nn.Module, x: Tensor) -> None:
    """The module computes what its ``Norm`` says, in train and in eval mode."""
    for training in (True, False):
        subject = copy.deepcopy(module).train(training)
        norm = read(subject)
        wanted = expected(x, norm, training=training)
        assert distance(subject(x.clone()), wanted) < tolerance(norm), f"training={training}: {norm}"


def check_state_dict(module: nn.Module, norm: Norm, kind: str, x: Tensor, **options: Any) -> None:
    """The state of a built module loads into one built from a fresh norm, which then computes the same."""
    other = registry.builder(kind)(fresh(norm), **options).to(x.dtype)
    assert list(other.state_dict()) == list(module.state_dict())
    other.load_state_dict({name: tensor.clone() for name, tensor in module.state_dict().items()}, strict=True)
    assert torch.equal(other.eval()(x), module.eval()(x))


def check_copies(module: nn.Module, x: Tensor) -> None:
    """Deep copies, pickles and saved files give the same class, keys and outputs, and share nothing."""
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    wanted = copy.deepcopy(module)(x)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(copy.deepcopy(module)),
    ):
        assert [type(m).__name__ for m in other.modules()] == [type(m).__name__ for m in module.modules()]
        assert list(other.state_dict()) == list(module.state_dict())
        assert torch.equal(copy.deepcopy(other)(x), wanted)
        ours = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
        assert not ours & {id(tensor) for tensor in other.state_dict(keep_vars=True).values()}


def plan_of(module: nn.Module, kind: str, **arguments: Any) -> Plan:
    """The plan for one norm inside a container."""
    return plan_convert(nn.Sequential(module), kind, **arguments)


def only(items: list[Any]) -> Any:
    assert len(items) == 1, items
    return items[0]


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def operators(call: Callable[[], Any]) -> Counter[str]:
    """How often each operator runs."""
    with torch.no_grad(), _Operators() as mode:
        call()
    return mode.counts


BATCH_NORM_OPERATORS = ("native_batch_norm", "_batch_norm_impl_index", "cudnn_batch_norm", "batch_norm")


def batch_norms_run(model: nn.Module, *inputs: Any) -> int:
    """How many batch norms a call computes; a ``ChannelAffine`` and the moment core, which borrow their kernel, are
    none."""

    def plain(self: ChannelAffine, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        return x * self.scale.reshape(shape) + self.shift.reshape(shape)

    with mock.patch.object(ChannelAffine, "forward", plain), mock.patch.object(moments, "passes", Passes):
        counts = operators(lambda: model(*inputs))
    return sum(count for name, count in counts.items() if "batch_norm" in name)


@dataclass(frozen=True)
class Picture:
    """Everything about a model that a failed or planned operation must leave alone."""

    parts: dict[str, Any]
    tensors: dict[str, Tensor]

    def differences(self, model: nn.Module) -> list[str]:
        now = picture(model)
        names = [k for k in {**self.parts, **now.parts} if self.parts.get(k) != now.parts.get(k)]
        for key in {**self.tensors, **now.tensors}:
            before, after = self.tensors.get(key), now.tensors.get(key)
            if before is None or after is None or not _equal(before, after):
                names.append(f"tensor {key}")
        return names


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or b.is_meta:
        return a.is_meta == b.is_meta and a.shape == b.shape
    return a.dtype == b.dtype and torch.equal(a, b)


_HOOKS = [name for name in vars(nn.Module()) if "hook" in name]


def picture(model: nn.Module) -> Picture:
    """Classes, identities, flags, attributes, hooks and values of a model and all that is in it."""
    parts: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parts[f"{name} is"] = (id(module), type(module), module.training)
        for key, value in vars(module).items():
            parts[f"{name}.{key}"] = _identity(value)
        for key in _HOOKS:
            hooks = vars(module).get(key)
            for hook in hooks.values() if isinstance(hooks, dict) else ():
                holder = getattr(hook, "module", None)
                parts[f"{name}.{key}.{id(hook)}"] = id(holder()) if holder is not None else None
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts[f"{name} requires_grad"] = parameter.requires_grad
    tensors = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
    return Picture(parts, tensors)


def _identity(value: Any) -> Any:
    """What must be the same object: tuples, which are made anew when one of their items is put back, by their items."""
    if isinstance(value, tuple):
        return type(value), [_identity(item) for item in value]
    if isinstance(value, dict):
        return id(value), [(repr(key), _identity(item)) for key, item in value.items()]
    if isinstance(value, (list, set)):
        return id(value), [_identity(item) for item in value]
    return id(value)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def without_statistics(norm: Norm) -> Norm:
    return replace(norm, running_mean=None, running_var=None, num_batches_tracked=None)


def check_fold(model: nn.Module, *inputs: Any, **options: Any) -> tuple[Plan, nn.Module]:
    """The plan of a fold and its result: the plan touches nothing, the function is the same, undone bit for bit,
    replayed and loaded strictly."""
    before = picture(model)
    plan = plan_fold(model, **options)
    assert before.differences(model) == []
    folded = plan.apply()
    assert before.differences(model) == []
    with torch.no_grad():
        wanted = model(*copy.deepcopy(inputs))
        assert distance(folded(*copy.deepcopy(inputs)), wanted) < DOUBLE
    assert plan.apply(inplace=True) is model
    with torch.no_grad():
        assert distance(model(*copy.deepcopy(inputs)), wanted) < DOUBLE
    assert list(model.state_dict()) == list(folded.state_dict())
    plan.undo()
    assert before.differences(model) == []
    replayed = apply_recipe(model, json.loads(json.dumps(plan.recipe)))
    replayed.load_state_dict(folded.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(replayed(*copy.deepcopy(inputs)), folded(*copy.deepcopy(inputs)))
    return plan, folded


FEWER_SOURCES = {
    "adaptive_instance", "adaptive_momentum", "conditional", "domain", "evonorm_b0", "evonorm_s0", "learned_groups",
    "multiscale", "positional", "virtual",
}  # fmt: skip
"""Kinds that are tried on one source of each sort: all pairs would take minutes."""
