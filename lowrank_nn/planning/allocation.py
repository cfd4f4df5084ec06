"""Choosing one candidate per layer under a global budget: a multiple-choice knapsack.

For prices w on the budget's entries and a multiplier t, each layer takes the candidate that minimises
error + t * (w . cost) on its own; the smallest t that fits the budget gives the best choice on the convex hull of all
layers (Everett 1963). With several budget entries the prices are searched on a grid. What the hull leaves unspent
goes, greedily, to the upgrade with the largest fall of error per cost that still fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_BISECTIONS = 60
_PRICE_STEPS = (8, 48)  # the fine grid only where nothing on the coarse one fits


class Choices(NamedTuple):
    """The candidates of one layer.

    Attributes:
        errors: What each candidate loses, shape ``(n,)``, on a scale that is comparable between layers.
        costs: What each costs in each entry of the budget, shape ``(n, entries)``.
    """

    errors: Floats
    costs: Floats


def allocate(layers: Sequence[Choices], allowed: Floats) -> list[int] | None:
    """Choose one candidate per layer with a small sum of errors and a sum of costs within ``allowed``.

    Args:
        layers: The candidates of each layer, at least one each.
        allowed: What all layers together may cost, shape ``(entries,)``.

    Returns:
        The index of the chosen candidate of each layer, or None if no choice is found that fits: with one entry
        there is none; with several there may be one between the prices of the grid.
    """
    if not layers:
        return [] if bool((allowed >= 0).all()) else None
    for steps in _PRICE_STEPS:
        best = _best_over_prices(layers, allowed, steps)
        if best is not None:
            return best
    return None


def _best_over_prices(layers: Sequence[Choices], allowed: Floats, steps: int) -> list[int] | None:
    """Return the best choice that fits over a grid of prices; None if there is none."""
    best: list[int] | None = None
    for prices in _prices(len(allowed), steps):
        chosen = _cheapest_multiplier(layers, allowed, prices)
        if chosen is None:
            continue
        chosen = _spend_leftovers(layers, allowed, chosen)
        if best is None or _error(layers, chosen) < _error(layers, best):
            best = chosen
    return best


def _prices(entries: int, steps: int) -> Iterator[Floats]:
    """Yield price vectors that sum to one, on a regular grid."""
    for parts in itertools.product(range(steps + 1), repeat=entries - 1):
        if sum(parts) <= steps:
            yield np.array([*parts, steps - sum(parts)]) / steps


def _cheapest_multiplier(layers: Sequence[Choices], allowed: Floats, prices: Floats) -> list[int] | None:
    """Bisect, on a log scale, the smallest multiplier whose choice fits the budget."""
    scale = np.where(allowed > 0, allowed, 1.0)
    priced = [choices.costs / scale @ prices for choices in layers]

    def choose(multiplier: float) -> list[int]:
        # Ties go to the cheaper candidate: errors of exactly zero are common (full rank, dense).
        return [
            int(np.lexsort((cost, choices.errors + multiplier * cost))[0])
            for choices, cost in zip(layers, priced, strict=True)
        ]

    low, high = 1e-12, 1e12
    if not _fits(layers, choose(high), allowed):
        return None
    if _fits(layers, choose(low), allowed):
        return choose(low)
    for _ in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if _fits(layers, choose(middle), allowed) else (middle, high)
    return choose(high)


def _spend_leftovers(layers: Sequence[Choices], allowed: Floats, chosen: list[int]) -> list[int]:
    """Upgrade single layers, the best bargain first, while the budget lasts."""
    chosen = list(chosen)
    scale = np.where(allowed > 0, allowed, 1.0)
    while True:
        left = allowed - _cost(layers, chosen)
        bargains = [_best_upgrade(choices, now, left, scale) for choices, now in zip(layers, chosen, strict=True)]
        layer = max(range(len(layers)), key=lambda index: bargains[index][0])
        worth, candidate = bargains[layer]
        if worth <= 0:
            return chosen
        chosen[layer] = candidate


def _best_upgrade(choices: Choices, now: int, left: Floats, scale: Floats) -> tuple[float, int]:
    """Return (fall of error per cost, candidate) of the best upgrade that fits; worth 0 if there is none."""
    gain = choices.errors[now] - choices.errors
    extra = choices.costs - choices.costs[now]
    possible = (gain > 0) & (extra <= left).all(axis=1)
    if not possible.any():
        return 0.0, now
    worth = np.where(possible, gain / np.maximum((extra / scale).sum(axis=1), 1e-12), 0.0)
    return float(worth.max()), int(worth.argmax())


def _cost(layers: Sequence[Choices], chosen: Sequence[int]) -> Floats:
    total: Floats = np.sum([choices.costs[i] for choices, i in zip(layers, chosen, strict=True)], axis=0)
    return total


def _error(layers: Sequence[Choices], chosen: Sequence[int]) -> float:
    return float(sum(choices.errors[i] for choices, i in zip(layers, chosen, strict=True)))


def _fits(layers: Sequence[Choices], chosen: Sequence[int], allowed: Floats) -> bool:
    return bool((_cost(layers, chosen) <= allowed * (1 + 1e-12)).all())
