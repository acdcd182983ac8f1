"""timm: norms with drop and activation, ``LayerNorm2d``, and the RMS and Simple families.

``SimpleNorm`` divides by the (unbiased) standard deviation without subtracting the mean. The ``Fp32`` classes compute
in float32 whatever their input's dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from normswap.errors import Refusal
from normswap.norms import batch, frozen, group, layer, sync
from normswap.registry import reads
from normswap.spec import POSITION, Norm

_NORM = "timm.layers.norm"
_ACT = "timm.layers.norm_act"
_IMAGE = frozenset({4})


def _rms(module: Any) -> Norm:
    shape = tuple(module.normalized_shape)
    return Norm(
        kind="rms",
        channels=shape[-1],
        pools=POSITION,
        channel_axis=-1,
        shape=shape if len(shape) > 1 else None,
        centred=False,
        spread="square",
        eps=module.eps,
        momentum=None,
        weight=module.weight,
    )


def _rms_2d(module: Any) -> Norm:
    return replace(_rms(module), channel_axis=1, ranks=_IMAGE)


def _simple(module: Any) -> Norm:
    return replace(_rms(module), kind="simple", spread="variance", correction=1)


def _simple_2d(module: Any) -> Norm:
    return replace(_simple(module), channel_axis=1, ranks=_IMAGE)


def _layer_2d(module: Any) -> Norm:
    return replace(layer.read_position(module), ranks=_IMAGE)


def _batch_2d(module: Any) -> Norm:
    return replace(batch.read(module), ranks=_IMAGE)


def _frozen_2d(module: Any) -> Norm:
    return replace(frozen.read(module), ranks=_IMAGE)


def _register(path: str, reader: Callable[[Any], Norm], *, upcast: bool = False) -> None:
    def read(module: Any) -> Norm:
        followers = tuple(getattr(module, name) for name in ("drop", "act") if hasattr(module, name))
        return replace(reader(module), then=followers, upcast=upcast)

    read.__qualname__ = f"read[{path}]"
    reads(path)(read)


_NORMS: dict[str, Callable[[Any], Norm]] = {
    "GroupNorm": group.read,
    "GroupNorm1": group.read,
    "LayerNorm": layer.read,
    "LayerNorm2d": _layer_2d,
    "LayerNormExp2d": _layer_2d,
    "RmsNorm": _rms,
    "RmsNorm2d": _rms_2d,
    "SimpleNorm": _simple,
    "SimpleNorm2d": _simple_2d,
}
for _name, _reader in _NORMS.items():
    _register(f"{_NORM}.{_name}", _reader)
    if _name not in ("GroupNorm", "GroupNorm1", "LayerNormExp2d"):
        _register(f"{_NORM}.{_name}Fp32", _reader, upcast=True)

_NORM_ACTS: dict[str, Callable[[Any], Norm]] = {
    "BatchNormAct2d": _batch_2d,
    "SyncBatchNormAct": sync.read,
    "FrozenBatchNormAct2d": _frozen_2d,
    "GroupNormAct": group.read,
    "GroupNorm1Act": group.read,
    "LayerNormAct": layer.read,
    "LayerNormAct2d": _layer_2d,
    "RmsNormAct": _rms,
    "RmsNormAct2d": _rms_2d,
}
for _name, _reader in _NORM_ACTS.items():
    _register(f"{_ACT}.{_name}", _reader)
    if _name.startswith(("Layer", "Rms")):
        _register(
            f"{_ACT}.{_name.replace('Act2d', 'Act2dFp32') if '2d' in _name else _name + 'Fp32'}", _reader, upcast=True
        )


@reads("timm.layers.split_batchnorm.SplitBatchNorm2d")
def split(module: Any) -> Norm:
    raise Refusal(
        "it keeps separate statistics for parts of a training batch (AdvProp); there is no single norm to convert"
    )


@reads("timm.layers.inplace_abn.InplaceAbn")
def inplace(module: Any) -> Norm:
    raise Refusal("inplace-ABN normalizes in a kernel of its own; build the model with BatchNormAct2d instead")
