"""``recommend``: the rules that speak of a model and a situation, and which kind they add up to.

Each rule that holds adds its weight to the kind it names first and 1 to those it names after it, and takes its weight
from those it is against; a kind that a rule is against with ``must`` is out. The kind with the most is recommended, of
equal ones the one that some rule names first, then that of the earlier rule, if the model can be converted to it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from normswap.advice.rules import RULES, SPECTRAL, WEIGHTS, Rule
from normswap.advice.situation import Situation, Traits, traits
from normswap.engine.convert import plan_convert
from normswap.errors import NormswapError
from normswap.graph.observe import eval_mode

KEPT = 8
"""Channels of a group where trained weights are to be kept; see docs/calibration.md."""


@dataclass(frozen=True)
class Candidate:
    """A kind that some rule names."""

    kind: str
    score: int
    rules: tuple[str, ...]
    """The names of those for it."""
    norms: int
    """How many of the model's norms would become it, or are it."""
    obstacle: str | None = None
    """Why it cannot be taken."""


@dataclass(frozen=True)
class Recommendation:
    """The outcome of :func:`recommend`; ``str()`` is text for a terminal."""

    situation: Situation
    traits: Traits
    rules: tuple[Rule, ...]
    """All that hold, in the order of the table."""
    candidates: tuple[Candidate, ...]
    """The best first; those that cannot be taken last."""
    conflicts: tuple[str, ...]

    @property
    def winner(self) -> Candidate | None:
        return self._at(0)

    @property
    def runner_up(self) -> Candidate | None:
        return self._at(1)

    def _at(self, place: int) -> Candidate | None:
        possible = [each for each in self.candidates if each.obstacle is None]
        return possible[place] if place < len(possible) else None

    @property
    def unchanged(self) -> bool:
        """Whether the model's norms are all of the recommended kind already."""
        return self.winner is not None and set(self.traits.kinds) == {self.winner.kind}

    def command(
        self, model: str = "WHERE:CALLABLE", checkpoint: str | None = "CHECKPOINT", options: Sequence[str] = ()
    ) -> str | None:
        """The command that converts to the winner, with more ``options``, such as ``["--input", "1x3x224x224"]``;
        ``None`` where there is nothing to do, or no norm to do it to."""
        if self.winner is None or self.unchanged:
            return None
        kind = self.winner.kind
        if kind == SPECTRAL:
            return "torch.nn.utils.parametrizations.spectral_norm(layer)  # each linear layer of the discriminator"
        if not self.winner.norms:
            return None
        given = [] if checkpoint is None else [checkpoint]
        words = ["normswap", "convert", *given, "--model", model, *options, "--to", kind]
        keeps = self.situation.pretrained and kind not in ("batch", "sync", "frozen", "identity")
        if kind == "group" and keeps:
            fits = all(channels % KEPT == 0 for channels in self.traits.channels)
            words += ["--channels-per-group", str(KEPT)] if fits else ["--groups", "auto"]
        if keeps:
            words += ["--data", "DATA"]
        return shlex.join([*words, "-o", f"{kind}.pt"])

    def to_dict(self) -> dict[str, Any]:
        return {
            "situation": self.situation.facts(),
            "model": self.traits.to_dict(),
            "recommended": None if self.winner is None else self.winner.kind,
            "runner_up": None if self.runner_up is None else self.runner_up.kind,
            "unchanged": self.unchanged,
            "command": self.command(),
            "rules": [
                {
                    "name": rule.name,
                    "when": rule.condition,
                    "take": list(rule.take),
                    "avoid": list(rule.avoid),
                    "strength": rule.strength,
                    "reason": rule.reason,
                    "source": rule.source,
                }
                for rule in self.rules
            ],
            "candidates": [
                {"kind": c.kind, "score": c.score, "rules": list(c.rules), "norms": c.norms, "obstacle": c.obstacle}
                for c in self.candidates
            ],
            "conflicts": list(self.conflicts),
        }

    def __str__(self) -> str:
        return self.text(self.command())

    def text(self, command: str | None) -> str:
        """The verdict, the rules and the conflicts, and the command to run."""
        lines = [self.verdict]
        for rule in self.rules:
            lines += ["", f"{rule.name} ({rule.condition}): {_advice(rule)}", f"  {rule.reason}", f"  {rule.source}"]
        if self.conflicts:
            lines += ["", *(f"conflict: {conflict}" for conflict in self.conflicts)]
        return "\n".join(lines if command is None else [*lines, "", f"run: {command}"])

    @property
    def verdict(self) -> str:
        """The winner and the runner-up in one line."""
        if self.winner is None:
            return "no recommendation: " + ("no rule speaks of this" if not self.rules else "no kind is left")
        second = "" if self.runner_up is None else f"; then {self.runner_up.kind}"
        what = f"stay with {self.winner.kind}" if self.unchanged else f"recommended: {self.winner.kind}"
        none = self.winner.kind != SPECTRAL and not self.winner.norms
        return what + second + ("; the model has no norm to convert: build it with one" if none else "")


