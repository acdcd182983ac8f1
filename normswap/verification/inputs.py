"""The sets of inputs a comparison runs on: given, read from files, and seeded random ones of the same kind."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from normswap.errors import NormswapError
from normswap.onnx.export import check_inputs, one_line

Arguments = tuple[Any, ...]
SUFFIXES = (".npy", ".npz", ".pt", ".pth")


@dataclass(frozen=True)
class Variation:
    """One set of inputs: given ones, or random ones of the same shapes (but for the batch and the size) and dtypes."""

    name: str
    seed: int | None = None
    """Of the generator that drew them; ``None`` for given inputs."""
    magnitude: float | None = None
    """Factor on normal values with the mean and deviation of the given ones."""
    batch: int | None = None
    """Size of the first axis where it is not the given one."""
    size: float | None = None
    """Factor on the spatial axes where it is not 1."""


@dataclass(frozen=True)
class Freedom:
    """Which axes a program leaves open."""

    batch: bool = False
    spatial: bool = False


class Variations:
    """The given inputs, then seeded random ones: three magnitudes, and where allowed other batch sizes and sizes.

    Other sizes are those of the axes behind the second, of floating-point tensors with at least three."""

    def __init__(
        self, given: Arguments, more: Iterable[tuple[str, Arguments]], freedom: Freedom, *, vary: bool = True
    ) -> None:
        self.given = given
        self.more = more
        self.vary = vary
        self.notes: list[str] = []
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        sizes = {leaf.shape[0] if leaf.dim() else 0 for leaf in tensors}
        size = sizes.pop() if freedom.batch and len(sizes) == 1 else 0
        self.batches = [batch for batch in (1, size + 1 if size > 1 else 3) if size > 0 and batch != size]
        self.sizes = [0.75, 1.25] if freedom.spatial and any(map(_has_size, tensors)) else []
        self.random = any(leaf.is_floating_point() for leaf in tensors)
        if vary and not self.random:
            self.notes.append("no input is floating-point, so only the given values are tried")

    def __iter__(self) -> Iterator[tuple[Variation, Arguments]]:
        yield Variation("given"), self.given
        for name, inputs in self.more:
            yield Variation(name), inputs
        if not self.vary:
            return
        plans: list[tuple[float, int | None, float | None]] = [(1.0, batch, None) for batch in self.batches]
        if self.random:
            plans = [(1.0, None, None), (0.1, None, None), (10.0, None, None), *plans]
            plans += [(1.0, None, size) for size in self.sizes]
        for seed, (magnitude, batch, size) in enumerate(plans):
            name = f"seed {seed}, magnitude {magnitude:g}"
            name += "" if batch is None else f", batch {batch}"
            name += "" if size is None else f", {size:g} times the size"
            variation = Variation(name, seed, magnitude, batch, size)
            generator = torch.Generator().manual_seed(seed)
            yield variation, tree_map(lambda leaf, v=variation, g=generator: _drawn(leaf, v, g), self.given)


def _has_size(leaf: Tensor) -> bool:
    return leaf.is_floating_point() and leaf.dim() > 2


def _drawn(leaf: Any, variation: Variation, generator: torch.Generator) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if variation.batch is not None:
        leaf = leaf[torch.arange(variation.batch, device=leaf.device) % leaf.shape[0]]
    if not leaf.is_floating_point() or not leaf.numel():
        return leaf
    values = leaf.detach().double()
    mean, deviation = values.mean(), values.std(correction=0)
    if variation.size is not None and _has_size(leaf):
        shape = [*leaf.shape[:2], *(max(1, round(size * variation.size)) for size in leaf.shape[2:])]
        leaf = leaf.new_empty(shape)
    noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
    spread = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    drawn = torch.empty_like(leaf)  # Keeps the memory format.
    return drawn.copy_((mean + spread * noise) * (variation.magnitude or 1.0))


def load_inputs(path: str | os.PathLike[str]) -> list[tuple[str, Arguments]]:
    """The sets of inputs in a file, each with a name for the report.

    A ``.npy`` file is one tensor, a ``.npz`` file the arguments of one call in the order of the file, a ``.pt`` file
    (read with ``weights_only=True``) a tensor, the tuple of arguments of one call, or a list of such sets. Raises
    :class:`NormswapError` for another suffix, a file that cannot be read so, and arrays that are no numbers.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise NormswapError(f"{path}: inputs are read from {', '.join(SUFFIXES)} files")
    try:
        if path.suffix in (".pt", ".pth"):
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            loaded = numpy.load(path, allow_pickle=False)
            content = loaded if isinstance(loaded, numpy.ndarray) else tuple(loaded[name] for name in loaded.files)
        sets = content if isinstance(content, list) else [content]
        arguments = [_arguments(each) for each in sets]
    except NormswapError:
        raise
    except Exception as error:
        raise NormswapError(f"{path} cannot be read as inputs: {one_line(error)}") from error
    if not arguments or not all(arguments):
        raise NormswapError(f"{path} holds no inputs")
    if len(arguments) == 1:
        return [(path.name, arguments[0])]
    return [(f"{path.name} [{index}]", each) for index, each in enumerate(arguments)]


def _arguments(value: Any) -> Arguments:
    arguments = tree_map(_tensor, value if isinstance(value, tuple) else (value,))
    check_inputs(arguments)
    return tuple(arguments)


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, numpy.ndarray) else value
