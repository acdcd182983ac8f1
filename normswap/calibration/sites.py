"""Which norms of a converted model are fitted, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from normswap import registry
from normswap.calibration.fit import Layout, Values
from normswap.calibration.heads import LARGEST
from normswap.engine.sites import Site, survey
from normswap.errors import Refusal
from normswap.graph.lift import lift
from normswap.graph.references import references
from normswap.norms.then import Followed
from normswap.spec import Norm, exactness, reference, scale_shift


@dataclass(frozen=True)
class Left:
    """A norm that is not fitted, and why."""

    name: str
    reason: str


@dataclass
class NormSite:
    """A norm whose affine, and running statistics if it has any, are fitted to those of another norm."""

    name: str
    module: nn.Module
    norm: Norm
    original: nn.Module | None
    """The reference's norm there; ``None`` where only running statistics are estimated."""
    source: Norm | None

    @property
    def layout(self) -> Layout:
        shape = self.norm.shape or (self.norm.channels,)
        return Layout(self.norm.channel_axis, shape)

    @property
    def statistics(self) -> bool:
        """Whether it has running statistics that follow its input."""
        return self.norm.has_statistics and not self.norm.fixed and "batch" in self.norm.pools

    def values(self) -> Values:
        """Its affine and statistics as they are, copied."""
        device = device_of(self.norm)
        weight, bias = (
            torch.full((self.layout.size,), neutral, dtype=torch.float64, device=device)
            if tensor is None
            else tensor.detach().double().reshape(-1).clone()
            for tensor, neutral in ((self.norm.weight, 1.0), (self.norm.bias, 0.0))
        )
        return Values(weight, bias, *(_copied(t) for t in (self.norm.running_mean, self.norm.running_var)))

    def bare_output(self, x: Tensor, output: Tensor) -> Tensor:
        """The norm's output before what follows it, of a module whose affine is 1 and 0."""
        if not self.norm.follows or isinstance(self.module, Followed):
            return output
        return reference(x, replace(self.norm, weight=None, bias=None)).to(output.dtype)

    def followed(self, output: Tensor) -> Tensor:
        for module in self.norm.then:
            output = module(output)
        return output

    def original_output(self, x: Tensor, output: Tensor) -> Tensor:
        """The original norm's output before what follows it."""
        assert self.source is not None
        return reference(x, self.source).to(output.dtype) if self.source.follows else output


@dataclass
class LinearSite:
    """A layer behind a fitted norm whose bias takes up the mean that the norms could not match, or, behind all of them,
    whose weight and bias are fitted."""

    name: str
    module: nn.Module
    original: nn.Module
    bias: Tensor
    layout: Layout
    weight: Tensor | None = None
    """Where it can be fitted: that of a layer that sees one position at a time."""

    @property
    def originals(self) -> list[Tensor]:
        """Weight and bias of the reference's layer, those that are stored."""
        stored = self.original._parameters
        return [tensor for name in ("weight", "bias") if (tensor := stored.get(name)) is not None]


def device_of(norm: Norm) -> torch.device:
    return next((tensor.device for tensor in norm.tensors.values()), torch.device("cpu"))


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().clone()


def pairs(model: nn.Module, original: nn.Module) -> tuple[list[NormSite], list[Left]]:
    """The converted norms of ``model`` with those of ``original`` under the same names, and the norms left alone."""
    ours, theirs = (survey(references(each)) for each in (model, original))
    by_name = {name: site for site in theirs for name in (site.name, *site.aliases)}
    users = parameter_users(model)
    sites: list[NormSite] = []
    left: list[Left] = []
    for site in ours:
        there = by_name.get(site.name)
        reason = _alone(site, there, users)
        if reason is not None:
            left.append(Left(site.name, reason))
            continue
        assert site.norm is not None
        assert there is not None
        sites.append(NormSite(site.name, site.module, site.norm, there.module, there.norm))
    known = {name for site in ours for name in (site.name, *site.aliases)}
    gone = (site.name for site in theirs if not known.intersection((site.name, *site.aliases)))
    left.extend(Left(name, "the model has no norm of this name") for name in gone)
    return sites, left


