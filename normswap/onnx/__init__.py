"""ONNX: writing a model to an ``.onnx`` file, and surgery on such files. The extra ``normswap[onnx]`` is needed only
when a function is called."""

from normswap.onnx.export import export
from normswap.onnx.surgery import convert, fold, inspect, plan_convert, plan_fold

__all__ = ["convert", "export", "fold", "inspect", "plan_convert", "plan_fold"]
