"""Hooks on the norms of the two models: what a norm computes goes out, and the affine that is to be tried comes in.

While a model is tapped its norms have the affine 1 and 0, and the hooks apply the affine instead. So several affines
can be tried side by side in one model, and an affine can be fitted to the value that it is then applied to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normswap.calibration.fit import Values
from normswap.calibration.sites import LinearSite, NormSite
from normswap.norms.then import Followed

Statistics = Callable[[int, Tensor], Values | None]
"""Index of a site and its input to the statistics it shall have; ``None`` leaves them."""
Affine = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Index of a site and its normalized value to weight and bias, in any shape of their size."""
Correct = Callable[[int, Tensor, Tensor], Tensor]
"""Index of a layer, its input and its output to the output it shall have."""
Watch = Callable[[str, int, Callable[[], Tensor]], None]
"""``"norm"`` or ``"linear"``, index, and what gives the original's output."""


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


@contextmanager
def tapped(
    sites: Sequence[NormSite],
    linear: Sequence[LinearSite],
    statistics: Statistics,
    affine: Affine | None,
    correct: Correct | None = None,
) -> Iterator[None]:
    """Within it the model's norms ask ``statistics`` before and ``affine`` after they run. At the end, also on an
    error, their tensors and hooks are as they were. Without ``affine`` the affine is left alone."""
    handles: list[Any] = []
    saved: list[tuple[Tensor, Tensor]] = []
    followed: list[tuple[Followed, tuple[str, ...]]] = []

    def before(index: int, site: NormSite) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = statistics(index, first_tensor(args, kwargs))
            if values is not None:
                set_statistics(site, values)

        return hook

    def after(index: int, site: NormSite, apply: Affine) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            z = site.bare_output(first_tensor(args, kwargs), output)
            weight, bias = (site.layout.broadcast(values, z) for values in apply(index, z))
            return site.followed(torch.addcmul(bias, z, weight))

        return hook

    def behind(index: int, change: Correct) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            return change(index, first_tensor(args, kwargs), output)

        return hook

    try:
        with torch.no_grad():
            for index, site in enumerate(sites):
                for name, tensor in site.norm.tensors.items():
                    if name in ("weight", "bias", "running_mean", "running_var"):
                        saved.append((tensor, tensor.detach().clone()))
                if site.statistics:
                    handles.append(site.module.register_forward_pre_hook(before(index, site), with_kwargs=True))
                if affine is None:
                    continue
                for affine_part, neutral in ((site.norm.weight, 1.0), (site.norm.bias, 0.0)):
                    if affine_part is not None:
                        affine_part.fill_(neutral)
                if isinstance(site.module, Followed):
                    followed.append((site.module, site.module.followers))
                    site.module.followers = ()
                hook = after(index, site, affine)
                handles.append(site.module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        for index, layer in enumerate(linear if correct is not None else ()):
            assert correct is not None
            hook = behind(index, correct)
            handles.append(layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, followers in followed:
            module.followers = followers
        with torch.no_grad():
            for held, value in saved:
                held.copy_(value)


def set_statistics(site: NormSite, values: Values) -> None:
    with torch.no_grad():
        for tensor, value in ((site.norm.running_mean, values.mean), (site.norm.running_var, values.var)):
            if tensor is not None and value is not None:
                tensor.copy_(value)


@contextmanager
def watched(sites: Sequence[NormSite], linear: Sequence[LinearSite], watch: Watch) -> Iterator[None]:
    """Within it, ``watch`` is told of every output of the reference's norms and layers."""
    handles: list[Any] = []

    def norm_hook(index: int, site: NormSite) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            watch("norm", index, lambda: site.original_output(first_tensor(args, kwargs), output))

        return hook

    def linear_hook(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            watch("linear", index, lambda: output)

        return hook

    try:
        for index, site in enumerate(sites):
            if site.original is not None:
                hook = norm_hook(index, site)
                handles.append(site.original.register_forward_hook(hook, with_kwargs=True, prepend=True))
        for index, layer in enumerate(linear):
            handles.append(layer.original.register_forward_hook(linear_hook(index), prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
