"""Batches for calibration, from what the command line is given.

``--data`` is a ``.npy``, ``.npz`` or ``.pt`` file, as :func:`normswap.verification.load_inputs` reads it, cut along its
first axis; a folder of images, see :mod:`normswap.images`; or ``package.module:callable``, which gives an iterable of
batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from normswap.arguments import named_object
from normswap.calibration import check_batches
from normswap.calibration.batches import run
from normswap.errors import NormswapError
from normswap.graph.observe import eval_mode
from normswap.graph.state import unmarked
from normswap.graph.trace import brief, retold
from normswap.images import ImageFolder, Preparation
from normswap.verification import load_inputs
from normswap.verification.inputs import SUFFIXES


def load_batches(text: str, size: int, preparation: Preparation | None = None) -> Iterable[Any]:
    """The batches that ``text`` names, those of a file or folder with at most ``size`` samples each.

    Raises :class:`NormswapError` for a file that cannot be read or whose tensors differ in their first axis, a folder
    without images, a callable that fails or gives no batches, a size below 1, and a ``preparation`` of what are no
    images."""
    if size < 1:
        raise NormswapError(f"--batch-size {size}: it must be at least 1")
    if Path(text).is_dir():
        return ImageFolder(text, size, preparation)
    if preparation is not None:
        raise NormswapError(f"--data {text!r} is no folder of images: --image-size and the like have no use")
    if Path(text).suffix in SUFFIXES:
        return [batch for name, inputs in load_inputs(text) for batch in _cut(name, inputs, size)]
    path, target = named_object(text, "--data")
    try:
        batches = target() if callable(target) else target
    except Exception as error:
        raise NormswapError(f"--data {text!r}: {path}() raised {type(error).__name__}: {error}") from error
    try:
        check_batches(batches)
    except NormswapError as error:
        raise NormswapError(f"--data {text!r}: {error}") from error
    return batches  # type: ignore[return-value]


def check_takes(model: nn.Module, batches: Iterable[Any], text: str) -> Iterable[Any]:
    """Run the model in eval mode on the first of the batches that ``text`` names, and leave no mark on it. Returns the
    batches, that one among them where they can be gone over only once.

    Raises :class:`NormswapError` where it does not run."""
    iterator = iter(batches)
    first = list(islice(iterator, 1))
    with torch.no_grad(), unmarked(model), eval_mode(model):
        for batch in first:
            with retold(f"--data {text!r}: the model does not run on batch 0"):
                run(model, batch, None)
    return chain(first, iterator) if isinstance(batches, Iterator) else batches


class Counted:
    """The batches that ``text`` names, with a way to run them that tells which of them fails."""

    def __init__(self, batches: Iterable[Any], text: str) -> None:
        self.batches, self.text = batches, text
        self._numbers: dict[int, int] = {}
        self._last = 0

    def __iter__(self) -> Iterator[Any]:
        """Raises :class:`NormswapError` for a batch that cannot be had."""
        iterator = iter(self.batches)
        for number in count():
            with retold(f"--data {self.text!r}: no batch {number}", (NormswapError, OSError)):
                batch = next(iterator, _END)
            if batch is _END:
                return
            self._last = number
            self._numbers.update((id(leaf), number) for leaf in _pytree.tree_leaves(batch))
            yield batch

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The model's output. Raises :class:`NormswapError` where it does not run."""
        known = [self._numbers[id(leaf)] for leaf in _pytree.tree_leaves(batch) if id(leaf) in self._numbers]
        with self.one_by_one(known[0] if known else None):
            return run(model, batch, None)

    @contextmanager
    def one_by_one(self, number: int | None = None) -> Iterator[None]:
        """Within it the model runs on each batch before the next is asked for, or on batch ``number``. Raises
        :class:`NormswapError` where it does not run."""
        try:
            yield
        except (NormswapError, OSError):
            raise
        except Exception as error:
            which = self._last if number is None else number
            told = f"--data {self.text!r}: the model does not run on batch {which}: {brief(error)}"
            raise NormswapError(told) from error


_END = object()


def parse_preparation(size: str | None, resize: int | None, mean: str | None, std: str | None) -> Preparation | None:
    """What ``--image-size``, ``--image-resize``, ``--image-mean`` and ``--image-std`` say; ``None`` where they say
    nothing. Raises :class:`NormswapError` for what is no size and no numbers."""
    if (size, resize, mean, std) == (None,) * 4:
        return None
    given: dict[str, Any] = {} if resize is None else {"resize": resize}
    if size is not None:
        sides = size.split("x")
        if len(sides) > 2 or not all(side.isdecimal() for side in sides):
            raise NormswapError(f"--image-size {size!r}: write 224, or height and width as 224x320")
        given["size"] = (int(sides[0]), int(sides[-1]))
    for name, text in (("mean", mean), ("std", std)):
        if text is not None:
            try:
                given[name] = tuple(float(part) for part in text.split(","))
            except ValueError:
                raise NormswapError(f"--image-{name} {text!r}: write numbers with commas, 0.5,0.5,0.5") from None
    return Preparation(**given)


def _cut(name: str, inputs: tuple[Any, ...], size: int) -> Iterator[tuple[Any, ...]]:
    counts = {value.shape[0] if value.dim() else 0 for value in inputs if isinstance(value, Tensor)}
    if len(counts) != 1 or not (samples := counts.pop()):
        raise NormswapError(f"--data {name}: its tensors must have one number of samples, along their first axis")
    for start in range(0, samples, size):
        yield tuple(value[start : start + size] if isinstance(value, Tensor) else value for value in inputs)
