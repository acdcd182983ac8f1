"""Batch normalization (arXiv 1502.03167): ``nn.BatchNorm1d/2d/3d``.

In train mode the moments of one batch, over batch and space; in eval mode the running statistics.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from normswap.errors import Refusal
from normswap.norms.adopt import adopt_affine, adopt_statistics, channels_first, dimensions
from normswap.registry import builds, reads
from normswap.spec import BATCH, Norm

RANKS: dict[type, frozenset[int]] = {
    nn.BatchNorm1d: frozenset({2, 3}),
    nn.BatchNorm2d: frozenset({4}),
    nn.BatchNorm3d: frozenset({5}),
}


class BatchNorm(_BatchNorm):
    """``nn.BatchNorm`` for an input ``(N, C, *S)`` of any rank of at least 2, where the rank is not known
    beforehand."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


@reads(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm)
def read(module: _BatchNorm) -> Norm:
    refuse_lazy(module)
    return Norm(
        kind="batch",
        channels=module.num_features,
        pools=BATCH,
        ranks=next((ranks for cls, ranks in RANKS.items() if isinstance(module, cls)), None),
        eps=module.eps,
        momentum=module.momentum,
        weight=module.weight,
        bias=module.bias,
        running_mean=module.running_mean,
        running_var=module.running_var,
        num_batches_tracked=module.num_batches_tracked,
    )


@reads(_LazyNormBase, nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
@reads(nn.LazyInstanceNorm1d, nn.LazyInstanceNorm2d, nn.LazyInstanceNorm3d)
def refuse_lazy(module: nn.Module) -> Norm:
    if isinstance(module, _LazyNormBase):
        raise Refusal("it is lazy and not initialised yet: run the model once on an input, then convert")
    return None  # type: ignore[return-value]


@builds("batch")
def build(norm: Norm) -> nn.Module:
    channels_first(norm, "batch")
    classes = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    cls = classes.get(dimensions(norm) or 0, BatchNorm)
    return fill(cls(norm.channels, positive_eps(norm), norm.momentum, affine=False, track_running_stats=False), norm)


def fill(module: _BatchNorm, norm: Norm) -> _BatchNorm:
    """Affine and statistics of ``norm`` for a ``_BatchNorm`` that was built without them."""
    module.affine = norm.weight is not None or norm.bias is not None
    adopt_affine(module, norm)
    if norm.has_statistics or "batch" not in norm.pools:
        module.track_running_stats = True
        adopt_statistics(module, norm)
    return module


def eps_of(norm: Norm) -> float:
    """The eps of a kind that must have one; the default where the source followed the dtype (``nn.RMSNorm``)."""
    return 1e-5 if norm.eps is None else norm.eps


def positive_eps(norm: Norm) -> float:
    """The eps of a layer that torch refuses to train with 0, as torchvision's frozen norms may have it."""
    return max(eps_of(norm), 1e-12)
