"""Every place where a normalization runs, each with its ``Norm`` or the reason why there is none."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from normswap import registry
from normswap.errors import NormswapError, Refusal
from normswap.graph.functional import NAMES
from normswap.graph.lift import Call, Forward, functional_norms
from normswap.graph.observe import Observation, observe
from normswap.graph.reach import reach
from normswap.graph.references import Reference, references
from normswap.graph.sharded import REASON, spread
from normswap.graph.trace import LINEAR_LAYERS
from normswap.spec import Norm


@dataclass
class Site:
    """One place where a normalization runs."""

    name: str
    """Dotted name of the module; for a functional norm, the name that its module would get."""
    norm: Norm | None
    module: nn.Module
    """The norm itself, or the module whose ``forward`` calls the functional norm."""
    reason: str | None = None
    """Why it cannot be changed; ``None`` where it can."""
    aliases: tuple[str, ...] = ()
    evidence: str = "static"
    """``observed`` when ``example_inputs`` were run, else ``static``."""
    shapes: tuple[tuple[int, ...], ...] | None = None
    """Shapes of its input at each call in the observed run; ``None`` without one, empty when it did not run."""
    forward: Forward | None = field(default=None, repr=False)
    call: Call | None = field(default=None, repr=False)
    parents: tuple[nn.Module, ...] = field(default=(), repr=False)
    owner: nn.Module | None = field(default=None, repr=False)
    owner_class: type | None = field(default=None, repr=False)
    """While a fold is planned: the module whose ``forward`` calls the functional norm that ``module`` stands in for."""

    @property
    def functional(self) -> bool:
        return self.call is not None

    @property
    def label(self) -> str:
        """The norm in words, or the class of a module that has no reader."""
        return str(self.norm) if self.norm is not None else type(self.module).__name__


def check_model(model: Any) -> None:
    """Raise :class:`NormswapError` for what is no model that can be operated on."""
    if isinstance(model, torch.jit.ScriptModule):
        raise NormswapError(
            "a ScriptModule's code is compiled and cannot be changed: convert the Python module, then script it again"
        )
    if isinstance(model, torch.export.ExportedProgram):
        raise NormswapError("this is an ExportedProgram: pass program.module()")
    if not isinstance(model, nn.Module):
        raise NormswapError(f"expected a torch.nn.Module, got {type(model).__name__}")


def find(model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> list[Site]:
    """List every place where a normalization runs in ``model``: modules under all their names, and functional calls.

    ``example_inputs`` (a tuple of the model's positional arguments) allows one observed run, which adds shapes and
    finds what code analysis cannot. Raises :class:`NormswapError` for a ScriptModule or when the run fails."""
    check_model(model)
    observation = None if example_inputs is None else observe(model, example_inputs)
    return survey(references(model), observation)


def survey(found: dict[int, Reference], observation: Observation | None = None) -> list[Site]:
    """The sites among ``references(model)``, in module order."""
    sites: list[Site] = []
    for reference in found.values():
        sites.extend(_of_reference(reference))
    lifted = {id(site.call.holder) for site in sites if site.call is not None and site.reason is None}
    sites = [site for site in sites if site.call is not None or id(site.module) not in lifted]
    elsewhere = spread(reference.module for reference in found.values())
    for site in sites:
        if id(site.module) in elsewhere and site.reason is None:
            site.reason = REASON
        site.parents = tuple(found[id(site.module)].parents)
    if observation is not None:
        _observed(sites, found, observation)
    return sites


def functional_sites(found: dict[int, Reference]) -> list[Site]:
    """The functional norms alone, in module order."""
    sites = [site for r in found.values() if reach(r.module).functions for site in _of_reference(r)]
    return [site for site in sites if site.call is not None]


def _of_reference(reference: Reference) -> list[Site]:
    module, name = reference.module, reference.name
    aliases = tuple(reference.names[1:])
    if isinstance(module, torch.jit.ScriptModule):
        if _scripted_norm(module):
            return [Site(name, None, module, "it is inside a ScriptModule, whose code cannot be changed", aliases)]
        return []
    if registry.registered(module):
        if (own := registry.overridden(module)) is not None:
            lifted = _functional(reference)
            if any(site.reason is None for site in lifted):
                return lifted
            return [Site(name, None, module, "; ".join([own, *{str(site.reason) for site in lifted}]), aliases)]
        try:
            norm = registry.read(module)
        except Refusal as refusal:
            return [Site(name, None, module, refusal.reason, aliases)]
        reason = None
        if reference.captured is not None:
            reason = f"{reference.captured} also holds it in a closure or object, where a replacement would not be seen"
        return [Site(name, norm, module, reason, aliases)]
    sites = _functional(reference)
    if not sites and _looks_like_a_norm(module):
        path = registry.dotted(type(module))
        return [Site(name, None, module, f"no reader for {path}; teach one with @normswap.reads", aliases)]
    return sites


def _scripted_norm(module: torch.jit.ScriptModule) -> bool:
    """Whether a ScriptModule's own graph, its children's not included, calls a norm function."""
    if "Norm" in str(getattr(module, "original_name", "")):
        return True
    try:
        code = str(module.graph)
    except RuntimeError:  # a container without a forward
        return False
    return any(f"aten::{name}(" in code or f'name="{name}"' in code for name in NAMES)


def _functional(reference: Reference) -> list[Site]:
    module = reference.module
    functions = reach(module).functions
    if not functions:
        return []
    prefixes = [f"{name}." if name else "" for name in reference.names]
    try:
        forward = functional_norms(module)
    except Refusal as refusal:
        return [Site(f"{prefixes[0]}{sorted(functions)[0]}", None, module, refusal.reason)]
    return [
        Site(
            f"{prefixes[0]}{call.name}",
            call.norm,
            module,
            call.reason,
            tuple(f"{prefix}{call.name}" for prefix in prefixes[1:]),
            forward=forward,
            call=call,
        )
        for call in forward.calls
    ]


_NORM_NAME = re.compile(r"Norm(?!al|ed)|(?<![A-Za-z])norm\b|^GRN$|^LRN$")


def _looks_like_a_norm(module: nn.Module) -> bool:
    """A class called a norm that neither has a reader nor holds the layers of something larger."""
    cls = type(module)
    if not _NORM_NAME.search(cls.__name__) or cls.__module__.startswith("torch.nn.utils"):
        return False
    inner = [child for child in module.modules() if child is not module]
    if inner and all(isinstance(child, nn.Identity) for child in inner):
        return False  # a fold took away what it held
    return not any(registry.registered(child) or isinstance(child, LINEAR_LAYERS) for child in inner)


def _observed(sites: list[Site], found: dict[int, Reference], observation: Observation) -> None:
    listed = {id(site.module) for site in sites}
    for site in sites:
        site.evidence = "observed"
        if site.call is None:
            calls = observation.modules.get(id(site.module))
            site.shapes = () if calls is None else tuple(calls.shapes)
    for owner in {id(s.module): s.module for s in sites if s.call is not None}.values():
        _spread(
            [site for site in sites if site.module is owner and site.call is not None],
            [shape for _, shape in observation.functions.get(id(owner), [])],
        )
    for key, functions in observation.functions.items():
        if key not in listed:
            owner_name = found[key].name if key in found else "a module that is no submodule of the model"
            owner = observation.objects[key]
            reason = f"{owner_name or 'the model'} calls {functions[0][0]} where code analysis does not see it"
            prefix = f"{owner_name}." if key in found and owner_name else ""
            sites.append(Site(f"{prefix}{functions[0][0]}", None, owner, reason, evidence="observed"))
    for key, module in observation.objects.items():
        if key not in found and key not in observation.functions and registry.registered(module):
            reason = "it runs but is not a submodule of the model (held in a closure or made on the fly)"
            sites.append(Site(f"<{type(module).__name__}>", None, module, reason, evidence="observed"))


def _spread(sites: list[Site], shapes: list[tuple[int, ...]]) -> None:
    """Give the calls seen in one module to its functional sites, in order; a module run k times has k rounds of
    them."""
    for position, site in enumerate(sites):
        site.shapes = tuple(shapes[position :: len(sites)]) if len(shapes) % len(sites) == 0 else tuple(shapes)
