"""Group normalization (arXiv 1803.08494): ``nn.GroupNorm``.

The group count. Asked for nothing, it is the divisor of the channels nearest to 32 (the paper's choice; the smaller of
two equally near) that leaves at least two channels in a group, so that no group is a single channel by default. Two
values normalize to plus and minus one: where the input is known to have one position (``(N, C)``, or behind global
pooling), a group by default keeps at least 16 channels. ``groups=`` is exact and must divide; ``channels_per_group=``
too. A function of the channels may be given for either."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from normswap.errors import NormswapError
from normswap.norms.adopt import adopt_affine, channels_first
from normswap.norms.batch import eps_of
from normswap.registry import builds, reads
from normswap.spec import MAP, Norm

Count = int | Callable[[int], int]
DEFAULT_GROUPS = 32
SINGLE_POSITION_CHANNELS = 16


@reads(nn.GroupNorm)
def read(module: nn.GroupNorm) -> Norm:
    return Norm(
        kind="group",
        channels=module.num_channels,
        pools=MAP,
        groups=module.num_groups,
        eps=module.eps,
        momentum=None,
        weight=module.weight,
        bias=module.bias,
    )


def nearest_count(channels: int, least: int) -> int:
    """The divisor of ``channels`` nearest to 32 that leaves at least ``least`` channels (or all) in a group."""
    divisors = [d for d in range(1, channels + 1) if channels % d == 0 and channels // d >= min(least, channels)]
    return min(divisors, key=lambda d: (abs(d - DEFAULT_GROUPS), d))


def group_count(channels: int, groups: Count | None = None, channels_per_group: Count | None = None) -> int:
    """The number of groups for ``channels`` by the rule above.

    Raises :class:`NormswapError` for both options at once and for a count that does not divide the channels.
    """
    if groups is not None and channels_per_group is not None:
        raise NormswapError("give groups= or channels_per_group=, not both")
    if groups is None and channels_per_group is None:
        return nearest_count(channels, 2)
    name, given = ("groups", groups) if groups is not None else ("channels_per_group", channels_per_group)
    count = given(channels) if callable(given) else given
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise NormswapError(f"{name}={count!r} for {channels} channels: it must be a whole number of at least 1")
    if channels % count:
        near = [d for d in range(1, channels + 1) if channels % d == 0]
        near = sorted(sorted(near, key=lambda d: abs(d - count))[:2])
        raise NormswapError(
            f"{name}={count} does not divide {channels} channels; nearest that do: {', '.join(map(str, near))}. "
            "Leave it out for the nearest divisor, or give a function of the channels"
        )
    return count if name == "groups" else channels // count


@builds("group")
def build(norm: Norm, *, groups: Count | None = None, channels_per_group: Count | None = None) -> nn.Module:
    channels_first(norm, "group")
    count = group_count(norm.channels, groups, channels_per_group)
    return fill(nn.GroupNorm(count, norm.channels, eps_of(norm), affine=False), norm)


def fill(module: nn.GroupNorm, norm: Norm) -> nn.GroupNorm:
    module.affine = norm.weight is not None or norm.bias is not None
    return adopt_affine(module, norm)
