"""Schemas of torchvision's C++ operators.

PyPI's torchvision is built against CUDA torch: beside a CPU torch its operators do not load, and ``import torchvision``
fails for want of their schemas. Declaring them lets it import; detection models then build and run up to non-maximum
suppression.
"""

from __future__ import annotations

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)
_library = torch.library.Library("torchvision", "FRAGMENT")


def declare() -> None:
    """Declare the operators that are missing; does nothing where torchvision's own library loads."""
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        try:
            torch._C._dispatch_find_schema_or_throw(f"torchvision::{name}", "")
        except RuntimeError:
            _library.define(schema)


declare()