def _alone(site: Site, there: Site | None, users: dict[int, int]) -> str | None:
    """Why a norm is not fitted."""
    if there is None:
        return "the reference has no norm of this name"
    for which, each in (("model", site), ("reference", there)):
        if each.norm is None:
            return f"what it computes in the {which} is not known: {each.reason}"
    norm, source = site.norm, there.norm
    assert norm is not None
    assert source is not None
    if norm.channels != source.channels:
        return f"it has {norm.channels} channels, and {source.channels} in the reference"
    plain = [replace(each, weight=None, bias=None) for each in (source, norm)]
    if exactness(*plain) == "exact":
        return "it normalizes as in the reference"
    if scale_shift(norm) is not None and scale_shift(source) is not None:
        return "it is a fixed affine here and in the reference; recalibrate(model, batches) sets its statistics"
    if site.functional or there.functional:
        return "it is a function call; only modules are fitted"
    return unfit(site, users)


def unfit(site: Site, users: dict[int, int]) -> str | None:
    """Why a norm's tensors cannot be set."""
    norm = site.norm
    assert norm is not None
    if norm.fixed:
        return "it is frozen"
    own = {id(t) for t in (*site.module._parameters.values(), *site.module._buffers.values()) if t is not None}
    for name, tensor in norm.tensors.items():
        if name in ("weight", "bias", "running_mean", "running_var"):
            if id(tensor) not in own:
                return f"its {name} is computed from other tensors, not stored"
            if users.get(id(tensor), 0) > 1:
                return f"its {name} is shared with another module, which would change too"
    if norm.weight is None and norm.bias is None and not norm.has_statistics:
        return "it has neither weight nor bias to set"
    return None


def parameter_users(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter and buffer, by ``id``."""
    users: dict[int, int] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                users[id(tensor)] = users.get(id(tensor), 0) + 1
    return users


_LINEAR = {
    cls.forward: cls
    for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
}


@dataclass
class PlainLayer:
    """A linear layer or convolution of the model that computes what its class does."""

    name: str
    module: Any
    others: set[int]
    """``id`` of the tensors that other modules hold too, or the reference."""

    @property
    def axis(self) -> int:
        """That of the channels in the output."""
        return 1 if isinstance(self.module, _ConvNd) else -1

    def owns(self, name: str) -> bool:
        """Whether it has a parameter of its own of this name."""
        tensor = self.module._parameters.get(name)
        return tensor is not None and id(tensor) not in self.others

    @property
    def pointwise(self) -> bool:
        """Whether it is ``weight @ x + bias`` at each position."""
        module = self.module
        if not isinstance(module, _ConvNd):
            return True
        if module.transposed or module.groups > 1:
            return False
        return set(module.kernel_size) == {1} and set(module.stride) == {1} and set(module.padding) == {0}


def plain_layers(model: nn.Module, original: nn.Module) -> Iterator[PlainLayer]:
    """The linear layers and convolutions, in the order of the modules; not those whose weight is computed."""
    held = {parameter.data_ptr() for parameter in original.parameters()}
    users = parameter_users(model)
    others = {id(each) for each in model.parameters() if users[id(each)] > 1 or each.data_ptr() in held}
    for name, module in model.named_modules():
        plain = getattr(type(module), "forward", None) in _LINEAR and "forward" not in vars(module)
        if plain and not is_parametrized(module):
            yield PlainLayer(name, module, others)


def linear_sites(model: nn.Module, original: nn.Module) -> list[LinearSite]:
    """The linear layers with a bias of their own that both models have; those behind no fitted norm stay as they
    are, and those whose bias is the reference's own too."""
    theirs = dict(original.named_modules())
    found = []
    for layer in plain_layers(model, original):
        there: Any = theirs.get(layer.name)
        if not layer.owns("bias") or there is None or getattr(there, "bias", None) is None:
            continue
        bias, weight = layer.module.bias, layer.module.weight
        fits = layer.owns("weight") and layer.pointwise and weight.shape[1] <= LARGEST
        layout = Layout(layer.axis, (bias.shape[0],))
        found.append(LinearSite(layer.name, layer.module, there, bias, layout, weight if fits else None))
    return found


@contextmanager
def functional_as_modules(model: nn.Module) -> Iterator[None]:
    """Within it, the norms that a ``forward`` of ``model`` calls as functions are modules, where they can be."""
    owners: dict[int, tuple[Any, dict[str, nn.Module]]] = {}
    for site in survey(references(model)):
        if site.call is None or site.forward is None or site.norm is None or site.reason is not None:
            continue
        try:
            built = registry.builder(site.norm.kind)(site.norm) if site.norm.kind in registry.kinds() else None
        except Refusal:
            continue
        if built is not None:
            built.train(site.module.training)
            owners.setdefault(id(site.module), (site.forward, {}))[1][site.call.name] = built
    undo: list[Callable[[], None]] = []
    try:
        for forward, modules in owners.values():
            undo.append(lift(forward, modules, keep_tensors=True))
        yield
    finally:
        while undo:
            undo.pop()()
