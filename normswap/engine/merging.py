"""Making the merges of a plan, and undoing them bit for bit.

The host gets the kernel of the sum; the module that added the branches up keeps its identity and gets a ``forward``
that calls the host instead. The other convolutions become ``nn.Identity``, scales become ``None``: nothing calls them,
and no parameter of theirs is left. The norms are made to vanish as in any fold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.engine.folding import apply_fold
from normswap.engine.plan import Change, Merge
from normswap.errors import NormswapError, Refusal
from normswap.fold.branches import Taps, itself, merged_kernel, taps_of
from normswap.graph.references import Reference, references
from normswap.graph.rewrite import Before, copied_graphs, install, traced_forward

Undo = list[Callable[[], None]]


def apply_merged(
    merges: Sequence[Merge], model: nn.Module, changes: Sequence[Change], undoable: bool = True
) -> tuple[nn.Module, Callable[[], None]]:
    """Make merges, then the folds around them, in place; returns the model and what undoes them, bit for bit.

    An error undoes what was done; with ``undoable=False``, which keeps no old weights, the merge or norm at hand.
    Either way the model computes what it did.
    """
    undo_merges = apply_merges(model, merges, undoable=undoable)
    try:
        result, undo_folds = apply_fold(model, changes, undoable)
    except BaseException:
        undo_merges()
        raise

    def back() -> None:
        undo_folds()
        undo_merges()

    return result, back


def apply_merges(
    model: nn.Module, merges: Sequence[Merge], *, own_parameters: bool = False, undoable: bool = True
) -> Callable[[], None]:
    """Make merges in place, as :func:`apply_merged` does; returns what undoes them, bit for bit.

    ``own_parameters``: the model shares its parameters with another one, so hosts get new ones."""
    found = references(model)
    by_name = {name: reference for reference in found.values() for name in reference.names}
    undo: Undo = []

    def back() -> None:
        while undo:
            undo.pop()()

    try:
        for holder, group in groupby(merges, key=lambda merge: merge.holder):
            own = list(group)
            _check(own, by_name)
            _rewrite(by_name[holder].module, own, undo)
            for merge in own:
                _fill(merge, by_name, undo, own_parameters)
            if not undoable:  # the norms that are still there are not called any more
                undo.clear()
    except BaseException:
        back()
        raise
    return back


def _check(merges: Iterable[Merge], by_name: dict[str, Reference]) -> None:
    for merge in merges:
        names = (merge.holder, merge.host, *merge.convolutions, *(owner for owner, _ in merge.tensors))
        if missing := [name for name in names if name not in by_name]:
            raise NormswapError(f"the model has no module {missing[0]!r}, which the plan merges")


def merged_tensors(merge: Merge, by_name: Mapping[str, Reference]) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of the sum, of the host's dtype.

    Raises :class:`NormswapError` when they are not finite where those of its convolutions are."""
    host: Any = by_name[merge.host].module
    parts: list[tuple[Taps, Tensor | None, Tensor]] = []
    bias = merge.shift.to(host.weight.device).expand(merge.taps.outputs).clone()
    weights: list[Tensor] = []
    for name, scale in merge.parts:
        if name is None:
            parts.append((itself(merge.taps), None, scale))
            continue
        module: Any = by_name[name].module
        taps = taps_of(module)
        if isinstance(taps, str):
            raise NormswapError(f"{name} is not the convolution that the plan merges: {taps}")
        parts.append((taps, module.weight, scale))
        weights.append(module.weight)
        if module.bias is not None:
            bias = bias + scale.to(bias.device) * module.bias.detach().double()
    kernel = merged_kernel(merge.taps, parts, host.weight.device).to(host.weight.dtype)
    cast = bias.to(host.weight.dtype) if merge.bias else None
    finite = bool(kernel.isfinite().all()) and (cast is None or bool(cast.isfinite().all()))
    if not finite and all(bool(weight.isfinite().all()) for weight in weights):
        raise NormswapError(f"the merged values of {merge.host} are not finite in {host.weight.dtype}")
    return kernel.contiguous(memory_format=_memory_format(host.weight)), cast


def _memory_format(weight: Tensor) -> torch.memory_format:
    for rank, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if weight.dim() == rank and not weight.is_contiguous() and weight.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def _fill(merge: Merge, by_name: dict[str, Reference], undo: Undo, own_parameters: bool) -> None:
    """Put the sum into the host, and take the other branches away."""
    weight, bias = merged_tensors(merge, by_name)
    host: Any = by_name[merge.host].module
    taps, state = merge.taps, vars(host)
    if taps_of(host) != taps:
        changed = {
            "kernel_size": taps.kernel,
            "padding": taps.before,
            "dilation": taps.dilation,
            "groups": taps.groups,
            "_reversed_padding_repeated_twice": [p for p in reversed(taps.before) for _ in range(2)],
        }
        undo.append(partial(state.update, {name: state[name] for name in changed}))
        state.update(changed)
    for name, value in (("weight", weight), ("bias", bias)):
        old: nn.Parameter | None = host._parameters[name]
        if value is None:
            continue
        if old is None or own_parameters:
            like = host.weight if old is None else old
            undo.append(partial(host._parameters.__setitem__, name, old))
            host._parameters[name] = nn.Parameter(value, requires_grad=like.requires_grad)
        else:
            undo.append(partial(setattr, old, "data", old.data))
            old.data = value
    for name in merge.convolutions:
        reference = by_name[name]
        gone = nn.Identity().train(reference.module.training)
        for slot in reference.slots:
            undo.append(partial(slot.put, reference.module))
            slot.put(gone)
    for owner, attribute in merge.tensors:
        table: dict[str, Any] = by_name[owner].module._parameters
        undo.append(partial(table.__setitem__, attribute, table[attribute]))
        table[attribute] = None


def _rewrite(module: nn.Module, merges: Iterable[Merge], undo: Undo) -> None:
    """Give the holder a ``forward`` that calls the hosts."""
    before = Before(module)
    undo.append(before.restore)
    try:
        forward = traced_forward(module, "its forward adds up branches")
        graphs = copied_graphs(forward)
    except Refusal as refusal:
        raise NormswapError(f"the model no longer fits the plan: {refusal.reason}") from refusal
    for graph in graphs.values():
        named = {node.name: node for node in graph.nodes}
        for merge in merges:
            _replace(graph, named, merge)
    install(module, graphs, type(module))


def _replace(graph: fx.Graph, named: dict[str, fx.Node], merge: Merge) -> None:
    if missing := [name for name in (*merge.nodes, merge.source) if name not in named]:
        raise NormswapError(f"the forward of {merge.holder or 'the model'} no longer has {missing[0]!r}: plan again")
    root = named[merge.nodes[-1]]
    with graph.inserting_before(root):
        new = graph.call_module(merge.path, (named[merge.source],))
    root.replace_all_uses_with(new)
    named[root.name] = new  # it may be the source of the next
    for name in reversed(merge.nodes):
        graph.erase_node(root if name == merge.nodes[-1] else named[name])
