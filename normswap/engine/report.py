"""What ``convert`` and ``fold``, which return only the model, say of the norms that stayed: by the logger
``normswap``."""

from __future__ import annotations

import logging
import warnings

from normswap.engine.plan import Plan

logger = logging.getLogger("normswap")


def report(plan: Plan) -> None:
    """Log the skips; warn when a plan changes nothing."""
    for skip in plan.skips:
        logger.info("%s: skipped %s (%s): %s", plan.operation, skip.name, skip.was, skip.reason)
    if not plan.changes and not plan.merges:
        message = "the model has no normalization"
        if plan.skips:
            first = plan.skips[0]
            message = f"{len(plan.skips)} norms, none changed; first: {first.name or 'the model'}: {first.reason}"
        warnings.warn(f"normswap, {plan.operation}: nothing changed ({message})", stacklevel=3)
