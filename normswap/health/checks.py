"""What is looked for in a norm: the table of checks, and the thresholds with their reasons.

A check has one name, one severity, a reason why it matters and a way to mend it. An *error* makes outputs wrong or
training impossible whatever the rest of the model does; a *warning* harms most models; a *note* is worth knowing.
Where a finding concerns few channels it counts as a note: see :data:`MANY`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

DEAD_VARIANCE = 1e-3
"""In units of eps. The normalized deviation of a channel is sqrt(v / (v + eps)), here 0.03 where a live one has 1: what
is left behind the norm is its bias."""
EPS_VARIANCE = 1.0
"""In units of eps. Below it eps has the larger part in v + eps, and the deviation falls below 0.7."""
MANY = 0.25
"""Share of the channels from which a finding about channels is a warning; a few dead ones are common after training."""
LARGE_SCALE = 100.0
"""Of a weight. It starts at 1, and weight decay keeps trained ones of published models below about 10."""
DEAD_SCALE = 1e-3
"""Of a weight, relative to the largest of the norm: such channels can be pruned (arXiv 1708.06519)."""
LARGE_EPS = 1e-2
"""Published models have 1e-12 to 1e-3."""
HALF_SMALLEST = 2.0**-24
"""The smallest positive float16: a smaller eps is 0 there."""
HALF_LARGEST = 65504.0
"""The largest float16."""
LARGE_MOMENTUM = 0.5
"""Keras writes 0.99 for what is 0.01 here: at 0.5 the last two batches make three quarters of the statistics."""
FEW_SAMPLES = 8
"""In a training batch. ImageNet error of a ResNet-50 with batch norm: 23.6 % at 32 samples on each device, 24.8 % at 8,
27.3 % at 4, 34.7 % at 2 (arXiv 1803.08494, table 2)."""
FEW_VALUES = 8
"""Over which moments are taken. The relative error of a variance of n normal values is sqrt(2 / (n - 1)): 0.53 at 8."""
STALE = 0.5
"""In deviations of the normalized value: half of what tells a channel's values apart."""
NOISY = 0.5
"""Likewise."""
SATURATED = 0.5
"""Share of the values where the activation behind the norm is flat."""
GRADIENT_SPAN = 1e4
"""Times the median over all norms: no learning rate suits both."""


@dataclass(frozen=True)
class Check:
    """One thing that can be wrong with a norm."""

    name: str
    severity: Severity
    why: str
    mend: str


@dataclass(frozen=True)
class Finding:
    """What a check found at one norm."""

    check: str
    site: str
    what: str
    severity: Severity

    @property
    def why(self) -> str:
        """Why it matters."""
        return CHECKS[self.check].why

    @property
    def mend(self) -> str:
        """What to do about it."""
        return CHECKS[self.check].mend

    def to_dict(self) -> dict[str, Any]:
        return {
            "severity": self.severity,
            "check": self.check,
            "site": self.site,
            "what": self.what,
            "why": self.why,
            "mend": self.mend,
        }


def finding(check: str, site: str, what: str, *, share: float = 1.0) -> Finding:
    """``share``: of the channels that it concerns."""
    severity = CHECKS[check].severity
    return Finding(check, site, what, "note" if severity == "warning" and share < MANY else severity)


