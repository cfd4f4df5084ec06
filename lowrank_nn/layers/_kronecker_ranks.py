"""The number of Kronecker products as rank rules and the planner see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lowrank_nn.decompose import Metric, balanced_shape
from lowrank_nn.errors import OptionError
from lowrank_nn.layers._folding import Folding
from lowrank_nn.layers._matrix import MatrixProblem, truncation_errors
from lowrank_nn.layers._rank_problem import IntArray, Positions, RankTable
from lowrank_nn.layers._source import Source

if TYPE_CHECKING:
    from lowrank_nn.layers._kronecker import KroneckerLayer

Shape = Sequence[int]

# Ranks that are fitted for the table, as shares of the rank that costs as much as the dense layer.
_FITTED_SHARES = np.geomspace(0.03, 0.5, 3)
_TABLE_ITERATIONS = 20


class KroneckerProblem(MatrixProblem):
    """The rank of the rearranged matrix (O1 I1, O2 I2 K) of each group."""

    def __init__(self, cls: type[KroneckerLayer], source: Source, shape: Shape | None) -> None:
        groups, dims = source.arguments.get("groups", 1), source.weight.shape
        out, inn = dims[0] // groups, dims[1]
        self.shape = checked_shape(cls.__name__, shape, out, inn, math.prod(dims[2:]))
        self._folding = kronecker_folding(dims, groups, self.shape)
        super().__init__(cls.__name__, source, self._folding.merged(source.weight))
        self._layer_class, self._source = cls, source
        self._slices_in, self._slices_out = self.shape[1], out // self.shape[0]

    def macs(self, positions: Positions, *ranks: IntArray | int) -> IntArray:
        # Each slice of the input meets all B, each slice of the output all A; both on output positions.
        per_rank: int = self._slices_in * self.columns + self._slices_out * self.rows
        return np.asarray(ranks[0]) * self.groups * per_rank * positions.outputs

    def table(self, metric: Metric | None = None) -> RankTable:
        """Return all ranks with their errors: exact without a metric.

        Under one, those under the product metric nearest to it, times what fits of a few ranks gain on these.
        """
        return super().table(metric)

    def _errors_under(self, metric: Metric) -> Tensor:
        errors = torch.from_numpy(truncation_errors(self._folding.weighted(self.weight, metric)))
        break_even = self.weight.numel() / int(self.params(1))
        wanted = np.clip(np.ceil(_FITTED_SHARES * break_even), 1, self.limits[0] - 1).astype(np.int64)
        fitted = [rank for rank in np.unique(wanted).tolist() if rank and errors[rank - 1] > 0]
        if not fitted:
            return errors
        shares = [self._fitted_error(rank, metric) / float(errors[rank - 1]) for rank in fitted]
        return errors * torch.from_numpy(np.interp(np.log(np.arange(len(errors)) + 1), np.log(fitted), shares))

    def _fitted_error(self, rank: int, metric: Metric) -> float:
        layer = self._source.empty(self._layer_class, rank=rank, shape=self.shape)
        layer.approximate_(self.weight, metric, iterations=_TABLE_ITERATIONS)
        return metric.error(self.weight - layer.dense_weight())


def kronecker_folding(weight_shape: Sequence[int], groups: int, shape: tuple[int, int]) -> Folding:
    """Return how a weight is folded for A, its first core, and B.

    Args:
        weight_shape: Shape of the dense weight.
        groups: Number of blocked connections.
        shape: (O1, I1), the shape of A.
    """
    outputs = (shape[0], weight_shape[0] // groups // shape[0])
    inputs = (shape[1], math.prod(weight_shape[1:]) // shape[1])
    return Folding(groups, outputs, inputs, cores=((0, 2), (1, 3)))


def checked_shape(owner: str, shape: Any, out: int, inn: int, taps: int) -> tuple[int, int]:
    """Return the shape (O1, I1) of A, as given or the balanced one.

    Args:
        owner: Who takes the option.
        shape: As given.
        out: Output channels per group.
        inn: Input channels per group.
        taps: Positions of the kernel.

    Raises:
        OptionError: It is not a pair of whole numbers that divide ``out`` and ``inn``.
    """
    if shape is None:
        return balanced_shape(out, inn, taps)
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    whole = [isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes]
    if len(sizes) != 2 or not all(whole) or out % sizes[0] or inn % sizes[1]:
        raise OptionError(
            f"{owner}: shape must be a pair (O1, I1) of which O1 divides {out} (outputs per group) and I1 {inn} "
            f"(inputs per group), got {shape!r}. Leave it out for {balanced_shape(out, inn, taps)}."
        )
    return (int(sizes[0]), int(sizes[1]))
