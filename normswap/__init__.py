"""Model surgery for normalization layers in PyTorch: find every norm, replace it, fold it away, prove the result."""

from normswap import layers, norms
from normswap.advice import Comparison, Recommendation, Situation, compare, recommend
from normswap.calibration import Calibration, Recalibration, calibrate, recalibrate
from normswap.engine import Change, Plan, Site, Skip, apply_recipe, find, plan_fold
from normswap.errors import NormswapError, Refusal, VerificationFailed
from normswap.exported import load_exported
from normswap.health import Health, examine
from normswap.onnx import export
from normswap.provenance import read_metadata, state_digest
from normswap.registry import builds, kinds, read, reads
from normswap.source import load
from normswap.spec import Norm, exactness, reference, scale_shift
from normswap.surgery import convert, fold, plan_convert
from normswap.verification import Verification, verify
from normswap.version import __version__

__all__ = [
    "Calibration",
    "Change",
    "Comparison",
    "Health",
    "Norm",
    "NormswapError",
    "Plan",
    "Recalibration",
    "Recommendation",
    "Refusal",
    "Site",
    "Situation",
    "Skip",
    "Verification",
    "VerificationFailed",
    "__version__",
    "apply_recipe",
    "builds",
    "calibrate",
    "compare",
    "convert",
    "exactness",
    "examine",
    "export",
    "find",
    "fold",
    "kinds",
    "layers",
    "load",
    "load_exported",
    "norms",
    "plan_convert",
    "plan_fold",
    "read",
    "read_metadata",
    "reads",
    "recalibrate",
    "recommend",
    "reference",
    "scale_shift",
    "state_digest",
    "verify",
]
