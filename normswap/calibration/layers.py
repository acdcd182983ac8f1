"""Layers whose weight a distillation may move: linear layers and 1 x 1 convolutions, which see one position at a time.

What is trained is not the weight but what is added to it, in at least float32 and in units of the root mean square of
the layer's weight, so that one rate suits all. A hook adds what it gives to the layer's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normswap.calibration.heads import product
from normswap.calibration.sites import LinearSite, plain_layers
from normswap.calibration.taps import first_tensor
from normswap.calibration.write import Writes, cast


@dataclass(frozen=True)
class Moved:
    """A layer and what its weight shall be."""

    name: str
    module: nn.Module
    weight: Tensor
    """The parameter."""
    axis: int
    """That of the channels in the output."""
    value: Tensor
    """In at least float32, of the parameter's shape; the parameter's own values at the start."""

    @property
    def unit(self) -> Tensor:
        return self.value.square().mean().sqrt()

    def by(self, step: Tensor) -> Moved:
        """Moved by ``step``, which is in units of :attr:`unit`."""
        return replace(self, value=self.value + self.unit * step.detach())

    @property
    def changes(self) -> bool:
        return not torch.equal(self.value.to(self.weight.dtype), self.weight)

    def writes(self) -> Writes:
        return [(self.weight, cast(self.name, self.weight, self.value))]


def movable(model: nn.Module, original: nn.Module, heads: Sequence[LinearSite]) -> list[Moved]:
    """The layers whose weight is their own, as they are; not those whose weight is shared or the reference's, and not
    ``heads``, which are fitted in closed form."""
    fitted = {id(head.module) for head in heads}
    found = []
    for layer in plain_layers(model, original):
        if layer.pointwise and layer.owns("weight") and id(layer.module) not in fitted:
            weight: Any = layer.module.weight
            value = weight.detach().to(torch.promote_types(torch.float32, weight.dtype), copy=True)
            found.append(Moved(layer.name, layer.module, weight, layer.axis, value))
    return found


def zeros(layers: Sequence[Moved]) -> list[Tensor]:
    """Zeros to be trained, one tensor a layer."""
    return [torch.zeros_like(layer.value).requires_grad_() for layer in layers]


@contextmanager
def stepping(layers: Sequence[Moved], by: Sequence[Tensor]) -> Iterator[None]:
    """Within it the layers give what they would moved ``by`` as much, with gradients."""
    handles: list[Any] = []

    def adding(layer: Moved, step: Tensor) -> Any:
        unit = layer.unit

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            return output + product(unit * step.flatten(1), first_tensor(args, kwargs), layer.axis)

        return hook

    try:
        for layer, step in zip(layers, by, strict=True):
            handles.append(layer.module.register_forward_hook(adding(layer, step), with_kwargs=True, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
