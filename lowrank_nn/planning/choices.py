"""The candidates of all layers as arrays, and what a choice of one per layer costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from typing_extensions import Self

Floats = NDArray[np.float64]
Chosen = NDArray[np.int64]

ROUNDING = 1e-12
"""By what share of the budget a sum of costs may miss it."""

_SOLVER_ROUNDING = 1e-6
_NODES = 1000


class Choices(NamedTuple):
    """The candidates of one layer.

    Attributes:
        errors: What each candidate loses, shape ``(n,)``, on a scale that is comparable between layers.
        costs: What each costs in each entry of the budget, shape ``(n, entries)``.
    """

    errors: Floats
    costs: Floats


class ChoiceTable:
    """The candidates of all layers, costs in units of what is allowed; a choice is an index per layer.

    Layers with fewer candidates than others repeat their last one.

    Attributes:
        errors: Shape ``(layers, n)``.
        costs: Shape ``(layers, n, entries)``.
        limit: What all layers together may cost, 1 unless nothing is allowed, shape ``(entries,)``.
    """

    def __init__(self, errors: Floats, costs: Floats, limit: Floats, last: Chosen) -> None:
        self.errors, self.costs, self.limit, self._last = errors, costs, limit, last
        self.totals: Floats = costs.sum(axis=2)
        self._rows = np.arange(len(errors))

    @classmethod
    def of(cls, layers: Sequence[Choices], allowed: Floats) -> Self:
        """Stack the choices of at least one layer."""
        most = max(len(layer.errors) for layer in layers)
        scale = np.where(allowed > 0, allowed, 1.0)
        errors = np.stack([_padded(layer.errors, most) for layer in layers])
        costs = np.stack([_padded(layer.costs / scale, most) for layer in layers])
        last = np.array([len(layer.errors) - 1 for layer in layers])
        return cls(errors, costs, np.where(allowed > 0, 1.0, allowed), last)

    def restricted(self, usable: NDArray[np.bool_]) -> ChoiceTable:
        """Return a table in which only the ``usable`` candidates have a finite error, which is zero."""
        return ChoiceTable(np.where(usable, 0.0, np.inf), self.costs, self.limit, self._last)

    def indices(self, chosen: Chosen) -> list[int]:
        """Return a choice as indices into the candidates that the layers really have."""
        real: list[int] = np.minimum(chosen, self._last).tolist()
        return real

    def at(self, values: NDArray[np.float64], chosen: Chosen) -> Floats:
        """Return the entries of ``values``, shape ``(layers, n, ...)``, that belong to a choice."""
        picked: Floats = values[self._rows, chosen]
        return picked

    def spent(self, chosen: Chosen) -> Floats:
        """Return what a choice costs, shape ``(entries,)``."""
        total: Floats = self.at(self.costs, chosen).sum(axis=0)
        return total

    def error(self, chosen: Chosen) -> float:
        """Return the sum of the errors of a choice."""
        return float(self.at(self.errors, chosen).sum())

    def overspent(self, spent: Floats) -> Floats:
        """Return by how much costs of shape ``(..., entries)`` are above the limit, summed over entries."""
        excess: Floats = np.maximum(spent - self.limit - ROUNDING, 0.0).sum(axis=-1)
        return excess

    def excess(self, chosen: Chosen) -> float:
        """Return by how much a choice is above the budget."""
        return float(self.overspent(self.spent(chosen)))

    def fits(self, chosen: Chosen) -> bool:
        """Whether a choice is within the budget."""
        return self.excess(chosen) == 0

    def hopeless(self) -> bool:
        """Whether some entry of the budget is out of reach, whatever the others may be."""
        return bool(self.overspent(self.costs.min(axis=1).sum(axis=0)) > 0)

    def any_fit(self) -> Chosen | None:
        """Return some choice that fits, found by integer programming; None if there is none, or none is found soon."""
        layers, candidates, entries = self.costs.shape
        one_each = LinearConstraint(sparse.kron(sparse.eye(layers), np.ones(candidates), format="csr"), 1, 1)
        usable = np.isfinite(self.errors).ravel().astype(np.float64)
        for margin in (0.0, _SOLVER_ROUNDING):  # an answer may overspend by the solver's tolerance
            within = LinearConstraint(self.costs.reshape(-1, entries).T, ub=self.limit - margin)
            found = milp(
                np.zeros(layers * candidates),
                integrality=1,
                bounds=Bounds(0, usable),
                constraints=[one_each, within],
                options={"node_limit": _NODES},
            )
            if found.x is None:
                return None
            chosen: Chosen = found.x.reshape(layers, candidates).argmax(axis=1)
            if self.fits(chosen):
                return chosen
        return None


def least(first: Floats, then: Floats) -> Chosen:
    """Return, per row, the index of the smallest ``first``; among equals that of the smallest ``then``."""
    chosen: Chosen = np.where(first <= first.min(axis=1, keepdims=True), then, np.inf).argmin(axis=1)
    return chosen


def _padded(values: Floats, size: int) -> Floats:
    return values[np.minimum(np.arange(size), len(values) - 1)]