_TENSORS = (
    Check(
        "not-finite",
        "error",
        "every output of the channel is NaN or infinite, and soon the whole output of the model",
        "take an earlier checkpoint; look for the step at which the loss became NaN",
    ),
    Check(
        "negative-variance",
        "error",
        "no mean of squares is negative: the tensor is damaged, and v + eps may have no square root",
        "estimate it again with normswap.recalibrate(model, batches), or take another checkpoint",
    ),
    Check(
        "zero-division",
        "error",
        "variance plus eps is zero in a channel: its output is infinite or NaN",
        "give the norm an eps, such as 1e-5",
    ),
    Check(
        "never-updated",
        "warning",
        "mean 0 and variance 1 are what a constructor sets: in eval mode the norm does not normalize",
        "load the trained weights (was the checkpoint loaded in part?), train, or normswap.recalibrate(model, batches)",
    ),
    Check(
        "dead-channels",
        "warning",
        "the channel hardly varied: behind the norm only its bias is left, and a value that does deviate is amplified",
        "prune the channels; a lower weight decay or learning rate keeps them alive",
    ),
    Check(
        "eps-dominated",
        "warning",
        "the variance is below eps, which then decides the scale: the norm normalizes in part only",
        "use a smaller eps, or scale the input of the norm up",
    ),
    Check(
        "large-scale",
        "warning",
        "a large weight amplifies what is rounding noise elsewhere, and overflows in float16",
        "lower the learning rate or put weight decay on the norm's weight; keep the layer out of 16-bit quantization",
    ),
    Check(
        "dead-scale",
        "warning",
        "a weight near 0 shuts the channel off",
        "prune the channels; a zero weight is right where a residual branch starts at 0 and training is still to come",
    ),
    Check(
        "zero-scale",
        "note",
        "the norm gives its bias alone: so a residual branch may start (arXiv 1706.02677), but not end",
        "train the model; if it is trained, the branch is dead and can be removed",
    ),
    Check(
        "overflows-float16",
        "note",
        "beyond 65504 a value is infinite in float16",
        "keep the norm in float32, or use bfloat16",
    ),
    Check(
        "half-statistics",
        "note",
        "a 16-bit running average loses every update that is smaller than its last digit (1 part in 256 for bfloat16)",
        "keep the norm's running statistics in float32; autocast leaves them so",
    ),
)
_OPTIONS = (
    Check("bad-eps", "error", "the square root of variance plus a negative eps may not exist", "set eps to 1e-5"),
    Check(
        "zero-eps",
        "warning",
        "a constant channel then divides by zero",
        "give the norm an eps, such as 1e-5",
    ),
    Check(
        "large-eps",
        "warning",
        "eps is added to the variance: as large as this, it decides the scale of all channels of small variance",
        "was it meant as a standard deviation, or as a momentum? The usual value is 1e-5",
    ),
    Check(
        "small-eps",
        "note",
        "in float16 this eps is 0; torch computes norms in float32 inside, other runtimes may not",
        "use an eps of at least 1e-7 in float16",
    ),
    Check(
        "bad-momentum",
        "error",
        "outside of 0 to 1 the running average moves away from the data",
        "set momentum to 0.1: it is the weight of the new batch",
    ),
    Check(
        "zero-momentum",
        "warning",
        "with momentum 0 training never updates the running statistics, and eval mode uses old ones",
        "set momentum to 0.1, or make the norm a frozen one: normswap.convert(model, 'frozen')",
    ),
    Check(
        "large-momentum",
        "warning",
        "momentum is the weight of the new batch, unlike in Keras: here the last batches alone make the statistics",
        "set momentum to 0.1, or to 1 minus the value that was meant",
    ),
    Check(
        "cumulative-momentum",
        "note",
        "momentum None averages all batches since the start alike, also those before the weights were trained",
        "right for an estimate with fixed weights; call reset_running_stats() before it, or set momentum to 0.1",
    ),
    Check(
        "no-running-statistics",
        "warning",
        "eval mode too uses the moments of the batch: a sample's output depends on what else is in its batch",
        "track running statistics, or convert the norm to group or layer",
    ),
    Check(
        "one-element-groups",
        "error",
        "moments of a single value: the value minus its own mean is 0, and the output is the bias whatever the input",
        "use fewer groups, or another kind of norm: normswap.convert(model, 'layer')",
    ),
    Check(
        "few-values",
        "warning",
        "moments over so few values are noise, and of two values only the sign of their difference is left",
        "use fewer groups, or a larger input",
    ),
)
_TRAINING = (
    Check(
        "tiny-batch",
        "warning",
        "moments of a small batch are noise, and unlike the running statistics that eval mode uses",
        "use larger batches, SyncBatchNorm over several devices, or convert the norm to group",
    ),
    Check(
        "single-value-batch",
        "error",
        "torch raises in train mode where a batch has one value for each channel",
        "train with larger batches (drop_last=True drops an odd last one), or convert the norm to layer",
    ),
    Check(
        "trains-in-eval",
        "warning",
        "the model is in eval mode, but this norm uses and updates batch statistics: outputs depend on the batch",
        "call model.eval(); if it is meant (test-time adaptation), leave it",
    ),
    Check(
        "frozen-in-train",
        "note",
        "the model is in train mode and this norm is not: model.train() will silently set it back",
        "make it a frozen norm, which stays so: normswap.convert(model, 'frozen', where=...)",
    ),
    Check(
        "half-frozen",
        "warning",
        "weight and bias are not trained, but train mode still uses and updates the batch's statistics",
        "make it a frozen norm: normswap.convert(model, 'frozen', where=...), or train its weight and bias too",
    ),
)
_PLACE = (
    Check("unknown", "note", "what is not known is not checked", "teach its class with @normswap.reads"),
    Check(
        "never-ran",
        "note",
        "what does not run does not count, and its statistics are never updated",
        "remove it, or pass inputs that reach it",
    ),
    Check(
        "called-often",
        "warning",
        "one pair of running statistics averages inputs of several places, and is right for none of them",
        "give each place a norm of its own, or convert the norm to group",
    ),
    Check(
        "alias",
        "note",
        "one module under several names: what is done to one is done to all",
        "nothing, if it is meant",
    ),
    Check(
        "tied-tensors",
        "warning",
        "two norms update the same running statistics, each with its own input",
        "give each norm buffers of its own; a shared weight alone does no harm",
    ),
    Check(
        "bias-before-norm",
        "note",
        "the norm subtracts the mean, and with it the bias of the layer in front: a parameter that does nothing",
        "build the layer with bias=False, or fold the norm away for deployment",
    ),
    Check(
        "dropout-before-norm",
        "note",
        "dropout changes the variance between train and eval mode, to which running statistics do not fit "
        "(arXiv 1801.05134)",
        "move the dropout behind the last batch norm",
    ),
)
_DATA = (
    Check(
        "output-not-finite",
        "error",
        "from here on every value of the model is NaN or infinite",
        "look at the layer in front: its weights, or an overflow in 16 bits",
    ),
    Check(
        "stale-statistics",
        "warning",
        "the running statistics are not those of this data: train and eval mode compute different functions "
        "(arXiv 2105.07576)",
        "normswap.recalibrate(model, batches), if the data is what the model will see",
    ),
    Check(
        "noisy-batches",
        "warning",
        "the batches differ much from each other, so training sees other values than eval mode",
        "use larger or better shuffled batches, or convert the norm to group",
    ),
    Check(
        "dead-activations",
        "warning",
        "the activation behind the norm gave 0 for every value of the channel",
        "prune the channels if all data says so; a lower learning rate or a leaky activation keeps them alive",
    ),
    Check(
        "saturated",
        "warning",
        "the activation behind the norm is flat there: little gradient passes",
        "look at the norm's weight and bias, or take another activation",
    ),
    Check(
        "gradient-not-finite",
        "error",
        "a step of any optimizer makes the parameters NaN",
        "look for divisions and roots behind the norm; in float16 scale the loss",
    ),
    Check(
        "no-gradient",
        "warning",
        "no gradient reaches the norm: what lies in front of it does not learn by this path",
        "look for a detach, a zero weight or a dead activation behind it",
    ),
    Check(
        "vanishing-gradient",
        "warning",
        "the gradient is far below that of the other norms: one learning rate does not suit both",
        "add a shortcut, or look at the weights of the norms behind it",
    ),
    Check(
        "exploding-gradient",
        "warning",
        "the gradient is far above that of the other norms: one learning rate does not suit both",
        "clip gradients, or look at the weights of the norms behind it",
    ),
)
CHECKS: dict[str, Check] = {each.name: each for each in (*_TENSORS, *_OPTIONS, *_TRAINING, *_PLACE, *_DATA)}
