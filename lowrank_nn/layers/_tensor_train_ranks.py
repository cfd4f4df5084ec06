"""The ranks of tensor trains as rank rules and the planner see them."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_nn.decompose import Metric, reachable_ranks, tensor_train_errors, tt_limits
from lowrank_nn.layers._folding import Folding
from lowrank_nn.layers._matrix import truncation_errors
from lowrank_nn.layers._rank_problem import IntArray, Positions, RankProblem, RankTable, cheapest_front, spread_ranks
from lowrank_nn.layers._source import Source

if TYPE_CHECKING:
    from lowrank_nn.layers._tensor_train import TensorTrainLayer

_COMBINATIONS = 200_000  # of ranks in a table, at most
_EXACT = 5  # ranks of each bond at which the error of TT-SVD is computed
_FITTED = 3  # ranks that are fitted for a table under a metric
_TABLE_ITERATIONS = 10


class TensorTrainProblem(RankProblem):
    """One rank for each bond between two cores, the same in all groups.

    Args:
        cls: The layer class.
        source: The trained layer.
        folding: How its weight is folded.
        options: Options of the class beside the rank.
    """

    def __init__(
        self, cls: type[TensorTrainLayer], source: Source, folding: Folding, options: Mapping[str, Any]
    ) -> None:
        super().__init__(cls.__name__, source)
        self.layer_class, self.source, self.folding, self.options = cls, source, folding, options
        self.limits = tt_limits(folding.shape)

    @abc.abstractmethod
    def places(self, positions: Positions) -> tuple[int, ...]:
        """Return how often each core is applied in one forward."""

    def unfoldings(self) -> tuple[Tensor, ...]:
        """Return for each bond the matrices of the modes before it and behind it."""
        return _unfoldings(self.folding.merged(self.weight))

    def params(self, *ranks: IntArray | int) -> IntArray:
        """Return the scalars in all cores."""
        total: IntArray = np.sum(self._sizes(*ranks), axis=0)
        return total

    def macs(self, positions: Positions, *ranks: IntArray | int) -> IntArray:
        """Return the multiply-accumulates of all cores."""
        work = [size * places for size, places in zip(self._sizes(*ranks), self.places(positions), strict=True)]
        total: IntArray = np.sum(work, axis=0)
        return total

    def _sizes(self, *ranks: IntArray | int) -> list[IntArray]:
        """Return the weights in each core."""
        shape = self.folding.shape
        reached = reachable_ranks(shape, np.broadcast_arrays(*ranks))
        one = np.ones_like(reached[0])
        bonds = (one, *reached, one)
        return [self.groups * bonds[k] * size * bonds[k + 1] for k, size in enumerate(shape)]

    def table(self, metric: Metric | None = None) -> RankTable:
        """Return the ranks of a grid that no other beats in both error and size, or error and MACs.

        Errors are those of TT-SVD: exact at a few ranks of each bond, and between them estimated from the sum of what
        the unfoldings lose, which bounds them. Sweeps lower them by a few percent. Under a metric they are those of the
        weight in a product metric, times what a few fits gain on it.
        """
        tensors = self.folding.merged(self.weight) if metric is None else self.folding.weighted(self.weight, metric)
        grid = self._grid()
        ranks = np.stack(np.meshgrid(*grid, indexing="ij"), axis=-1).reshape(-1, len(grid))
        errors = _estimated_errors(tensors, grid).ravel()
        positions = self.typical_positions()
        params, macs = self.params(*ranks.T), self.macs(positions, *ranks.T)
        dense_params, dense_macs = self.dense(positions)
        # What neighbours cannot fill is the same train under another name.
        useful = (ranks == np.stack(reachable_ranks(self.folding.shape, tuple(ranks.T)), axis=1)).all(axis=1)
        small = useful & ((params < dense_params) | (macs < dense_macs))
        fronts = [cheapest_front(costs, errors, small) for costs in (params, macs)]
        lossless = np.flatnonzero((ranks == self.limits).all(axis=1))
        kept = np.unique(np.concatenate([*fronts, lossless]))
        ranks, errors, params = ranks[kept], errors[kept], params[kept]
        return RankTable(ranks, errors if metric is None else self._calibrated(ranks, errors, params, metric))

    def _grid(self) -> list[IntArray]:
        """Return for each bond the ranks that are combined with those of the others."""
        most = max(2, int(_COMBINATIONS ** (1 / len(self.limits))))
        return [_thinned(spread_ranks(limit, self.multiple), most) for limit in self.limits]

    def _calibrated(
        self, ranks: IntArray, errors: NDArray[np.float64], params: IntArray, metric: Metric
    ) -> NDArray[np.float64]:
        """Return the errors times the ratio of those of a few fits to them, by the logarithm of the size."""
        open_ranks = np.flatnonzero((ranks != self.limits).any(axis=1) & (errors > 0))
        if not open_ranks.size or self.weight.is_meta:
            return errors
        by_size = open_ranks[np.argsort(params[open_ranks], kind="stable")]
        places = np.unique(np.linspace(0, len(by_size) - 1, _FITTED + 2)[1:-1].astype(np.int64))
        fitted = by_size[places]
        ratios = [self._fit_error(tuple(ranks[i].tolist()), metric) / errors[i] for i in fitted]
        found: NDArray[np.float64] = errors * np.interp(np.log(params), np.log(params[fitted]), ratios)
        return found

    def _fit_error(self, ranks: tuple[int, ...], metric: Metric) -> float:
        fit = {"iterations": _TABLE_ITERATIONS}
        layer = self.layer_class.fitted(self.source, metric, fit=fit, rank=ranks, **self.options)
        with torch.no_grad():
            return metric.error(self.weight.to(metric.mean) - layer.dense_weight().to(metric.mean))


class TTConvProblem(TensorTrainProblem):
    """The ranks of the train over (input channels, rows, columns, output channels)."""

    def places(self, positions: Positions) -> tuple[int, ...]:
        return positions.inputs, positions.between, positions.outputs, positions.outputs

    def table(self, metric: Metric | None = None) -> RankTable:
        """Return the ranks worth comparing; none for a kernel of one row or column, on which this is Tucker-2."""
        if 1 in self.weight.shape[2:]:
            return RankTable.empty(len(self.limits))
        return super().table(metric)


class TTLinearProblem(TensorTrainProblem):
    """The ranks of the train over pairs of an output and an input factor."""

    def places(self, positions: Positions) -> tuple[int, ...]:
        outputs, inputs = self.folding.outputs, self.folding.inputs
        return tuple(positions.batch * math.prod(outputs[k + 1 :]) * math.prod(inputs[:k]) for k in range(len(inputs)))


def _estimated_errors(tensors: Tensor, grid: list[IntArray]) -> NDArray[np.float64]:
    """Return the squared errors of TT-SVD, summed over groups, at all combinations of ranks."""
    bound = np.zeros([len(ranks) for ranks in grid])
    for bond, (matrices, ranks) in enumerate(zip(_unfoldings(tensors), grid, strict=True)):
        lost = truncation_errors(matrices)[ranks - 1]
        bound += lost.reshape([-1 if other == bond else 1 for other in range(len(grid))])
    if len(grid) == 1:
        return bound
    few = [np.unique(_thinned(np.arange(len(ranks)), _EXACT)) for ranks in grid]
    exact = sum(
        tensor_train_errors(tensor, [r[i].tolist() for r, i in zip(grid, few, strict=True)]) for tensor in tensors
    )
    assert isinstance(exact, Tensor)
    at_few = bound[np.ix_(*few)]
    ratios = np.minimum(np.divide(exact.cpu().numpy(), at_few, out=np.ones_like(at_few), where=at_few > 0), 1.0)
    for bond, (ranks, indices) in enumerate(zip(grid, few, strict=True)):
        ratios = _interpolated(ratios, bond, np.log(ranks), np.log(ranks[indices]))
    estimated: NDArray[np.float64] = bound * ratios
    return estimated


def _interpolated(
    values: NDArray[np.float64], axis: int, wanted: NDArray[np.float64], known: NDArray[np.float64]
) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.apply_along_axis(lambda line: np.interp(wanted, known, line), axis, values)
    return found


def _unfoldings(tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the matrices (groups, n_1 ... n_k, n_{k+1} ... n_d) for each bond k."""
    groups, *shape = tensors.shape
    return tuple(tensors.reshape(groups, math.prod(shape[:k]), -1) for k in range(1, len(shape)))


def _thinned(ranks: IntArray, most: int) -> IntArray:
    """Return at most so many of the ranks, the first and the last among them."""
    if len(ranks) <= most:
        return ranks
    return ranks[np.unique(np.linspace(0, len(ranks) - 1, most).round().astype(np.int64))]
