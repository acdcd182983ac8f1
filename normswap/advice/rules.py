"""The rules: on which facts which kind of norm, or against which, why, and who measured it.

A rule is data. What it says goes into ``docs/recommend.md``, written by ``python scripts/recommend.py``. To add a rule,
add a row, with a source; ``tests/test_recommend.py`` wants a situation that calls it and one that does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from normswap.advice.situation import Fact

Comparison = Literal["is", ">=", "<", "in"]
Strength = Literal["must", "should", "may"]
WEIGHTS: dict[Strength, int] = {"must": 9, "should": 3, "may": 1}
"""What a rule adds to the kind it names first, and takes from those it is against; ``must`` against rules a kind
out. A kind that it names second gets 1."""
SPECTRAL = "spectral"
"""Spectral normalization of weights: none of normswap's kinds, for it is no layer; torch has it."""
OVER_BATCH = ("batch", "sync", "ghost", "renorm", "batch_instance", "switchable")
"""Kinds that in training mix the samples of a batch."""


@dataclass(frozen=True)
class When:
    """A condition on one fact; what is not known meets none."""

    fact: str
    comparison: Comparison
    value: Fact | tuple[str, ...]

    def holds(self, facts: Mapping[str, Fact]) -> bool:
        known, value = facts[self.fact], self.value
        if self.comparison == "is":
            return known == value
        if known is None:
            return False
        if self.comparison == "in":
            assert isinstance(value, tuple)
            return known in value
        assert isinstance(known, (int, float))
        assert isinstance(value, (int, float))
        return known >= value if self.comparison == ">=" else known < value

    def __str__(self) -> str:
        name = self.fact.replace("_", " ")
        if isinstance(self.value, bool):
            return name if self.value else f"not {name}"
        if self.value is None:
            return f"{name} not known"
        value = " or ".join(map(str, self.value)) if isinstance(self.value, tuple) else str(self.value)
        return f"{name} {'is' if self.comparison == 'in' else self.comparison} {value.replace('_', ' ')}"


@dataclass(frozen=True)
class Rule:
    """If all conditions hold: ``take`` the first of these kinds, or the second, and ``avoid`` those."""

    name: str
    when: tuple[When, ...]
    take: tuple[str, ...]
    strength: Strength
    reason: str
    source: str
    avoid: tuple[str, ...] = ()

    def holds(self, facts: Mapping[str, Fact]) -> bool:
        return all(condition.holds(facts) for condition in self.when)

    @property
    def condition(self) -> str:
        return ", ".join(map(str, self.when))


CONVOLUTIONAL = When("architecture", "is", "convolutional")
TRANSFORMER = When("architecture", "is", "transformer")
DENSE_TASK = When("task", "in", ("detection", "segmentation"))

