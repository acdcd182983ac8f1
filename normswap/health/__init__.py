"""What is wrong with the norms of a model, and what to do about it."""

from normswap.health.checks import CHECKS, Check, Finding
from normswap.health.examine import examine, examine_sites
from normswap.health.measure import Measured
from normswap.health.placement import Placement
from normswap.health.result import Health, NormHealth, Summary

__all__ = [
    "CHECKS",
    "Check",
    "Finding",
    "Health",
    "Measured",
    "NormHealth",
    "Placement",
    "Summary",
    "examine",
    "examine_sites",
]
