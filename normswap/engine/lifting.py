"""Functional norms in a fold: they stand as modules while it is planned, and vanish from the forward when it is made.

While a plan is made, :func:`standing_in` puts a frozen norm where each functional one is called that a fold may take
away; its tensors stay where they are too, so that other readers of them are seen. At the end the model is as it was,
bit for bit. :class:`Lifts` then takes the calls out of the generated forwards, or puts a multiply-add there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import fx, nn

from normswap.engine.guards import child_reads
from normswap.engine.plan import Change
from normswap.engine.sites import Site, functional_sites
from normswap.errors import NormswapError, Refusal
from normswap.graph.lift import Forward, lift
from normswap.graph.references import Reference, references
from normswap.norms.frozen import build

GENERATED = "its forward is generated from a trace: Python branches and optional arguments are fixed"


@contextmanager
def standing_in(found: dict[int, Reference], refuses: Callable[[Site], str | None]) -> Iterator[dict[str, Site]]:
    """Within it, the functional norms that may fold are modules; given are their sites by name, for what they were.

    ``found``: the ``references(model)``; ``refuses`` says why a norm is out of the question before anything around it
    is looked at."""
    owners: dict[int, tuple[Forward, dict[str, nn.Module]]] = {}
    sites: dict[str, Site] = {}
    for site in functional_sites(found):
        if refuses(site) is not None or _held_elsewhere(site, found):
            continue
        assert site.call is not None
        assert site.forward is not None
        assert site.norm is not None
        try:
            module = build(site.norm)
        except Refusal:
            continue
        module.train(site.module.training)
        owners.setdefault(id(site.module), (site.forward, {}))[1][site.call.name] = module
        parents = tuple(found[id(site.module)].parents)
        sites[site.name] = replace(
            site, module=module, owner=site.module, owner_class=type(site.module), parents=parents
        )
    undo: list[Callable[[], None]] = []
    try:
        for forward, modules in owners.values():
            undo.append(lift(forward, modules, keep_tensors=True))
        yield sites
    finally:
        while undo:
            undo.pop()()


def _held_elsewhere(site: Site, found: Mapping[int, Reference]) -> bool:
    """Whether the submodule that holds a functional norm's tensors has another role too."""
    holder = None if site.call is None else site.call.holder
    if holder is None:
        return False
    reference = found[id(holder)]
    hooked = any(vars(holder)[name] for name in vars(holder) if name.endswith("_hooks"))
    return hooked or len(reference.slots) > 1 or reference.captured is not None


def tensors_needed(site: Site) -> str | None:
    """Why the code around a functional norm's module needs the tensors that would leave it; or ``None``."""
    assert site.owner is not None
    return child_reads(replace(site, module=site.owner), site.owner, same=True)


def attributes(site: Site) -> frozenset[str]:
    """The names of the attributes that hold a functional norm's tensors."""
    paths = {} if site.call is None else site.call.paths
    return frozenset(path.rpartition(".")[2] for path in paths.values())


def notes(site: Site) -> tuple[str, ...]:
    return () if site.owner is None or isinstance(site.owner, fx.GraphModule) else (GENERATED,)


class Lifts:
    """What becomes of the functional norms of a model, made at once for all norms in the same forward."""

    def __init__(self, model: nn.Module, wanted: bool) -> None:
        self.sites = {site.name: site for site in functional_sites(references(model))} if wanted else {}
        self.pending: dict[int, tuple[Forward, dict[str, nn.Module | None]]] = {}

    def put(self, change: Change, module: nn.Module | None) -> None:
        """Note what stands where a functional norm is called. Raises :class:`NormswapError` where there is none."""
        site = self.sites.get(change.name)
        if site is None or site.norm is None or site.call is None or site.forward is None:
            raise NormswapError(f"the model has no functional norm {change.name!r}, which the plan folds")
        if module is not None:
            module.train(site.module.training)
        self.pending.setdefault(id(site.module), (site.forward, {}))[1][site.call.name] = module

    def make(self, undo: list[Callable[[], None]]) -> None:
        for forward, modules in self.pending.values():
            undo.append(lift(forward, modules))
