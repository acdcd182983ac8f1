"""A self-normalizing network (Klambauer et al., arXiv 1706.02515): SELU and LeCun's weights do what the norms did.

The norms go. The dataflow tells which activation stands behind each (behind a sum, a pooling or a reshape
too), which dropout behind that, and which layer in front. An activation becomes SELU where all of its calls stand
behind a norm that goes. With ``init="reset"`` the layers in front get LeCun's normal weights and biases of zeros; with
``"copy"`` they keep theirs. A layer without a bias gets one of zeros where the norm behind it had one."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules import pooling

from normswap import registry
from normswap.engine import swaps
from normswap.engine.dataflow import Dataflow
from normswap.engine.network import Network, change
from normswap.engine.plan import Change, Plan, Skip
from normswap.engine.select import excluded
from normswap.engine.sites import Site
from normswap.engine.weighted import layer_sites, plain_weight
from normswap.errors import check_whole
from normswap.fold.passages import Flow
from normswap.graph.references import Reference

_FUNCTIONS = frozenset({
    F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.celu, F.gelu,
    F.silu, F.mish, F.hardswish, F.prelu, F.softplus, F.dropout, F.dropout2d, F.dropout3d, torch.dropout,
})  # fmt: skip
_METHODS = frozenset({"relu", "relu_", "prelu"})
_PASSES = frozenset({
    operator.add, operator.iadd, torch.add, torch.flatten, torch.reshape, torch.cat, torch.concat, torch.permute,
    torch.transpose, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.avg_pool2d, F.max_pool2d,
})  # fmt: skip
_PASSES_METHODS = frozenset({"add", "add_", "flatten", "reshape", "view", "contiguous", "permute", "transpose", "mean"})
_POOLING = (
    pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
_PASSES_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, *_POOLING)


@dataclass
class Behind:
    """What the dataflow shows around the norms that go."""

    activations: dict[int, set[fx.Node]] = field(default_factory=dict)
    """Calls of activations, by ``id`` of the module."""
    dropouts: dict[int, set[fx.Node]] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)
    """Activations and dropouts that are functions: a name, and the function."""
    layers: dict[int, int] = field(default_factory=dict)
    """Layers in front, by ``id``: the channels of the bias that a norm behind took with it, or 0."""


@registry.plans("selu")
def plan_selu(model: nn.Module, *, seed: int = 0, **selection: Any) -> Plan:
    """Norms go, activations behind them become SELU, dropouts alpha dropout; see above. ``seed`` is for the weights
    that ``init="reset"`` draws, the same for a layer of the same name."""
    check_whole("seed", seed, 0)
    network = Network.of(model, "selu", selection, lambda site: False, _nameable)
    if network.init == "preserve":
        why = "a network without norms computes another function (init='preserve')"
        return network.plan([], [Network.stays(site, site.reason or why) for site in network.norms])
    norms = network.companions("identity")
    flow = Dataflow(model, network.found, network.example_inputs)
    going = {change.name for change in norms.changes}
    sites = [site for site in network.norms if site.name in going]
    behind, inside = Behind(), _followers(sites)
    gone = {id(site.module) for site in sites if site.call is None}
    for site in sites:
        for place, node in flow.sites(site.module) if site.call is None else []:
            _in_front(place, node, site, behind)
            _walk(place, node, gone, behind)
    changes, skips = _activations(network, flow, behind, inside, gone)
    by_name = {reference.name: key for key, reference in network.found.items()}
    becoming = {by_name[change.name] for change in changes}
    _dropouts_behind(flow, becoming, gone, behind)
    for each in (_dropouts(network, flow, behind), _layers(network, flow, behind, seed)):
        changes += each[0]
        skips += each[1]
    words = "it is a function; of activations and dropouts only modules change"
    skips += [Skip(name, f"{function}: {words}", was=function) for name, function in behind.functions.items()]
    notes = [*norms.notes, *flow.notes]
    if any(site.call is not None for site in sites):
        notes.append("what stands behind norms that are function calls is not looked for")
    return network.plan([*norms.changes, *changes], [*norms.skips, *skips], notes)


def _nameable(found: Mapping[int, Reference]) -> list[Site]:
    """What ``skip`` may name besides norms."""
    swapped = [r for r in found.values() if swaps.activation(r.module) or swaps.dropout(r.module)]
    return [*(_site(reference) for reference in swapped), *layer_sites(found)]


def _followers(sites: list[Site]) -> dict[int, nn.Module]:
    """Activations that run inside the modules of the norms."""
    inside = (module for site in sites if site.norm is not None for module in site.norm.then)
    return {id(module): module for module in inside if swaps.activation(module)}


def _in_front(flow: Flow, node: fx.Node, site: Site, behind: Behind) -> None:
    """The layer whose output a norm takes."""
    assert site.norm is not None
    source: Any = node.args[0] if node.args else None
    while isinstance(source, fx.Node):
        module = flow.module(source)
        if module is None or not (isinstance(module, nn.Identity) or swaps.dropout(module)):
            break
        source = source.args[0]
    module = flow.module(source) if isinstance(source, fx.Node) else None
    if module is not None:
        lost = site.norm.channels if site.norm.bias is not None else 0
        behind.layers[id(module)] = max(lost, behind.layers.get(id(module), 0))


def _walk(flow: Flow, node: fx.Node, gone: set[int], behind: Behind) -> None:
    """The activations that a value reaches before the next layer."""
    for reached in _reached(flow, node, gone):
        module = flow.module(reached)
        if module is not None and (swaps.activation(module) or swaps.bounded(module)):
            behind.activations.setdefault(id(module), set()).add(reached)
        elif module is None and _function(reached):
            behind.functions.setdefault(_name(flow, reached), _function(reached))


def _dropouts_behind(flow: Dataflow, becoming: set[int], gone: set[int], behind: Behind) -> None:
    """The dropouts that the output of a SELU reaches before the next layer."""
    for place in flow.flows:
        for node in place.region.graph.nodes:
            module = place.module(node)
            if module is None or not (id(module) in becoming or any(id(m) in becoming for m in module.children())):
                continue
            for reached in _reached(place, node, gone, through_dropouts=True):
                found = place.module(reached)
                if found is not None and swaps.dropout(found):
                    behind.dropouts.setdefault(id(found), set()).add(reached)


def _reached(flow: Flow, start: fx.Node, gone: set[int], through_dropouts: bool = True) -> Iterator[fx.Node]:
    """Everything behind a node, up to and with what is no passage."""
    seen, pending = {start}, list(start.users)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        module = flow.module(node)
        if module is not None:
            passes = isinstance(module, _PASSES_MODULES) or swaps.dropout(module) or id(module) in gone
        else:
            passes = node.target in (_PASSES if node.op == "call_function" else _PASSES_METHODS)
            passes = passes or "dropout" in _function(node)
        if passes:
            pending.extend(node.users)


def _function(node: fx.Node) -> str:
    """The name of an activation or dropout that is a function; empty for others."""
    if node.op == "call_function" and node.target in _FUNCTIONS:
        return str(getattr(node.target, "__name__", node.target))
    return str(node.target) if node.op == "call_method" and node.target in _METHODS else ""


def _name(flow: Flow, node: fx.Node) -> str:
    """A name for a call of a function, below the module whose ``forward`` calls it."""
    stack = node.meta.get("nn_module_stack") or {}
    owner = str(next(reversed(stack), "")) if stack else ""
    inner = f"{owner}.{node.name}" if owner else node.name
    return flow.region.qualified(inner)


def _site(reference: Reference) -> Site:
    module = reference.module
    return Site(reference.name, swaps.describe(module), module, None, tuple(reference.names[1:]))


def _skipped(site: Site, network: Network) -> str | None:
    """Why a part is left out: by name only, for ``where`` and functions choose norms, which take their parts along."""
    return None if callable(network.skip) else excluded(site, None, network.skip)


def _activations(
    network: Network, flow: Dataflow, behind: Behind, inside: Mapping[int, nn.Module], gone: set[int]
) -> tuple[list[Change], list[Skip]]:
    changes: list[Change] = []
    skips: list[Skip] = []
    for key, reference in network.found.items():
        module = reference.module
        if not swaps.activation(module) and not (swaps.bounded(module) and key in behind.activations):
            continue
        site = _site(reference)
        if swaps.bounded(module):
            reason: str | None = f"{type(module).__name__} bounds its output, which SELU does not"
        elif key not in inside:
            reason = _all_behind(flow, module, behind.activations.get(key, set()), "a norm that goes")
        else:
            reason = _inside(reference, flow, behind, gone)
        if (reason := _skipped(site, network) or reason or _fixed(reference)) is not None:
            skips.append(Network.stays(site, reason))
        else:
            lost = ("weight",) if any(True for _ in module.parameters()) else ()
            changes.append(change(site, "selu", "SELU()", "retrain", lost=lost))
    return changes, skips


def _dropouts(network: Network, flow: Dataflow, behind: Behind) -> tuple[list[Change], list[Skip]]:
    changes: list[Change] = []
    skips: list[Skip] = []
    for key, reference in network.found.items():
        module = reference.module
        if not swaps.dropout(module):
            continue
        site = _site(reference)
        reason = _all_behind(flow, module, behind.dropouts.get(key, set()), "an activation that becomes SELU")
        if (reason := _skipped(site, network) or reason or _fixed(reference)) is not None:
            skips.append(Network.stays(site, reason))
        else:
            words = site.label.replace(type(module).__name__, type(swaps.replacement(module)).__name__)
            changes.append(change(site, "selu", words, "exact", notes=("train mode keeps mean and variance",)))
    return changes, skips


def _all_behind(flow: Dataflow, module: nn.Module, seen: set[fx.Node], what: str) -> str | None:
    """Why not all calls of a module stand behind ``what``; or ``None``."""
    if not seen:
        return f"it does not stand behind {what}"
    if any(node not in seen for _, node in flow.sites(module)):
        return f"it is called elsewhere too, where it does not stand behind {what}"
    return flow.unsettled(module)


def _inside(reference: Reference, flow: Dataflow, behind: Behind, gone: set[int]) -> str | None:
    """Why an activation that runs inside norms that go has to stay: others have it too."""
    if any(registry.registered(holder) and id(holder) not in gone for holder in reference.parents):
        return "a norm that stays has it too"
    calls = [node for _, node in flow.sites(reference.module)]
    if set(calls) - behind.activations.get(id(reference.module), set()):
        return "it is called elsewhere too, where it does not stand behind a norm that goes"
    return None


def _fixed(reference: Reference) -> str | None:
    if reference.captured is not None:
        return f"{reference.captured} also holds it in a closure or object, where a replacement would not be seen"
    return None


def _layers(network: Network, flow: Dataflow, behind: Behind, seed: int) -> tuple[list[Change], list[Skip]]:
    """The layers in front of the norms: drawn anew, or given the bias that their norm took with it."""
    changes: list[Change] = []
    skips: list[Skip] = []
    reset = network.init == "reset"
    for site in layer_sites(network.found):
        module: Any = site.module
        if id(module) not in behind.layers:
            continue
        bias = behind.layers[id(module)] if module.bias is None else 0
        why = flow.asks_for_bias(module) if bias else None
        bias = 0 if why else bias
        if not reset and not bias:
            continue
        reason = site.reason or _skipped(site, network) or plain_weight(module)
        if reason is not None:
            skips.append(Network.stays(site, reason))
            continue
        words = ["LeCun weights" if reset else "", "a bias of zeros" if bias else ""]
        told = f"{site.label} with {' and '.join(filter(None, words))}"
        changes.append(
            change(
                site,
                "selu",
                told,
                "retrain" if reset else "exact",
                notes=() if why is None else (why,),
                options={"seed": seed, "bias": bias},
                init=network.init,
            )
        )
    return changes, skips
