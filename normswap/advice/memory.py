"""Memory of one run: the most that its tensors hold at once, and what is kept for the backward pass.

Storages are counted from the operator that makes them until they are freed, those under :data:`SMALL` bytes not. What
an operator allocates for itself and frees before it returns (a workspace) is not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = 1 << 10


class Allocations(TorchDispatchMode):
    """Within it, new storages are counted; ``peak`` is the most bytes of them that were held at once."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._held = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage.nbytes() >= SMALL:
                self._take(StorageWeakRef(storage), storage.nbytes())
        return result

    def _take(self, reference: StorageWeakRef, size: int) -> None:
        if reference.cdata in self._known or reference.cdata in self._alive:
            return
        self._alive[reference.cdata] = (reference, size)
        if self._held + size > self.peak:  # only then what was freed matters
            self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
            self._held = sum(each[1] for each in self._alive.values()) - size
        self._held += size
        self.peak = max(self.peak, self._held)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.device.type != "meta"]


def peak(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that ``run()`` holds at once beyond the model's own parameters and buffers."""
    allocations = Allocations((*model.parameters(), *model.buffers()))
    with allocations:
        result = run()
    del result
    return allocations.peak


def saved(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once, parameters and buffers not."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result
    return sum(int(storage.nbytes()) for storage in kept.values())
