"""A plan applied and calibrated in one step, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from normswap.calibration.calibrate import calibrate
from normswap.calibration.report import Calibration
from normswap.engine.copying import copy_model
from normswap.engine.plan import Plan


def apply_calibrated(
    plan: Plan,
    batches: Iterable[Any],
    *,
    inplace: bool = False,
    reference: nn.Module | None = None,
    **options: Any,
) -> tuple[nn.Module, Calibration]:
    """Apply a conversion plan and calibrate the result against the model it was made for; the model and the report.

    ``options`` are those of :func:`normswap.calibrate`. Without ``inplace`` the plan's model is not touched; with it,
    ``reference`` must be as the model is before, or a copy is made, and an error in calibrating puts all back.
    Raises what :meth:`Plan.apply` and :func:`normswap.calibrate` raise."""
    if reference is None:
        reference = copy_model(plan.model) if inplace else plan.model
    model = plan.apply(inplace)
    try:
        return model, calibrate(model, reference, batches, **options)
    except BaseException:
        plan.undo()
        raise
