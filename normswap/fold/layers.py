r"""Layer rules: how a linear layer absorbs a channel affine, on its output side or on its input side.

For :math:`y = W x + b` with a kernel W:

- output side, :math:`s\,y + t`: :math:`W \leftarrow s \cdot W` along the output channels, :math:`b \leftarrow s\,b +
  t`;
- input side, :math:`W (s\,x + t) + b`: :math:`W \leftarrow W \cdot s` along the input channels, :math:`b \leftarrow b +
  \sum W t` over input channels and kernel.

The input side of a padded convolution sees the affine's shift in the interior but zeros in the padding, so it is exact
only where :math:`t = 0`, nothing is padded, or the padding is made of data (reflect, replicate, circular). A transposed
convolution spreads t unevenly over its output unless its kernel has one element.

A bilinear layer absorbs on its output side as a linear one does. The rows of an embedding are its outputs, :math:`W
\leftarrow s \cdot W + t` along the columns. A bag of them may be empty, which gives zeros: :math:`t = 0` there, and
:math:`s \ge 0` where it takes the maximum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normswap.errors import NormswapError
from normswap.fold import bake
from normswap.fold.affine import Affine
from normswap.norms.weight_standardized import FORMS
from normswap.registry import dotted

Side = Literal["output", "input"]

_PLAIN = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    nn.Bilinear, nn.Embedding, nn.EmbeddingBag,
)  # fmt: skip
OWN_FORWARD: dict[str, type[nn.Module]] = {
    "timm.layers.conv2d_same.Conv2dSame": nn.Conv2d,
    "timm.layers.conv2d_same.Conv2dSameExport": nn.Conv2d,
    "timm.layers.linear.Linear": nn.Linear,
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": nn.Linear,
    **dict.fromkeys(bake.STANDARDIZED, nn.Conv2d),
    **{dotted(form): plain for plain, form in FORMS.items()},
}
"""Classes with a ``forward`` of their own that still computes the plain layer, on an input they may pad with zeros and
with a weight they may standardize."""

_SELF_PADDED = frozenset(path for path in OWN_FORWARD if "2dSame" in path)


@dataclass(frozen=True)
class Layer:
    """What folding needs to know of a linear layer."""

    kind: Literal["conv", "transposed", "linear", "bilinear", "embedding"]
    spatial: int
    """Number of spatial axes; 0 where the channels are the last axis."""
    inputs: int
    outputs: int
    groups: int
    shift_reaches_evenly: bool
    """Whether a constant on an input channel gives a constant on every output channel."""
    part: str = ""
    """Which projection of an attention it is; empty for a layer of its own."""
    bag: str | None = None
    """How an embedding reduces the rows of a bag."""

    @property
    def has_bias(self) -> bool:
        return self.kind != "embedding"

    def refuses(self, affine: Affine, side: Side) -> str | None:
        """Why it cannot absorb an affine that a convolution could."""
        if side == "input" and self.kind == "embedding":
            return "reads it as indices"
        if side == "input" and self.kind == "bilinear":
            return "multiplies it with another input"
        if self.bag is not None and not affine.no_shift:
            return "gives zeros for an empty bag, and the shift is not zero"
        if self.bag == "max" and not affine.non_negative:
            return "takes a maximum, and the scale has negative channels"
        return None


def describe(module: nn.Module) -> Layer | str:
    """The layer a module computes, or the reason why it is not one that can absorb an affine."""
    cls = type(module)
    base = next((plain for plain in _PLAIN if isinstance(module, plain)), None)
    if base is None:
        return f"{cls.__name__} is not a layer that can absorb an affine"
    path = f"{cls.__module__}.{cls.__qualname__}"
    if "forward" in vars(module):
        return f"{cls.__name__}'s forward was replaced on the instance"
    if path not in OWN_FORWARD:
        for parent in cls.__mro__:
            if parent is base:
                break
            if path_of(parent) in OWN_FORWARD:
                break
            if any(name in vars(parent) for name in ("forward", "_conv_forward", "__call__")):
                return f"{parent.__name__} has a forward of its own"
    if isinstance(module, nn.Linear):
        return Layer("linear", 0, module.in_features, module.out_features, 1, True)
    if isinstance(module, nn.Bilinear):
        return Layer("bilinear", 0, module.in1_features, module.out_features, 1, False)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        if module.max_norm is not None:
            return f"{cls.__name__} with max_norm rescales its rows when they are read"
        bag = module.mode if isinstance(module, nn.EmbeddingBag) else None
        return Layer("embedding", 0, module.num_embeddings, module.embedding_dim, 1, False, bag=bag)
    assert isinstance(module, _ConvNd)
    spatial = len(module.kernel_size)
    transposed = isinstance(module, _ConvTransposeNd)
    if transposed:
        even = all(k == 1 for k in module.kernel_size) and all(s == 1 for s in module.stride) and not _padded(module)
        even = even and not any(module.output_padding)
    else:
        even = not pads_itself(module) and (module.padding_mode != "zeros" or not _padded(module))
    kind: Literal["conv", "transposed"] = "transposed" if transposed else "conv"
    return Layer(kind, spatial, module.in_channels, module.out_channels, module.groups, even)


def pads_itself(module: nn.Module) -> bool:
    """Whether a layer pads its input in its own ``forward``, by amounts that its attributes do not tell."""
    own = any(path_of(parent) in _SELF_PADDED for parent in type(module).__mro__)
    return own and bool(getattr(module, "same_pad", True))


def path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _padded(module: _ConvNd) -> bool:
    if isinstance(module.padding, str):
        return module.padding == "same" and any(size != 1 for size in module.kernel_size)
    return any(amount != 0 for amount in module.padding)


_CHUNK = 1 << 18  # elements of a kernel held in float64 at a time


def absorb(module: Any, layer: Layer, affine: Affine, side: Side) -> Callable[[], None]:
    """Fold an affine into a layer's weight and bias, in place; returns what restores them, bit for bit.

    A layer that computes its weight is made plain first. Arithmetic is in float64, by parts of the kernel, cast once.
    Raises :class:`NormswapError` when a finite weight would become non-finite, with the layer unchanged, and
    :class:`~normswap.errors.Refusal` when it is not known how the weight is computed."""
    unbake = bake.bake(module)
    try:
        restore = _absorb(module, layer, affine, side)
    except BaseException:
        unbake()
        raise

    def back() -> None:
        restore()
        unbake()

    return back


def _absorb(module: Any, layer: Layer, affine: Affine, side: Side) -> Callable[[], None]:
    weight: nn.Parameter = module.weight
    bias: nn.Parameter | None = module.bias if layer.has_bias else None
    scale, shift = affine.scale.to(weight.device), affine.shift.to(weight.device)
    with torch.no_grad():
        new_weight = torch.empty_like(weight)
        new_bias: Tensor = scale.new_zeros(layer.outputs) if bias is None else bias.double()
        if side == "output":
            new_bias = new_bias * scale + shift
        for start, part, group in _parts(weight, layer):
            if side == "input":
                new_bias = new_bias + _reached(part, group, layer, shift, start)
            part.mul_(_factor(part, group, layer, scale, side, start))
            new_weight[start : start + part.shape[0]].copy_(part if layer.has_bias else part.add_(shift))
        cast_bias = new_bias.to(weight.dtype if bias is None else bias.dtype)
        if not (_finite(new_weight) and _finite(cast_bias)) and _finite(weight):
            raise NormswapError(f"the folded values are not finite in {str(weight.dtype).removeprefix('torch.')}")
        old_weight = weight.data
        old_bias = None if bias is None else bias.data
        weight.data = new_weight.detach()
        if bias is not None:
            bias.data = cast_bias
        elif layer.has_bias and not affine.no_shift:
            module.bias = nn.Parameter(cast_bias, requires_grad=weight.requires_grad)

    def restore() -> None:
        weight.data = old_weight
        if bias is not None and old_bias is not None:
            bias.data = old_bias
        elif layer.has_bias and not affine.no_shift:
            module.bias = None

    return restore


def _parts(weight: Tensor, layer: Layer) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Rows of a kernel at a time, in float64: the first row's number, the rows to be written over, their groups."""
    rows = weight.shape[0]
    step = min(rows, max(1, _CHUNK * rows // max(1, weight.numel())))
    double = torch.empty(step, *weight.shape[1:], dtype=torch.float64, device=weight.device)
    for start in range(0, rows, step):
        part = double[: min(step, rows - start)].copy_(weight[start : start + step])
        yield start, part, torch.arange(start, start + part.shape[0], device=weight.device) // (rows // layer.groups)


def rounding(module: Any, layer: Layer, affine: Affine, side: Side) -> float:
    r"""What rounding to 16 bits adds to the folded weight W: :math:`\|\hat W - W\| / \|W\|`; 0 for a wider type.

    Near a quarter of the type's machine epsilon, but for values below its smallest normal one, which lose digits."""
    dtype = bake.dtype_of(module)
    if dtype not in (torch.float16, torch.bfloat16):
        return 0.0
    weight = bake.weight_of(module).detach()
    scale, shift = affine.scale.to(weight.device), affine.shift.to(weight.device)
    lost, whole = 0.0, 0.0
    for start, part, group in _parts(weight, layer):
        part.mul_(_factor(part, group, layer, scale, side, start))
        if not layer.has_bias:
            part.add_(shift)
        lost += float((part.to(dtype).double() - part).square().sum())
        whole += float(part.square().sum())
    return math.sqrt(lost / whole) if whole else 0.0


def _finite(tensor: Tensor) -> bool:
    """Whether all elements are finite, in one pass without a temporary of the tensor's size."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()  # NaN propagates
    return math.isfinite(low) and math.isfinite(high)


def may_overflow(module: Any, affine: Affine) -> bool:
    """Whether the folded values may exceed the range of a float16 layer; other dtypes have the range to spare."""
    if bake.dtype_of(module) != torch.float16:
        return False
    weight = bake.weight_of(module)
    if not weight.numel():
        return False
    largest = float(weight.detach().abs().max()) * float(affine.scale.abs().max())
    shift = float(affine.shift.abs().max())
    added = largest + shift if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else max(largest, shift)
    return added > torch.finfo(weight.dtype).max


def _factor(part: Tensor, group: Tensor, layer: Layer, scale: Tensor, side: Side, start: int) -> Tensor:
    """What some rows of a kernel are multiplied by: rows are outputs, or inputs in a transposed convolution."""
    rows = part.shape[0]
    if layer.kind == "embedding":
        return scale
    if (side == "output") == (layer.kind != "transposed"):
        factor = scale[start : start + rows, None]
    else:
        factor = scale.reshape(layer.groups, -1)[group]  # (rows, the other side's channels of the row's group)
    return factor.reshape(*factor.shape, *[1] * (part.dim() - 2))


def _reached(part: Tensor, group: Tensor, layer: Layer, shift: Tensor, start: int) -> Tensor:
    """What a constant ``shift`` on the inputs adds to the outputs, ``(outputs,)``, through some rows of the kernel."""
    taps = part.flatten(2).sum(2) if layer.spatial else part
    rows = part.shape[0]
    if layer.kind == "transposed":
        reached = shift.new_zeros(layer.groups, layer.outputs // layer.groups)
        reached.index_add_(0, group, taps * shift[start : start + rows, None])
        return reached.flatten()
    reached = shift.new_zeros(layer.outputs)
    reached[start : start + rows] = (taps * shift.reshape(layer.groups, -1)[group]).sum(1)
    return reached
