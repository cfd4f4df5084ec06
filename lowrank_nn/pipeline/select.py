"""Which layers a step is about: shell patterns on dotted paths."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence

from lowrank_nn.errors import PlanError
from lowrank_nn.graph import Site
from lowrank_nn.graph.sites import describe_paths

Patterns = str | Sequence[str]

_SHOWN = 10


def select(
    sites: Iterable[Site], where: Patterns, but_not: Patterns, step: str, others: Iterable[Site] = ()
) -> list[Site]:
    """Return the sites that match a pattern of ``where`` and none of ``but_not``.

    Patterns are those of the shell (``*``, ``?``, ``[ab]``; ``*`` crosses dots) and match a layer's dotted path, the
    path of the compressed layer it is inside, or another name of a shared layer.

    Args:
        sites: The layers the step could act on.
        where: Patterns of the layers wanted.
        but_not: Patterns of the layers to leave as they are.
        step: Name of the step, for messages.
        others: The other layers of the model, for messages.

    Raises:
        PlanError: Something is no pattern; or a pattern matches no layer: the message lists the paths there are, and
            the layers of other kinds that it does match.
    """
    sites = list(sites)
    wanted, unwanted = _patterns("where", where, step), _patterns("but_not", but_not, step)
    for pattern in (*wanted, *unwanted):
        if not any(_matches(site, pattern) for site in sites):
            matched = [f"{site.path} ({type(site.layer).__name__})" for site in others if _matches(site, pattern)]
            raise PlanError(
                f"{step}: the pattern {pattern!r} matches no layer that this step can act on. "
                f"{describe_paths(site.path for site in sites)}{_of_another_kind(matched)}"
            )
    return [
        site
        for site in sites
        if any(_matches(site, p) for p in wanted) and not any(_matches(site, p) for p in unwanted)
    ]


def strictest(
    sites: Sequence[Site], bounds: Mapping[str, float], step: str, pick: Callable[[float, float], float]
) -> dict[str, float]:
    """Return, by path, the bound of every site that some pattern of ``bounds`` matches.

    Args:
        sites: The layers the step could act on.
        bounds: Bound by pattern.
        step: Name of the step, for messages.
        pick: Which of two bounds on one layer counts, ``min`` or ``max``.

    Raises:
        PlanError: A pattern matches no layer.
    """
    found: dict[str, float] = {}
    for pattern, bound in bounds.items():
        for site in select(sites, pattern, (), step):
            found[site.path] = pick(found.get(site.path, bound), bound)
    return found


def _patterns(name: str, patterns: object, step: str) -> tuple[str, ...]:
    several = (patterns,) if isinstance(patterns, str) else patterns
    if not (isinstance(several, Sequence) and all(isinstance(pattern, str) for pattern in several)):
        raise PlanError(
            f"{step}: {name} must be a pattern on dotted paths such as 'layer1.*', or a list of them, got {patterns!r}."
        )
    return tuple(several)


def _of_another_kind(matched: Sequence[str]) -> str:
    if not matched:
        return ""
    more = f" and {len(matched) - _SHOWN} more" if len(matched) > _SHOWN else ""
    return f" What it matches is of a kind that this step leaves alone: {', '.join(matched[:_SHOWN])}{more}."


def _matches(site: Site, pattern: str) -> bool:
    names = [site.path, *site.aliases] + ([site.inside] if site.inside is not None else [])
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)
