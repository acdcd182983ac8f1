"""Converted models brought back to what they computed, and running statistics re-estimated, from unlabelled data."""

from normswap.calibration.apply import apply_calibrated
from normswap.calibration.batches import check_batches
from normswap.calibration.calibrate import calibrate
from normswap.calibration.groups import plan_groups
from normswap.calibration.recalibrate import recalibrate
from normswap.calibration.report import Calibration, Recalibration

__all__ = [
    "Calibration",
    "Recalibration",
    "apply_calibrated",
    "calibrate",
    "check_batches",
    "plan_groups",
    "recalibrate",
]
