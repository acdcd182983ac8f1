"""Instance normalization (arXiv 1607.08022): ``nn.InstanceNorm1d/2d/3d``.

Moments over space, for every sample and channel. With ``track_running_stats`` it uses running statistics in eval mode.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm

from normswap.errors import Refusal
from normswap.norms.adopt import adopt_affine, channels_first, dimensions, single_rank
from normswap.norms.batch import positive_eps, refuse_lazy
from normswap.registry import builds, reads
from normswap.spec import SPACE, Norm

RANKS: dict[type, frozenset[int]] = {
    nn.InstanceNorm1d: frozenset({3}),
    nn.InstanceNorm2d: frozenset({4}),
    nn.InstanceNorm3d: frozenset({5}),
}


class InstanceNorm(_InstanceNorm):
    """``nn.InstanceNorm`` for an input ``(N, C, *S)`` of any rank of at least 3, where the rank is not known
    beforehand."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() < 3:
            raise ValueError(f"expected at least 3D input (got {input.dim()}D input)")
        fresh = self.training or not self.track_running_stats
        return F.instance_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, fresh, self.momentum or 0.0, self.eps
        )


@reads(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, InstanceNorm)
def read(module: _InstanceNorm) -> Norm:
    refuse_lazy(module)
    tracked = module.track_running_stats  # without it the input's moments are used in eval mode too
    return Norm(
        kind="instance",
        channels=module.num_features,
        pools=SPACE,
        ranks=next((ranks for cls, ranks in RANKS.items() if isinstance(module, cls)), None),
        eps=module.eps,
        momentum=module.momentum,
        weight=module.weight,
        bias=module.bias,
        running_mean=module.running_mean if tracked else None,
        running_var=module.running_var if tracked else None,
        num_batches_tracked=module.num_batches_tracked if tracked else None,
    )


@builds("instance")
def build(norm: Norm) -> nn.Module:
    channels_first(norm, "instance")
    if norm.ranks == frozenset({2}):
        raise Refusal("its input is (N, C): every instance would be a single element")
    if norm.ranks is not None and 2 in norm.ranks and single_rank(norm) is None:
        raise Refusal(
            "its input may be (N, C), where every instance is a single element; pass example_inputs to settle it"
        )
    classes = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
    cls = classes.get(dimensions(norm) or 0, InstanceNorm)
    momentum = 0.1 if norm.momentum is None else norm.momentum
    module = cls(norm.channels, positive_eps(norm), momentum, affine=False, track_running_stats=False)
    module.affine = norm.weight is not None or norm.bias is not None
    return adopt_affine(module, norm)
