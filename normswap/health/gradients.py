"""The gradient that flows through every norm, on one batch.

The loss is the caller's, or a random projection of the model's floating outputs: the sum of their products with
standard normal values (seed 0), divided by the square root of their number. Norms that train run in train mode, all
else (dropout) in eval mode; where that does not run, as on a batch of one value a channel, all is in eval mode.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from normswap.calibration.batches import Forward, floats, run
from normswap.engine.sites import Site
from normswap.errors import NormswapError
from normswap.graph.observe import eval_mode
from normswap.graph.trace import brief
from normswap.health.checks import GRADIENT_SPAN, Finding, finding

Loss = Callable[[Any, Any], Tensor]
"""Of the model's output and the batch, a tensor of one value."""
PROJECTION = "a random projection of the output (seed 0)"
Flow = dict[str, tuple[float, float]]
"""By name, the root mean square of the gradient at the output of a norm, and at its input through it alone."""


def gradients(
    model: nn.Module, sites: Sequence[Site], batch: Any, forward: Forward | None, loss: Loss | None
) -> tuple[Flow, str]:
    """The gradients, and in which mode they were taken. Raises :class:`NormswapError` with the reason when there are
    none."""
    training = [site.module for site in sites if site.norm is not None and not site.norm.fixed and not site.functional]
    if model.training:
        training = [module for module in training if module.training]
    try:
        return _gradients(model, sites, batch, forward, loss, training), "norms in train mode"
    except Exception as first:
        if not training:
            raise NormswapError(brief(first)) from first
    try:
        return _gradients(model, sites, batch, forward, loss, []), "all in eval mode, as train mode does not run"
    except Exception as error:
        raise NormswapError(brief(error)) from error


def _gradients(
    model: nn.Module,
    sites: Sequence[Site],
    batch: Any,
    forward: Forward | None,
    loss: Loss | None,
    training: Sequence[nn.Module],
) -> Flow:
    taken: dict[str, list[Tensor]] = {}
    given: dict[str, list[Tensor]] = {}

    def before(site: Site) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
                return None
            leaf = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            taken.setdefault(site.name, []).append(own := leaf.clone())
            return (own, *args[1:])

        return hook

    def after(site: Site) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                return output
            given.setdefault(site.name, []).append(output)
            return output.clone()  # what is written over in place

        return hook

    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.enable_grad())
        for module in training:
            module.training = True
        for site in sites:
            if site.norm is not None and not site.functional:
                stack.callback(site.module.register_forward_pre_hook(before(site)).remove)
                stack.callback(site.module.register_forward_hook(after(site)).remove)
        output = run(model, batch, forward)
        value = projected(output) if loss is None else loss(output, batch)
        names = [name for name in given if name in taken]
        wanted = [tensor for name in names for tensor in (*given[name], *taken[name]) if tensor.requires_grad]
        found = torch.autograd.grad(value.sum(), wanted, allow_unused=True)
    by_tensor = {id(tensor): gradient for tensor, gradient in zip(wanted, found, strict=True)}

    def rms(tensors: Sequence[Tensor]) -> float:
        squares = sum(float(g.double().square().sum()) for t in tensors if (g := by_tensor.get(id(t))) is not None)
        return float((squares / max(sum(tensor.numel() for tensor in tensors), 1)) ** 0.5)

    return {name: (rms(given[name]), rms(taken[name])) for name in names}


def projected(output: Any) -> Tensor:
    """The default loss."""
    tensors = [tensor for tensor in floats(output) if tensor.requires_grad]
    if not tensors:
        raise NormswapError("no floating output of the model depends on a norm")
    generator = torch.Generator().manual_seed(0)
    parts = []
    for tensor in tensors:
        random = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        parts.append((tensor * random).sum() / max(tensor.numel(), 1) ** 0.5)
    return torch.stack([part.double().cpu() for part in parts]).sum()


def check_gradients(flow: Flow) -> Iterator[Finding]:
    """Which norms get no gradient, or one far from that of the others."""
    sizes = {name: given for name, (given, _) in flow.items()}
    live = [size for size in sizes.values() if 0 < size < float("inf")]
    middle = statistics.median(live) if live else 0.0
    for name, size in sizes.items():
        if size != size or size == float("inf"):
            yield finding("gradient-not-finite", name, f"the gradient at its output is {size}")
        elif size == 0:
            yield finding("no-gradient", name, "the gradient at its output is 0")
        elif size * GRADIENT_SPAN < middle:
            yield finding("vanishing-gradient", name, f"{size:.2g}, the median over all norms is {middle:.2g}")
        elif size > middle * GRADIENT_SPAN:
            yield finding("exploding-gradient", name, f"{size:.2g}, the median over all norms is {middle:.2g}")
