"""transformers: its RMSNorm classes, of which some scale by ``weight`` and some by ``1 + weight``.

Nearly every model has a class of its own, alike in name and not in meaning, so the meaning is measured: a copy of the
module with random weights runs on a small random input and is compared with the oracle for each reading. No reading
that fits means a refusal."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import Refusal
from normswap.registry import reads
from normswap.spec import POSITION, Norm, reference

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")


def _norm(weight: Tensor | None, eps: float, channels: int) -> Norm:
    return Norm(
        kind="rms",
        channels=channels,
        pools=POSITION,
        channel_axis=-1,
        centred=False,
        spread="square",
        eps=eps,
        momentum=None,
        weight=weight,
        upcast=True,
    )


def _without_hooks(module: nn.Module) -> nn.Module:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        hooks.clear()
    return module


def _offset(weight: Tensor) -> Tensor:
    return (weight.detach() + 1).requires_grad_(weight.requires_grad)


@reads(
    "transformers.models.*RMSNorm",
    "transformers.models.t5.modeling_t5.T5LayerNorm",
    "transformers.models.*.modeling_*.*T5LayerNorm",
)
def rms(module: Any) -> Norm:
    weight = getattr(module, "weight", None)
    eps = next((float(getattr(module, name)) for name in _EPS_NAMES if hasattr(module, name)), None)
    others = [name for name, _ in (*module.named_parameters(), *module.named_children()) if name != "weight"]
    if eps is None or not isinstance(weight, Tensor) or weight.dim() != 1 or others:
        raise Refusal(f"{type(module).__name__} is not a plain RMSNorm (one weight and an eps)")
    channels = weight.shape[0]
    probe = _without_hooks(copy.deepcopy(module)).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(channels, generator=generator) + 0.5
    probe.weight = nn.Parameter(random)
    x = torch.randn(2, channels, generator=generator)
    try:
        with torch.no_grad():
            out = probe(x).double()
    except Exception as error:
        raise Refusal(
            f"{type(module).__name__} did not run on a tensor alone ({error}); it takes more than one input"
        ) from None
    for effective, carried in ((random, weight), (1 + random, None)):
        if torch.allclose(out, reference(x, _norm(effective, eps, channels)), rtol=1e-5, atol=1e-5):
            return _norm(_offset(weight) if carried is None else carried, eps, channels)
    raise Refusal(f"{type(module).__name__} computes neither x/rms(x)·weight nor x/rms(x)·(1 + weight)")
