"""How many filters a budget asks to remove, and from which groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lowrank_nn.errors import BudgetError, LowRankError, PlanError
from lowrank_nn.graph.groups import ChannelGroup
from lowrank_nn.graph.surgery import Removal, remove_units
from lowrank_nn.graph.widths import SharedWidth
from lowrank_nn.pipeline.state import State
from lowrank_nn.planning.unit_choice import KeepRule

_BISECTIONS = 12


def within_budget(
    state: State,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    keep: KeepRule,
    widths: Sequence[SharedWidth],
    stuck: Mapping[str, str],
    *,
    additive: bool,
) -> list[Removal]:
    """Return the removal of the smallest share of units that brings the model within the budget.

    Args:
        state: The dry run.
        groups: The groups.
        scores: Importance of the units of those that may be touched, by name.
        keep: What every group keeps.
        widths: Groups that lose the same number of channels.
        stuck: By name of each other group, why it keeps all its units; for the error.
        additive: Whether the scores say what is lost with a unit, in one unit for all groups: then they are set against
            what the unit saves.

    Raises:
        PlanError: There is no budget.
        BudgetError: No share does.
    """
    search = _Search(state, groups, keep, widths)
    if additive and keep.scope == "global":
        scores = search.per_cost(scores)
    low, high, best = 0.0, 1.0, search.removals(scores, 1.0)
    most = search.overspent(best)
    if most > 1:
        raise BudgetError(
            f"Prune: the budget cannot be met by removing filters: with {keep.min_keep:.3g} of each group kept there "
            f"remains {most:.3g} of what is allowed.{_told(stuck)} Allow more, lower min_keep, or put LowRank() ahead."
        )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        tried = search.removals(scores, middle)
        if search.overspent(tried) > 1:
            low = middle
        else:
            high, best = middle, tried
    return best


def removals_of(groups: Sequence[ChannelGroup], chosen: Mapping[str, tuple[int, ...]]) -> list[Removal]:
    """Return the removals of the units chosen, by name of the group; groups that lose none are left out."""
    return [Removal(group, units) for group in groups if (units := chosen.get(group.name))]


def _told(stuck: Mapping[str, str]) -> str:
    """Return a sentence for every reason why groups keep all their units."""
    reasons: dict[str, list[str]] = {}
    for name, reason in stuck.items():
        reasons.setdefault(reason.rstrip("."), []).append(name)
    return "".join(f" It cannot touch {', '.join(names)}: {reason}." for reason, names in reasons.items())


class _Search:
    """Tries removals on the model of a dry run, and takes them back."""

    def __init__(
        self, state: State, groups: Sequence[ChannelGroup], keep: KeepRule, widths: Sequence[SharedWidth]
    ) -> None:
        if state.budget is None:
            raise PlanError(
                "Prune: there is neither an amount nor a budget. Pass Prune(0.3, granularity='filter'), or "
                "budget=Budget(macs=0.5) or the like."
            )
        self._state, self._groups, self._keep, self._widths = state, groups, keep, widths
        self._target = state.budget.scaled(state.slack)
        self._allowed = self._target.allowed(state.dense_cost(), state.dense_latency())

    def removals(self, scores: Mapping[str, Tensor], share: float) -> list[Removal]:
        """Return the removals at a share, without those that a layer refuses at this size."""
        removals = removals_of(self._groups, self._keep.choose(scores, share, self._widths))
        if self._goes(removals):
            return removals
        return [removal for removal in removals if self._goes([removal])]

    def overspent(self, removals: Sequence[Removal]) -> float:
        """Return the largest ratio of what remains to what the budget allows."""
        return float(self._spent(removals).max())

    def per_cost(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is lost with each unit over what it saves, of what the budget is most exceeded in.

        Savings are means over half of a group: single units may save nothing, where time goes by whole vectors.
        """
        before = self._spent([])
        most = int(before.argmax())
        rated = {}
        for group in self._groups:
            if group.name in scores:
                removal = Removal(group, tuple(range(group.size // 2)))
                saved = 0.0
                if removal.units and self._goes([removal]):
                    saved = float((before - self._spent([removal]))[most]) / len(removal.units)
                rated[group.name] = scores[group.name] / max(saved, 1e-9)
        return rated

    def _spent(self, removals: Sequence[Removal]) -> NDArray[np.float64]:
        undo = remove_units(self._state.model, removals)
        try:
            spent = self._target.spent(self._state.cost(), self._state.latency())
        finally:
            undo()
        return spent / self._allowed

    def _goes(self, removals: Sequence[Removal]) -> bool:
        try:
            remove_units(self._state.model, removals)()
        except LowRankError:
            return False
        return True