def recommend(
    model: nn.Module,
    situation: Situation | None = None,
    *,
    example_inputs: tuple[Any, ...] | None = None,
    **facts: Any,
) -> Recommendation:
    """Which kind of norm suits ``model`` in a situation, and why: every rule that holds, with its source.

    The situation is a :class:`Situation`, or its fields as keyword arguments (``task=``, ``batch_size=``,
    ``devices=``, ``batches=``, ``deployment=``, ``private=``, ``federated=``, ``pretrained=``). ``example_inputs``, a
    tuple of the model's positional arguments, allows one observed run, which tells the shapes at the norms. The model
    is left as it was. Raises :class:`NormswapError` for misuse, and what :func:`normswap.find` raises."""
    if situation is not None and facts:
        raise NormswapError(f"pass either a Situation or its fields, not both: {', '.join(facts)}")
    if situation is None:
        unknown = set(facts) - set(Situation.__dataclass_fields__)
        if unknown:
            listed = ", ".join(Situation.__dataclass_fields__)
            raise NormswapError(f"a situation has no {', '.join(sorted(unknown))}; it has: {listed}")
        situation = Situation(**facts)
    seen = traits(model, example_inputs)
    known = {**situation.facts(), **seen.facts()}
    rules = tuple(rule for rule in RULES if rule.holds(known))
    candidates = _candidates(rules, seen, model, example_inputs)
    found = Recommendation(situation, seen, rules, candidates, ())
    return Recommendation(situation, seen, rules, candidates, _conflicts(rules, found))


def _candidates(
    rules: Sequence[Rule], seen: Traits, model: nn.Module, example_inputs: tuple[Any, ...] | None
) -> tuple[Candidate, ...]:
    scores: dict[str, int] = {}
    for rule in rules:
        for place, kind in enumerate(rule.take):
            scores[kind] = scores.get(kind, 0) + (1 if place else WEIGHTS[rule.strength])
    found = []
    with eval_mode(model):
        for kind, score in scores.items():
            against = [rule for rule in rules if kind in rule.avoid]
            score -= sum(WEIGHTS[rule.strength] for rule in against)
            out = next((f"ruled out by: {rule.name}" for rule in against if rule.strength == "must"), None)
            norms, obstacle = (0, out) if out is not None else _possible(kind, seen, model, example_inputs)
            named = tuple(rule.name for rule in rules if kind in rule.take)
            found.append(Candidate(kind, score, named, norms, obstacle))
    firsts = {rule.take[0] for rule in rules if rule.take}
    return tuple(sorted(found, key=lambda each: (each.obstacle is not None, -each.score, each.kind not in firsts)))


def _possible(
    kind: str, seen: Traits, model: nn.Module, example_inputs: tuple[Any, ...] | None
) -> tuple[int, str | None]:
    """How many norms can be of that kind, and if none why not."""
    already = seen.kinds.get(kind, 0)
    if kind == SPECTRAL:
        return already, None
    plan = plan_convert(model, kind, example_inputs=example_inputs)
    norms = already + len(plan.changes)
    if norms:
        return norms, None
    skip = plan.skips[0] if plan.skips else None  # Without norms it is a kind to build the model with.
    return 0, None if skip is None else f"{skip.name or '(root)'}: {skip.reason}"


def _conflicts(rules: Sequence[Rule], found: Recommendation) -> tuple[str, ...]:
    winner = found.winner
    if winner is None:
        return ()
    told = []
    for rule in rules:
        if winner.kind in rule.avoid:
            told.append(f"{rule.name} is against {winner.kind}")
        elif rule.take and winner.kind != rule.take[0]:
            against = (other.name for other in rules if rule.take[0] in other.avoid)
            name = next(against, None)
            told.append(
                f"{rule.name} asks for {_either(rule.take)}" + ("" if name is None else f"; against it: {name}")
            )
    return tuple(told)


def _either(kinds: Sequence[str]) -> str:
    return ", else ".join(kinds)


def _advice(rule: Rule) -> str:
    parts = [f"{rule.strength} be {_either(rule.take)}"] if rule.take else []
    return ", ".join([*parts, *([f"not {', '.join(rule.avoid)}"] if rule.avoid else [])])
