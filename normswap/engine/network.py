"""A model's norms and layers under one plan: what is selected, what becomes of the norms, and making the changes.

The kinds that change layers share this. Folds are made first, then other norms, then the layers, and an error puts all
of them back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from normswap.engine import convert, guards, swaps
from normswap.engine.fold import plan_fold
from normswap.engine.folding import apply_fold
from normswap.engine.forms import LAYER_FORMS, OPTIONS
from normswap.engine.plan import Change, Plan, Skip
from normswap.engine.select import Selector, check_globs, excluded
from normswap.engine.sites import Site, survey
from normswap.engine.weighted import LAYERS, Weighted, describe, layer_sites, plain_weight
from normswap.errors import NormswapError, Refusal
from normswap.graph.observe import observe
from normswap.graph.reach import reach
from normswap.graph.references import Reference, references


@dataclass
class Network:
    """A model, its norms and its layers, and what of them is selected."""

    model: nn.Module
    to: str
    init: convert.Init
    where: Selector
    skip: Selector
    example_inputs: tuple[Any, ...] | None
    found: dict[int, Reference]
    norms: list[Site]
    layers: list[Site]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        to: str,
        selection: Mapping[str, Any],
        layers: Callable[[Site], bool],
        others: Callable[[Mapping[int, Reference]], list[Site]] = lambda _found: [],
    ) -> Network:
        """``layers`` says which layers are meant, and ``others`` gives what else may be named."""
        found = references(model)
        example = selection["example_inputs"]
        norms = survey(found, None if example is None else observe(model, example))
        chosen = [site for site in layer_sites(found) if layers(site)]
        where, skip = selection["where"], selection["skip"]
        check_globs([*norms, *chosen, *others(found)], where=where, skip=skip)
        return cls(model, to, selection["init"], where, skip, example, found, norms, chosen)

    def plan(self, changes: Iterable[Change], skips: Iterable[Skip], notes: Iterable[str] = ()) -> Plan:
        """The plan, with layers and norms in the order of the model."""
        known = (name for reference in self.found.values() for name in reference.names)
        order = {name: position for position, name in enumerate(dict.fromkeys(known))}

        def place(part: Change | Skip) -> tuple[int, bool]:
            name = part.name
            while name and name not in order:
                name = name.rpartition(".")[0]
            return order.get(name, 0), name != part.name

        return Plan(
            self.model,
            f"convert to {self.to}",
            sorted(changes, key=place),
            sorted(skips, key=place),
            (*guards.wrapper_notes(self.model), *dict.fromkeys(notes)),
            apply_weights,
        )

    def companions(self, companion: str, kept: str = "it stays beside the layers (companion='keep')") -> Plan:
        """What becomes of the norms alone; ``kept`` says why those stay that could change."""
        left = {site.name: site.reason or excluded(site, self.where, self.skip) for site in self.norms}
        if companion == "keep" or None not in left.values():
            return Plan(self.model, "", [], [self.stays(s, left[s.name] or kept) for s in self.norms])
        wanted = {name for name, reason in left.items() if reason is None}
        chosen: dict[str, Any] = {"where": lambda name, _norm: name in wanted, "example_inputs": self.example_inputs}
        if companion == "fold" and self.init != "reset":
            plan = self._folds(wanted, left, chosen)
        else:
            kind = "identity" if companion == "fold" else companion
            init = "copy" if kind == "identity" else self.init
            plan = convert.plan_convert(self.model, kind, init=init, **chosen)
        sites = {site.name: site for site in self.norms}
        named = {skip.name: left.get(skip.name) for skip in plan.skips}
        plan.skips = [self.stays(sites[s.name], why) if (why := named[s.name]) is not None else s for s in plan.skips]
        return plan

    def _folds(self, wanted: set[str], left: dict[str, str | None], chosen: dict[str, Any]) -> Plan:
        """The folds into layers that are not left out; ``wanted`` loses the others, and ``left`` gets the reason."""
        out = {site.name for site in layer_sites(self.found) if excluded(site, self.where, self.skip)}
        while True:
            plan = plan_fold(self.model, **chosen)
            blocked = {
                change.name: step.name
                for change in plan.changes
                for step in (change.fold.steps if change.fold is not None else ())
                if step.name in out
            }
            if not blocked:
                return plan
            wanted.difference_update(blocked)
            left.update({name: f"{layer}, which would absorb it, is not selected" for name, layer in blocked.items()})

    @staticmethod
    def stays(site: Site, reason: str) -> Skip:
        return Skip(site.name, reason, site.norm, site.label, site.aliases, site.evidence)

    def decide(self, how: Callable[[Site], Change | str]) -> tuple[list[Change], list[Skip]]:
        """The layers that change, by ``how``, and those that stay."""
        changes, skips = [], []
        for site in self.layers:
            reason = site.reason or excluded(site, self.where, self.skip) or self.read_around(site)
            decision = reason if reason is not None else how(site)
            if isinstance(decision, Change):
                changes.append(decision)
            else:
                skips.append(self.stays(site, decision))
        return changes, skips

    def read_around(self, site: Site) -> str | None:
        """Why the code around a layer could not live with a weight that is computed: it looks into its tables."""
        for parent in site.parents:
            keys = {key for key, child in parent._modules.items() if child is site.module}
            for child, attribute in sorted(reach(parent).child_reads):
                if child in keys and attribute in ("_parameters", "parameters", "named_parameters", "__dict__"):
                    return f"{type(parent).__name__}.forward reads its {attribute!r}"
        return None


def change(site: Site, to: str, words: str, exactness: Any, **fields: Any) -> Change:
    """A change of one layer, activation or dropout, by a site that describes it."""
    source = site.norm
    assert isinstance(source, Weighted)
    return Change(
        site.name, source, source.become(to, words), exactness, to, site.aliases, evidence=site.evidence, **fields
    )


# --- making the changes ----------------------------------------------------------------------------------------------


def apply_weights(
    model: nn.Module, changes: Sequence[Change], undoable: bool = True
) -> tuple[nn.Module, Callable[[], None]]:
    """Make the changes in place: folds first, then other norms, then layers; returns the model and what undoes them."""
    undo: list[Callable[[], None]] = []
    folds = [change for change in changes if change.fold is not None]
    others = [change for change in changes if isinstance(change.source, Weighted)]
    norms = [change for change in changes if change.fold is None and not isinstance(change.source, Weighted)]
    root = model
    try:
        for part, make in ((folds, apply_fold), (norms, convert.apply_changes)):
            if part:
                root, back = make(root, part)
                undo.append(back)
        by_name = {name: reference for reference in references(root).values() for name in reference.names}
        for each in others:
            if each.name not in by_name:
                raise NormswapError(f"the model has no module {each.name!r}, which the plan changes to {each.to}")
            undo.append(_make(each, by_name[each.name]))
    except BaseException:
        _back(undo)
        raise
    return root, partial(_back, undo)


def _back(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


def _make(change: Change, reference: Reference) -> Callable[[], None]:
    if isinstance(reference.module, LAYERS):
        reason = plain_weight(reference.module) if change.to != "plain" else None
        if reason is not None:
            raise NormswapError(f"{change.name}: {reason}; the plan does not fit this model")
        try:
            return LAYER_FORMS[change.to](reference.module, change.name, change.options, change.init)
        except Refusal as refusal:
            raise NormswapError(f"{change.name}: {refusal.reason}") from refusal
    return swaps.swap(reference)


def described(found: Mapping[int, Reference]) -> dict[str, Site]:
    """Layers, activations and dropouts as sites, by every name."""
    sites: dict[str, Site] = {}
    for reference in found.values():
        module = reference.module
        if isinstance(module, LAYERS) or swaps.activation(module) or swaps.dropout(module):
            norm = describe(module) if isinstance(module, LAYERS) else swaps.describe(module)
            sites.update({name: Site(reference.name, norm, module) for name in reference.names})
    return sites


def replayed_change(step: Mapping[str, Any], sites: Mapping[str, Site]) -> Change:
    """The change of a layer, activation or dropout that a recipe's step tells; ``sites`` are the model's.

    Raises :class:`NormswapError` where the model does not have there what the step was written for."""
    name, source, to, options = step["name"], step["source"], step["to"], step["options"]
    site = sites.get(name)
    if site is None or site.norm is None:
        raise NormswapError(f"the recipe changes {name!r}, but the model has no such layer; is it the same one?")
    known = site.norm
    if (known.kind, known.channels) != (source["kind"], source["channels"]):
        raise NormswapError(f"{name} is {known}, but the recipe was made for {source['kind']} of {source['channels']}")
    is_layer = isinstance(site.module, LAYERS)
    wanted = OPTIONS.get(to, frozenset()) if is_layer else frozenset()
    fits = options.keys() == wanted and all(isinstance(value, (int, float)) for value in options.values())
    fits = fits and options.get("bias", 0) in (0, known.channels) and to in (LAYER_FORMS if is_layer else ("selu",))
    if not fits:
        raise NormswapError(f"the recipe's step for {name!r} is malformed: its options do not fit {to!r}")
    return change(site, to, to, "retrain", options=dict(options), init=step["init"])
