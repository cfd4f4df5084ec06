"""Choosing one candidate per layer under a global budget: a multiple-choice knapsack.

With a price on each entry of the budget, every layer takes the candidate that minimises error + prices . cost on its
own (Everett 1963). The prices that maximise the Lagrangian dual are found one entry at a time, in turn: each is the
smallest with which its entry fits. With one entry that is the best choice on the convex hull of all layers. What the
hull leaves unspent goes, greedily, to the upgrade with the largest fall of error per cost that still fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank_nn.planning.choices import ROUNDING, Choices, ChoiceTable, Chosen, Floats, least

_ROUNDS = 6
_FINISHED = 3  # choices that are worth spending the leftovers of
_REPAIRED = 2  # choices just beyond the budget that are worth bringing back


def allocate(layers: Sequence[Choices], allowed: Floats) -> list[int] | None:
    """Choose one candidate per layer with a small sum of errors and a sum of costs within ``allowed``.

    Args:
        layers: The candidates of each layer, at least one each. Errors may be of any size: only ratios of differences
            count.
        allowed: What all layers together may cost, shape ``(entries,)``.

    Returns:
        The index of the chosen candidate of each layer, or None if no choice fits. (With several entries the search
        for one is cut off; it has been seen to fail only on problems made for that.)

    References:
        Everett 1963, "Generalized Lagrange Multiplier Method for Solving Problems of Optimum Allocation of Resources".
    """
    if not layers:
        return [] if bool((allowed >= 0).all()) else None
    table = ChoiceTable.of(layers, allowed)
    if table.hopeless():
        return None
    tried = list({tuple(chosen): chosen for chosen in _priced(table)}.values())
    fitting = sorted((chosen for chosen in tried if table.fits(chosen)), key=table.error)[:_FINISHED]
    beyond = sorted((chosen for chosen in tried if not table.fits(chosen)), key=table.excess)[:_REPAIRED]
    fitting += [repaired for chosen in beyond if (repaired := repair(table, chosen)) is not None]
    if not fitting and (found := table.any_fit()) is not None:
        fitting = [found]
    best = min((_spend_leftovers(table, chosen) for chosen in fitting), key=table.error, default=None)
    return None if best is None else table.indices(best)


def repair(table: ChoiceTable, chosen: Chosen) -> Chosen | None:
    """Change one layer after the other, at the least error per saving, until the choice fits; None if it never does."""
    chosen = chosen.copy()
    spent = table.spent(chosen)
    while (excess := table.overspent(spent)) > 0:
        changed = spent + table.costs - table.at(table.costs, chosen)[:, None]
        saved = excess - table.overspent(changed)
        lost = table.errors - table.at(table.errors, chosen)[:, None]
        worth = np.where((saved > ROUNDING) & np.isfinite(lost), saved / np.maximum(lost, 1e-300), 0.0)
        layer, candidate = np.unravel_index(worth.argmax(), worth.shape)
        if worth[layer, candidate] <= 0:
            return None
        chosen[layer] = candidate
        spent = table.spent(chosen)
    return chosen


def _priced(table: ChoiceTable) -> list[Chosen]:
    """Return the choices met while every entry in turn gets the smallest price with which it fits."""
    prices = np.zeros(len(table.limit))
    met = []
    for _ in range(_ROUNDS):
        before = prices.copy()
        for entry in range(len(prices)):
            prices[entry], chosen = _smallest_price(table, prices, entry)
            met.append(chosen)
        if np.allclose(prices, before, rtol=1e-9, atol=0) or len(prices) == 1:
            break
    return met


def _smallest_price(table: ChoiceTable, prices: Floats, entry: int) -> tuple[float, Chosen]:
    """Return the smallest price of one entry with which it fits, the others' given, and the choice that fits.

    The choices at all prices are the corners of a convex curve, cost against everything else. From one corner that
    costs too much and one that fits, the price at which both are equally good leads to a corner between them, or
    shows that there is none. So the search has no scale of its own.
    """
    cost = table.costs[:, :, entry]
    others = np.where(np.arange(len(prices)) == entry, 0.0, prices)
    value = table.errors + table.costs @ others
    dear, cheap = least(value, table.totals), least(cost, value)

    def spent(chosen: Chosen) -> float:
        return float(table.at(cost, chosen).sum())

    limit = float(table.limit[entry]) + ROUNDING
    if spent(dear) <= limit:
        return 0.0, dear
    while True:
        # Differences layer by layer: layers that agree cancel exactly, however large their errors are.
        worse = (table.at(value, cheap) - table.at(value, dear)).sum()
        price = float(worse / (table.at(cost, dear) - table.at(cost, cheap)).sum())
        between = least(value + price * cost, table.totals)
        if not spent(cheap) < spent(between) < spent(dear):
            return price, cheap
        dear, cheap = (dear, between) if spent(between) <= limit else (between, cheap)


def _spend_leftovers(table: ChoiceTable, chosen: Chosen) -> Chosen:
    """Upgrade single layers, the best bargain first, while the budget lasts."""
    chosen = chosen.copy()
    while True:
        gain = table.at(table.errors, chosen)[:, None] - table.errors
        extra = table.costs - table.at(table.costs, chosen)[:, None]
        possible = (gain > 0) & (extra <= table.limit + ROUNDING - table.spent(chosen)).all(axis=2)
        worth = np.where(possible, gain / np.maximum(extra.sum(axis=2), 1e-12), 0.0)
        layer, candidate = np.unravel_index(worth.argmax(), worth.shape)
        if worth[layer, candidate] <= 0:
            return chosen
        chosen[layer] = candidate