RULES: tuple[Rule, ...] = (
    Rule(
        "private",
        (When("private", "is", True),),
        ("group", "layer"),
        "must",
        "differential privacy clips the gradient of each sample, which a norm over the batch does not have",
        "De et al. 2022, arXiv 2204.13650; the validator of Opacus",
        avoid=OVER_BATCH,
    ),
    Rule(
        "federated",
        (When("federated", "is", True),),
        ("group", "layer"),
        "should",
        "with other labels on each client their batch statistics disagree; group norm recovers much of the loss",
        "Hsieh et al. 2020, arXiv 1910.00189",
        avoid=("batch", "sync"),
    ),
    Rule(
        "one sample",
        (When("batch_size", "<", 2), When("devices", "<", 2)),
        ("layer", "instance"),
        "should",
        "one sample has no batch to take statistics over; layer and instance norm look at the sample alone",
        "Ba et al. 2016, arXiv 1607.06450; Ulyanov et al. 2016, arXiv 1607.08022",
        avoid=("batch", "sync", "ghost"),
    ),
    Rule(
        "few samples",
        (When("batch_size", ">=", 2), When("batch_size", "<", 8), When("total_batch", "<", 16), CONVOLUTIONAL),
        ("group", "frn"),
        "should",
        "batch statistics of so few samples are noise: ResNet-50 with 2 images a device has 10.6 points less error "
        "with group than with batch norm",
        "Wu and He 2018, arXiv 1803.08494; Singh and Krishnan 2020, arXiv 1911.09737 (frn)",
        avoid=("batch",),
    ),
    Rule(
        "medium batches",
        (When("batch_size", ">=", 8), When("batch_size", "<", 16), CONVOLUTIONAL),
        ("group", "batch"),
        "may",
        "about where batch and group norm are equally good",
        "Wu and He 2018, arXiv 1803.08494, on ResNet-50",
    ),
    Rule(
        "classification, large batches",
        (When("task", "is", "classification"), When("batch_size", ">=", 16), CONVOLUTIONAL),
        ("batch", "group"),
        "should",
        "with enough samples batch norm trains best: ResNet-50, 32 images a device, 23.6 % error against 24.1 with "
        "group, 25.3 with layer, 28.4 with instance",
        "Ioffe and Szegedy 2015, arXiv 1502.03167; Wu and He 2018, arXiv 1803.08494",
    ),
    Rule(
        "very large batches",
        (When("batch_size", ">=", 512), CONVOLUTIONAL),
        ("ghost",),
        "may",
        "statistics of parts of a large batch keep the noise that helps to generalize",
        "Hoffer et al. 2017, arXiv 1705.08741",
    ),
    Rule(
        "several devices, few samples on each",
        (When("devices", ">=", 2), When("batch_size", "<", 16), When("total_batch", ">=", 16)),
        ("sync", "group"),
        "should",
        "statistics over all devices are those of a batch that is large enough",
        "Peng et al. 2018 (MegDet), arXiv 1711.07240",
    ),
    Rule(
        "detection or segmentation",
        (DENSE_TASK, CONVOLUTIONAL, When("devices", "<", 2), When("pretrained", "is", False)),
        ("group", "frozen"),
        "should",
        "large images leave few on a device; group norm trains and fine-tunes better than frozen batch norm on COCO",
        "Wu and He 2018, arXiv 1803.08494",
    ),
    Rule(
        "detection or segmentation on several devices",
        (DENSE_TASK, CONVOLUTIONAL, When("devices", ">=", 2), When("pretrained", "is", False)),
        ("sync", "group"),
        "should",
        "statistics over all devices bring batch norm back to such tasks",
        "Peng et al. 2018 (MegDet), arXiv 1711.07240",
    ),
    Rule(
        "detection or segmentation from a trained backbone",
        (DENSE_TASK, CONVOLUTIONAL, When("pretrained", "is", True), When("kind", "in", ("batch", "sync", "frozen"))),
        ("frozen", "sync", "group"),
        "should",
        "a trained backbone is fine-tuned with its statistics fixed, which changes nothing that it computes",
        "He et al. 2017 (Mask R-CNN), arXiv 1703.06870",
    ),
    Rule(
        "volumes",
        (When("task", "is", "segmentation"), When("rank", "is", 5)),
        ("instance", "group"),
        "should",
        "volumes leave one or two on a device and differ in contrast, which instance norm takes out of each",
        "Isensee et al. 2018 (nnU-Net), arXiv 1809.10486",
    ),
    Rule(
        "style transfer",
        (When("task", "is", "style_transfer"),),
        ("instance", "batch_instance"),
        "should",
        "the contrast of the content image is to be dropped, sample by sample",
        "Ulyanov et al. 2016, arXiv 1607.08022; Nam and Kim 2018, arXiv 1805.07925 (batch_instance)",
        avoid=("batch",),
    ),
    Rule(
        "adversarial training",
        (When("task", "is", "gan"),),
        (SPECTRAL, "identity"),
        "should",
        "spectral normalization of the discriminator's weights bounds its slope whatever the batch",
        "Miyato et al. 2018, arXiv 1802.05957",
    ),
    Rule(
        "restoration",
        (When("task", "is", "restoration"),),
        ("identity",),
        "should",
        "norms take away the range of values that an image is to be restored to; residual networks for "
        "super-resolution are better without",
        "Lim et al. 2017 (EDSR), arXiv 1707.02921",
    ),
    Rule(
        "reinforcement learning",
        (When("task", "is", "reinforcement"),),
        ("layer",),
        "should",
        "layer norm in the critic bounds what it extrapolates to, and does not depend on a batch that changes with the "
        "policy",
        "Ball et al. 2023, arXiv 2302.02948",
    ),
    Rule(
        "sequences",
        (When("task", "is", "sequence"),),
        ("layer", "rms"),
        "should",
        "lengths differ, and statistics over a batch of text vary so much that batch norm fails",
        "Ba et al. 2016, arXiv 1607.06450; Shen et al. 2020, arXiv 2003.07845",
        avoid=("batch",),
    ),
    Rule(
        "transformers",
        (TRANSFORMER,),
        ("layer", "rms"),
        "should",
        "each token is normalized alone, whatever the length and the batch",
        "Ba et al. 2016, arXiv 1607.06450",
    ),
    Rule(
        "transformers, to be run",
        (TRANSFORMER, When("deployment", "in", ("server", "edge"))),
        ("rms",),
        "may",
        "as good as layer norm in 7 to 64 % less time; converting layer to rms costs nothing on digits once calibrated",
        "Zhang and Sennrich 2019, arXiv 1910.07467; docs/calibration.md",
    ),
    Rule(
        "recurrent networks",
        (When("architecture", "is", "recurrent"),),
        ("layer",),
        "should",
        "statistics would be needed for each time step",
        "Ba et al. 2016, arXiv 1607.06450",
        avoid=("batch",),
    ),
    Rule(
        "changing batches",
        (When("batches", "is", "variable"),),
        ("group", "frn"),
        "should",
        "what a sample is normalized by would change with the batch that it happens to be in",
        "Wu and He 2018, arXiv 1803.08494; Singh and Krishnan 2020, arXiv 1911.09737",
    ),
    Rule(
        "online",
        (When("batches", "is", "online"),),
        ("group", "renorm"),
        "should",
        "samples that come in no random order have batch statistics unlike those of the whole; renorm uses running "
        "ones in training too",
        "Ioffe 2017, arXiv 1702.03275",
        avoid=("batch", "ghost"),
    ),
    Rule(
        "folded away where it runs",
        (When("deployment", "in", ("edge", "int8")), When("foldable", ">=", 0.5)),
        ("batch", "sync"),
        "should",
        "a norm with fixed statistics folds into the convolution before it and costs nothing; one that computes its "
        "own stays, in float",
        "Jacob et al. 2018, arXiv 1712.05877; docs/performance.md",
    ),
    Rule(
        "trained weights to be kept",
        (When("pretrained", "is", True), When("kind", "in", ("batch", "sync", "frozen")), CONVOLUTIONAL),
        ("layer", "group"),
        "may",
        "if it must leave batch norm: calibrated without training, layer and groups of 8 channels keep most accuracy, "
        "instance least",
        "docs/calibration.md, measured on five networks",
        avoid=("instance",),
    ),
    Rule(
        "one position a channel",
        (When("single", "is", True),),
        (),
        "must",
        "a norm in the model sees one value of each channel and sample: instance norm makes it 0",
        "Ulyanov et al. 2016, arXiv 1607.08022, by its definition",
        avoid=("instance",),
    ),
    Rule(
        "unsure",
        (When("task", "is", None),),
        ("switchable",),
        "may",
        "learns its own mixture of instance, layer and batch, layer by layer",
        "Luo et al. 2018, arXiv 1806.10779",
    ),
)
