r"""What becomes of one layer, in place: its weight parametrized, standardized, made plain, or drawn anew.

==================== ======================================================================================== =======
form                 weight that the layer computes with                                                      source
==================== ======================================================================================== =======
weight_norm          :math:`g\,v / \lVert v \rVert` for each output channel, torch's parametrization          1602.07868
spectral_norm        :math:`W / \sigma(W)`, by its largest singular value, torch's parametrization            1802.05957
weight_standardized  :mod:`normswap.norms.weight_standardized`                                                1903.10520
plain                the value that was computed, as a parameter                                              \-
selu                 normal with variance 1 / fan-in (LeCun), biases 0                                        1706.02515
==================== ======================================================================================== =======

Weight norm takes :math:`v = W, g = \lVert W \rVert`: the function stays. A kernel of zeros has no direction, so v is
ones there, and g zero."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrizations

from normswap.engine.weighted import output_axis
from normswap.errors import NormswapError
from normswap.fold import bake
from normswap.norms.weight_standardized import FORMS, preserving_gain

Undo = Callable[[], None]
_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_SWEEPS = 200
"""Most power iterations for a first estimate of a largest singular value."""


def remember(module: Any) -> Undo:
    """What puts a module's class, tensors, children, attributes and loading hooks back as they are now."""
    cls, state = type(module), vars(module)
    saved = {name: copy.copy(state[name]) for name in _TABLES}
    attributes, loading = set(state), set(state["_load_state_dict_pre_hooks"])

    def restore() -> None:
        module.__class__ = cls
        for name, value in saved.items():
            state[name].clear()
            state[name].update(value)
        for key in state["_load_state_dict_pre_hooks"].keys() - loading:
            del state["_load_state_dict_pre_hooks"][key]
        for name in state.keys() - attributes:
            del state[name]

    return restore


def weight_norm(module: Any, name: str, options: Mapping[str, Any], init: str) -> Undo:
    undo = remember(module)
    axis = output_axis(module)
    weight = module.weight.detach()
    length = torch.norm_except_dim(weight.double(), 2, axis)
    parametrizations.weight_norm(module, "weight", dim=axis)
    stack = module.parametrizations.weight
    module.parametrizations.train(module.training)
    gain, direction = stack.original0, stack.original1
    gain.data = length.to(gain.dtype) if init != "reset" else torch.ones_like(gain)
    direction.data = weight.clone()  # torch's is the old weight's own memory
    if not weight.is_meta and bool((length == 0).any()):
        direction.data.masked_fill_(length == 0, 1.0)
        gain.data = torch.where(length == 0, torch.zeros_like(gain), gain.data)
    return undo


def spectral_norm(module: Any, name: str, options: Mapping[str, Any], init: str) -> Undo:
    undo = remember(module)
    weight = module.weight.detach()
    if not weight.is_meta and not bool(weight.any()):
        raise NormswapError(f"{name}: its weight is all zeros, whose largest singular value is 0; leave it out by skip")
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(seed_of(name, options.get("seed", 0)))
        parametrizations.spectral_norm(module, "weight", n_power_iterations=options.get("iterations", 1))
    module.parametrizations.train(module.training)
    step = module.parametrizations.weight[0]
    if not weight.is_meta:
        for buffer, value in zip((step._u, step._v), leading(weight.movedim(step.dim, 0), step._v), strict=True):
            buffer.copy_(value)
    return undo


def leading(weight: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The singular vectors of the largest singular value of ``(out, ...)`` as a matrix, by power iteration."""
    matrix = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    u, v = matrix.new_zeros(matrix.shape[0]), start.to(matrix.dtype)
    before = 0.0
    for _ in range(_SWEEPS):
        u = F.normalize(matrix @ v, dim=0, eps=0.0)
        v = matrix.T @ u
        largest = float(v.norm())
        v = v / largest
        if largest - before <= 1e-9 * largest:
            break
        before = largest
    return u, v


def weight_standardized(module: Any, name: str, options: Mapping[str, Any], init: str) -> Undo:
    if type(module) not in FORMS:
        raise NormswapError(f"{name}: there is no standardized form of a {type(module).__name__}")
    undo = remember(module)
    eps, weight = options["eps"], module.weight
    values = None
    if options["gain"]:
        values = preserving_gain(weight, eps)[0] if init == "preserve" else weight.new_ones(len(weight)).detach()
    module.__class__ = FORMS[type(module)]
    module.equip(eps, values)
    return undo


def plain(module: Any, name: str, options: Mapping[str, Any], init: str) -> Undo:
    return bake.bake(module)


def lecun(module: Any, name: str, options: Mapping[str, Any], init: str) -> Undo:
    """LeCun's normal initialization with ``init="reset"``, and a bias of zeros where ``bias`` asks for one."""
    weight, bias = module.weight, module.bias
    if init == "reset":
        generator = torch.Generator().manual_seed(seed_of(name, options["seed"]))
        drawn = torch.empty(weight.shape, dtype=torch.float64)
        nn.init.normal_(drawn, std=1 / math.sqrt(fan_in(module)), generator=generator)
        old = weight.data, None if bias is None else bias.data
        weight.data = torch.empty_like(old[0]).copy_(drawn)
        if bias is not None:
            bias.data = torch.zeros_like(bias.data)
    if options["bias"]:
        module.bias = nn.Parameter(weight.new_zeros(options["bias"]), requires_grad=weight.requires_grad)

    def undo() -> None:
        if options["bias"]:
            module.bias = None
        if init == "reset":
            weight.data = old[0]
            if bias is not None:
                bias.data = old[1]

    return undo


def fan_in(module: Any) -> float:
    """How many inputs each output of a layer is a sum of, on average where a stride spreads a transposed kernel."""
    weight = module.weight
    if isinstance(module, _ConvTransposeNd):
        return len(weight) / module.groups * math.prod(module.kernel_size) / math.prod(module.stride)
    return float(weight[0].numel())


def seed_of(name: str, seed: int) -> int:
    """A seed for one layer, the same wherever the layers of other names are."""
    return zlib.crc32(name.encode()) + seed


Form = Callable[[Any, str, Mapping[str, Any], str], Undo]
LAYER_FORMS: dict[str, Form] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "weight_standardized": weight_standardized,
    "plain": plain,
    "selu": lecun,
}
"""By kind: ``f(module, name, options, init)`` changes a layer in place and returns what undoes that."""

OPTIONS: dict[str, frozenset[str]] = {
    "spectral_norm": frozenset({"iterations", "seed"}),
    "weight_standardized": frozenset({"eps", "gain"}),
    "selu": frozenset({"seed", "bias"}),
}
"""The options of those that have some."""
