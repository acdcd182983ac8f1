"""Surgery on ``.pt2`` files, programs of ``torch.export``: no code of the model is needed."""

from normswap.programs.surgery import convert, fold, inspect, plan_convert, plan_fold

__all__ = ["convert", "fold", "inspect", "plan_convert", "plan_fold"]
