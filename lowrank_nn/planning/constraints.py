"""What is demanded of single layers, whatever the budget: filters over their candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lowrank_nn.errors import OptionError, PlanError, is_share
from lowrank_nn.planning.candidates import Candidate, SiteCandidates

_ROUNDING = 1e-9


def in_multiples(table: SiteCandidates, multiple: int) -> SiteCandidates:
    """Return the candidates whose every rank is a multiple of ``multiple``; modes left whole have no rank."""
    kept = [candidate for candidate in table.candidates if _in_multiples(candidate, multiple)]
    note = table.note
    if len(kept) == 1 and not note:
        note = f"no format is smaller at ranks that are multiples of {multiple}"
    return dataclasses.replace(table, candidates=kept, note=note)


def within_shares(table: SiteCandidates, least: float, most: float) -> SiteCandidates:
    """Return the candidates that keep from ``least`` to ``most`` of the layer's parameters.

    Args:
        table: The candidates, the dense layer first; none at all for a layer that cannot be replaced.
        least: Share of the dense weight's parameters that is to stay at least.
        most: Share that may stay at most.

    Raises:
        PlanError: There is no such candidate.
    """
    shares = [candidate.cost.params / table.candidates[0].cost.params for candidate in table.candidates]
    pairs = zip(table.candidates, shares, strict=True)
    kept = [candidate for candidate, share in pairs if least - _ROUNDING <= share <= most + _ROUNDING]
    if not kept and (shares or most < 1):
        known = table.note or f"its candidates keep {min(shares[1:]):.3g} to {max(shares[1:]):.3g}, or all of them"
        raise PlanError(
            f"LowRank: {table.path or '(the model itself)'} is to keep from {least:.3g} to {most:.3g} of its "
            f"parameters, and cannot: {known}. Widen at_least and at_most, or leave it out with but_not."
        )
    return dataclasses.replace(table, candidates=kept)


def checked_shares(name: str, bounds: Mapping[str, float] | None) -> dict[str, float]:
    """Return shares by pattern.

    Raises:
        OptionError: They are no mapping, or a share is outside (0, 1].
    """
    if bounds is None:
        return {}
    if not isinstance(bounds, Mapping):
        raise OptionError(f"LowRank: {name} maps patterns to shares, such as {{'layer1.*': 0.5}}, got {bounds!r}.")
    for pattern, share in bounds.items():
        if not is_share(share):
            raise OptionError(
                f"LowRank: {name} gives the share of a layer's parameters, above 0 and at most 1, got {share!r} for "
                f"{pattern!r}."
            )
    return dict(bounds)


def _in_multiples(candidate: Candidate, multiple: int) -> bool:
    rank = candidate.options.get("rank")
    modes = rank if isinstance(rank, tuple) else (rank,)
    return all(mode is None or mode % multiple == 0 for mode in modes)
