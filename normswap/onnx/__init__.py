"""ONNX: writing a model to an ``.onnx`` file. The extra ``normswap[onnx]`` is needed only when a function is called."""

from normswap.onnx.export import export

__all__ = ["export"]
