"""Find, guard, plan, apply, replay."""

from normswap.engine import selu, weights
from normswap.engine.convert import plan_convert
from normswap.engine.fold import plan_fold
from normswap.engine.plan import Change, Plan, Skip
from normswap.engine.recipe import apply_recipe
from normswap.engine.sites import Site, find

__all__ = [
    "Change", "Plan", "Site", "Skip", "apply_recipe", "find", "plan_convert", "plan_fold", "selu", "weights",
]  # fmt: skip
