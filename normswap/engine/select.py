"""``where`` and ``skip``: a glob, a list of globs, or a function of name and norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from normswap.engine.sites import Site
from normswap.errors import NormswapError
from normswap.spec import Norm

Selector = str | Sequence[str] | Callable[[str, Norm], bool] | None


def matches(selector: Selector, site: Site) -> bool:
    """Whether a site is meant. Raises :class:`NormswapError` for a selector of another type."""
    if callable(selector):
        return site.norm is not None and bool(selector(site.name, site.norm))
    return any(fnmatchcase(name, glob) for glob in _globs(selector) for name in (site.name, *site.aliases))


def _globs(selector: Selector) -> list[str]:
    if selector is None or callable(selector):
        return []
    globs = [selector] if isinstance(selector, str) else selector
    if not isinstance(globs, (list, tuple, set, frozenset)) or not all(isinstance(glob, str) for glob in globs):
        raise NormswapError(f"where and skip take a glob, a list of globs or f(name, norm); got {selector!r}")
    return list(globs)


def unmatched(selector: Selector, sites: Sequence[Site]) -> list[str]:
    """The globs that match no norm: most likely a slip."""
    return [glob for glob in _globs(selector) if not any(matches(glob, site) for site in sites)]


def check_globs(sites: Sequence[Site], **selectors: Selector) -> None:
    """Raise :class:`NormswapError` for a glob that matches no norm of a model that has some."""
    for name, selector in selectors.items():
        if sites and (globs := unmatched(selector, sites)):
            listed = ", ".join(map(repr, globs))
            raise NormswapError(f"{name}: no norm is called {listed}; the first is {sites[0].name!r}")


def excluded(site: Site, where: Selector, skip: Selector) -> str | None:
    """Why the selectors leave a site out, or ``None``."""
    if where is not None and not matches(where, site):
        return "not selected by where"
    if skip is not None and matches(skip, site):
        return "excluded by skip"
    return None
