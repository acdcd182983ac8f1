"""An affine, or statistics, for each of several classes: tensors ``(K, C)``, and the one row that stands for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.adopt import parameter
from normswap.norms.arithmetic import fine, rounded
from normswap.spec import Norm


def alike(*several: Tensor | None) -> bool:
    """Whether all rows of each tensor are equal."""
    return all(t is None or t.is_meta or torch.equal(t.detach(), t.detach()[:1].expand_as(t)) for t in several)


def nearest(rows: Tensor | None) -> Tensor | None:
    """The row that all are, or their mean: ``(C,)``, a tensor of its own."""
    if rows is None:
        return None
    values = rows.detach()
    row = values[0].clone() if alike(rows) else values.double().mean(0).to(rows.dtype)
    return row.requires_grad_(rows.requires_grad)


def repeated(tensor: Tensor | None, count: int) -> Tensor | None:
    """``count`` rows of ``tensor``, each the same."""
    return None if tensor is None else tensor.detach().expand(count, *tensor.shape).clone()


def repeated_parameter(norm: Norm, name: str, count: int) -> nn.Parameter | None:
    """The weight or bias of ``norm`` for each of ``count`` classes."""
    tensor: Tensor | None = getattr(norm, name)
    if tensor is None:
        return None
    own = parameter(tensor, norm)
    return nn.Parameter(own.detach().expand(count, -1).clone(), requires_grad=own.requires_grad)


def repeat_affine(module: nn.Module, count: int) -> None:
    """Make weight and bias of ``module`` ``count`` rows of what they are."""
    for name in ("weight", "bias"):
        row = getattr(module, name)
        if row is not None:
            module.register_parameter(name, nn.Parameter(row.detach().repeat(count, 1)))


def adopt_rows(module: nn.Module, norm: Norm, form: Any, count: int) -> None:
    """Give ``module`` the rows ``weights`` and ``biases`` of ``form``, or without one those of ``norm`` for each
    class."""
    for name, field_name in (("weight", "weights"), ("bias", "biases")):
        rows = repeated_parameter(norm, name, count) if form is None else getattr(form, field_name)
        module.register_parameter(name, rows)


def chosen(rows: Tensor | None, choice: Tensor) -> Tensor | None:
    """The rows ``(1 or N, C)`` for indices ``(1 or N,)``, or mixed with weights ``(1 or N, K)``."""
    if rows is None:
        return None
    choice = choice.to(rows.device)
    if not choice.is_floating_point():
        return rows[choice]
    dtype = fine(rows.device) if rounded(rows.device) else rows.dtype  # Autocast would round the product.
    return (choice.to(dtype) @ rows.to(dtype)).to(rows.dtype)
