"""What the user does with a model, and what the model is: the facts that the rules speak of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from torch import nn

from normswap.engine import Site, find, plan_fold
from normswap.errors import NormswapError, check_whole
from normswap.graph.observe import eval_mode
from normswap.spec import POSITION

Task = Literal[
    "classification", "detection", "segmentation", "style_transfer", "gan", "restoration", "sequence", "reinforcement"
]
Batches = Literal["fixed", "variable", "online"]
Deployment = Literal["server", "edge", "int8"]
Architecture = Literal["convolutional", "transformer", "recurrent", "vectors"]
Fact = str | int | float | bool | None


@dataclass(frozen=True)
class Situation:
    """What the user does with the model; ``None`` for what is not known.

    Raises :class:`NormswapError` for another value."""

    task: Task | None = None
    batch_size: int | None = None
    """Samples on each device in training."""
    devices: int = 1
    batches: Batches = "fixed"
    """``"variable"``: of changing size or composition; ``"online"``: samples as they come, in no random order."""
    deployment: Deployment | None = None
    """Where it runs in the end: ``"edge"`` is a small or slow device, ``"int8"`` one that computes in integers."""
    private: bool = False
    """Trained with differential privacy."""
    federated: bool = False
    pretrained: bool = False
    """Its weights are trained and shall be kept."""

    def __post_init__(self) -> None:
        choices = {"task": Task, "batches": Batches, "deployment": Deployment}
        for name, choice in choices.items():
            value = getattr(self, name)
            if value is not None and value not in get_args(choice):
                raise NormswapError(f"{name}={value!r}; it is one of: {', '.join(get_args(choice))}")
        for name in ("batch_size", "devices"):
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value)
        for name in ("private", "federated", "pretrained"):
            if not isinstance(getattr(self, name), bool):
                raise NormswapError(f"{name}={getattr(self, name)!r}: it is True or False")

    def facts(self) -> dict[str, Fact]:
        """By name, with ``total_batch``, the samples on all devices."""
        found: dict[str, Fact] = {field.name: getattr(self, field.name) for field in fields(self)}
        found["total_batch"] = None if self.batch_size is None else self.batch_size * self.devices
        return found


@dataclass(frozen=True)
class Traits:
    """What the engine sees of a model."""

    architecture: Architecture | None
    """``None`` where nothing tells."""
    kinds: dict[str, int]
    """Norms by kind, the most frequent first."""
    rank: int | None
    """Dimensions of the input of most norms: 4 for images, 5 for volumes and video."""
    foldable: float
    """The share of the norms that folding takes away."""
    single: bool | None
    """Whether a norm sees one position a channel; ``None`` without an observed run."""
    channels: tuple[int, ...]
    """The channel counts of the norms, ascending."""

    @property
    def kind(self) -> str | None:
        return next(iter(self.kinds), None)

    def facts(self) -> dict[str, Fact]:
        return {
            "architecture": self.architecture,
            "kind": self.kind,
            "rank": self.rank,
            "foldable": self.foldable,
            "single": self.single,
        }

    def to_dict(self) -> dict[str, Any]:
        return {**self.facts(), "kinds": dict(self.kinds), "channels": list(self.channels)}


def traits(model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> Traits:
    """What is seen of ``model``; it is left as it was. Raises what :func:`normswap.find` raises."""
    sites = [site for site in find(model, example_inputs) if site.norm is not None]
    kinds = Counter(site.norm.kind for site in sites if site.norm is not None)
    ranks = Counter(rank for site in sites if (rank := _rank(site)) is not None)
    shapes = [shape for site in sites for shape in site.shapes or ()]
    positions = {site.norm.channel_axis for site in sites if site.norm is not None}
    single = None
    if example_inputs is not None:
        single = positions != {-1} and any(len(shape) < 3 or set(shape[2:]) == {1} for shape in shapes)
    return Traits(
        _architecture(model, sites),
        dict(kinds.most_common()),
        ranks.most_common(1)[0][0] if ranks else None,
        _foldable(model, sites),
        single,
        tuple(sorted({site.norm.channels for site in sites if site.norm is not None})),
    )


def _rank(site: Site) -> int | None:
    if site.shapes:
        return len(site.shapes[0])
    assert site.norm is not None
    ranks = site.norm.ranks
    return next(iter(ranks)) if ranks is not None and len(ranks) == 1 else None


def _architecture(model: nn.Module, sites: list[Site]) -> Architecture | None:
    """By the layers: where most norms stand over tokens, it is a transformer though it has a convolution too."""
    modules = list(model.modules())
    tokens = sum(s.norm is not None and s.norm.pools == POSITION and s.norm.channel_axis == -1 for s in sites)
    if any(isinstance(module, nn.RNNBase) for module in modules):
        return "recurrent"
    if tokens * 2 > len(sites) or any(isinstance(module, nn.MultiheadAttention) for module in modules):
        return "transformer"
    if any(isinstance(module, nn.modules.conv._ConvNd) for module in modules):
        return "convolutional"
    return "vectors" if any(isinstance(module, nn.Linear) for module in modules) else None


def _foldable(model: nn.Module, sites: list[Site]) -> float:
    if not sites:
        return 0.0
    with eval_mode(model):
        plan = plan_fold(model)
    return sum(bool(change.into) for change in plan.changes) / len(sites)
