"""A norm and what follows it (drop, activation) in one module, with the norm's parameters under their own names.

``bn1.weight`` of a BatchNorm-with-activation stays ``bn1.weight``: the built norm's class is extended by one that runs
the named submodules afterwards. Such a class is made on demand; copying and pickling go by its base class."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor, nn

from normswap.errors import NormswapError
from normswap.registry import reader_of, reads
from normswap.spec import Norm


class Followed:
    """Mix-in: after the base class's ``forward``, the submodules named in ``followers`` run in order."""

    followers: tuple[str, ...]
    followed_base: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        for name in self.followers:
            out = self._modules[name](out)  # type: ignore[attr-defined]
        return out  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (self.followed_base,), self.__getstate__()


class FollowedNorm(Followed):
    """The mix-in where the base class is a norm that has a reader."""


def _empty(base: Any) -> Any:
    cls = followed_class(base)
    return cls.__new__(cls)


@cache
def followed_class(base: Any) -> Any:
    mixin = Followed if reader_of(base) is None else FollowedNorm
    members = {"__module__": __name__, "__doc__": base.__doc__, "followed_base": base}
    return type(f"{base.__name__}Act", (mixin, base), members)


@reads(FollowedNorm)
def read(module: Any) -> Norm:
    """The base class's norm, followed by what follows it."""
    read = reader_of(module.followed_base)
    assert read is not None
    return replace(read(module), then=tuple(module._modules[name] for name in module.followers))


def follow(module: nn.Module, then: dict[str, nn.Module]) -> nn.Module:
    """Make ``module`` run ``then`` (by submodule name) after itself, in place, and return it.

    Raises :class:`NormswapError` when a name is taken in the module.
    """
    if not then:
        return module
    for name, follower in then.items():
        if hasattr(module, name):
            raise NormswapError(
                f"{type(module).__name__} already has an attribute {name!r}; cannot follow it by {follower}"
            )
        module.add_module(name, follower)
    cls: Any = type(module)
    module.__class__ = followed_class(cls)
    module.followers = tuple(then)  # type: ignore[assignment]
    return module
