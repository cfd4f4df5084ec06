"""Named ways to share out a budget: the knapsack, and what others do, for comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from lowrank_nn.layers import LowRankLayer, SVDConv2d, SVDLinear, TuckerConv2d
from lowrank_nn.planning.allocation import allocate, repair
from lowrank_nn.planning.baselines import alds_candidates, musco_candidates
from lowrank_nn.planning.candidates import SiteCandidates, low_rank_candidates
from lowrank_nn.planning.choices import Choices, ChoiceTable, Chosen, Floats, least

Allocation = Literal["knapsack", "uniform", "alds", "musco"]


def uniform(layers: Sequence[Choices], allowed: Floats) -> list[int] | None:
    """Choose the best candidate of each layer that keeps at most one share of the layer, the same for all.

    The share, of what the layer's most expensive candidate costs, is the largest that fits. With several entries a
    layer's shares stand to each other as those that ``allowed`` leaves of all layers. A layer without a candidate under
    its share takes the one that comes nearest.

    Args:
        layers: The candidates of each layer, at least one each.
        allowed: What all layers together may cost, shape ``(entries,)``.

    Returns:
        The index of the chosen candidate of each layer; None if no choice fits.
    """
    if not layers:
        return allocate(layers, allowed)
    table = ChoiceTable.of(layers, allowed)
    whole = table.costs.max(axis=1, keepdims=True)
    evenly = np.maximum(whole / np.maximum(whole.sum(axis=0), 1e-300), 1e-300)
    needed = (table.costs / evenly).max(axis=2)

    def choose(share: float) -> Chosen:
        under = np.maximum(needed.min(axis=1, keepdims=True), share)
        return least(np.where(needed <= under, table.errors, np.inf), table.totals)

    return _first_that_fits(table, np.unique(needed)[::-1], choose)


def min_max(layers: Sequence[Choices], allowed: Floats) -> list[int] | None:
    """Choose so that the largest error of any layer is as small as the budget admits, and no layer costs more for it.

    Errors are to be relative to each layer. This is how ALDS shares out a budget.

    Args:
        layers: The candidates of each layer, at least one each.
        allowed: What all layers together may cost, shape ``(entries,)``.

    Returns:
        The index of the chosen candidate of each layer; None if no choice fits.

    References:
        Liebenwein et al. 2021, "Compressing Neural Networks: Towards Determining the Optimal Layer-wise Decomposition".
    """
    if not layers:
        return allocate(layers, allowed)
    table = ChoiceTable.of(layers, allowed)

    def choose(largest: float) -> Chosen:
        under = np.maximum(table.errors.min(axis=1, keepdims=True), largest)
        usable = table.restricted(table.errors <= under)
        cheapest = least(usable.errors, table.totals)
        return cheapest if (repaired := repair(usable, cheapest)) is None else repaired

    return _first_that_fits(table, np.unique(table.errors), choose)


def same_level(layers: Sequence[Choices], allowed: Floats) -> list[int] | None:
    """Choose, for all layers, the largest errors up to one level; the level is the smallest that fits.

    Where errors are the settings of one dial (w in full - w (full - vbmf)), this turns it once for the whole network.

    Args:
        layers: The candidates of each layer, at least one each.
        allowed: What all layers together may cost, shape ``(entries,)``.

    Returns:
        The index of the chosen candidate of each layer; None if no choice fits.
    """
    if not layers:
        return allocate(layers, allowed)
    table = ChoiceTable.of(layers, allowed)

    def choose(level: float) -> Chosen:
        under = np.maximum(table.errors.min(axis=1, keepdims=True), level)
        return least(np.where(table.errors <= under, -table.errors, np.inf), table.totals)

    return _first_that_fits(table, np.unique(table.errors), choose)


def _first_that_fits(table: ChoiceTable, levels: Floats, choose: Callable[[float], Chosen]) -> list[int] | None:
    """Bisect the first of ``levels`` whose choice fits, each choice being cheaper than the one before."""
    if table.hopeless():
        return None
    best: Chosen | None = None
    low, high = -1, len(levels)
    while high - low > 1:
        middle = (low + high) // 2
        chosen = choose(float(levels[middle]))
        if table.fits(chosen):
            best, high = chosen, middle
        else:
            low = middle
    best = table.any_fit() if best is None else best
    return None if best is None else table.indices(best)


@dataclasses.dataclass(frozen=True)
class AllocationRule:
    """A way to choose one candidate per layer under a budget.

    Attributes:
        choose: Returns the index of the chosen candidate of each layer, or None if no choice fits.
        candidates: Lists the candidates of one layer, as :func:`low_rank_candidates` does.
        formats: Low-rank classes that the rule was published with; None for those planned by default.
    """

    choose: Callable[[Sequence[Choices], Floats], list[int] | None]
    candidates: Callable[..., SiteCandidates] = low_rank_candidates
    formats: tuple[type[LowRankLayer], ...] | None = None


ALLOCATIONS: dict[Allocation, AllocationRule] = {
    "knapsack": AllocationRule(allocate),
    "uniform": AllocationRule(uniform),
    "alds": AllocationRule(min_max, alds_candidates, (SVDConv2d, SVDLinear)),
    "musco": AllocationRule(same_level, musco_candidates, (TuckerConv2d, SVDConv2d, SVDLinear)),
}
"""The rules that ``LowRank(allocation=...)`` takes by name."""
