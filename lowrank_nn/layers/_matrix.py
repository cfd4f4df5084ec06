"""The rank problems of the formats whose rank is that of one matrix per group."""

from __future__ import annotations

import abc
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_nn.decompose import Metric, singular_values, weighted_svd_errors, weighted_tucker1_errors
from lowrank_nn.layers._rank_problem import IntArray, Positions, RankProblem, RankTable
from lowrank_nn.layers._source import Source

Order = Literal["spatial_first", "pointwise_first"]


class MatrixProblem(RankProblem):
    """The rank of one matrix per group; subclasses give the cost, and the errors under a metric."""

    def __init__(self, name: str, source: Source, matrices: Tensor) -> None:
        super().__init__(name, source)
        self.matrices = matrices
        self.rows, self.columns = matrices.shape[1:]
        self.limits = (min(self.rows, self.columns),)

    def unfoldings(self) -> tuple[Tensor, ...]:
        """Return the one matrix of each group."""
        return (self.matrices,)

    def params(self, *ranks: IntArray | int) -> IntArray:
        """Return the scalars in both factors."""
        return np.asarray(ranks[0]) * self.groups * (self.rows + self.columns)

    def table(self, metric: Metric | None = None) -> RankTable:
        """Return all ranks, with the errors of the truncated SVD or of the fit under a metric."""
        if metric is None:
            errors = truncation_errors(self.matrices)
        else:
            errors = self._errors_under(metric)[: self.limits[0]].cpu().numpy()
        return RankTable(np.arange(1, self.limits[0] + 1)[:, None], errors)

    @abc.abstractmethod
    def _errors_under(self, metric: Metric) -> Tensor:
        """Return the error under the metric of every rank from 1 on."""


def truncation_errors(matrices: Tensor) -> NDArray[np.float64]:
    """Return the squared error of every rank from 1 on, the same rank in all matrices (groups, m, n)."""
    # Eckart-Young: that of rank r is the sum of the squared singular values after the r-th.
    squares = torch.stack([singular_values(matrix) for matrix in matrices]).square().sum(0).cpu().numpy()
    return np.append(np.cumsum(squares[::-1])[::-1][1:], 0.0)


class LinearProblem(MatrixProblem):
    """The rank of the weight of a linear layer."""

    def __init__(self, name: str, source: Source) -> None:
        super().__init__(name, source, source.weight[None])

    def _errors_under(self, metric: Metric) -> Tensor:
        return weighted_svd_errors(self.matrices[0], metric)

    def macs(self, positions: Positions, *ranks: IntArray | int) -> IntArray:
        return self.params(*ranks) * positions.batch


class ConvProblem(MatrixProblem):
    """The rank of the kernel of a convolution, unfolded for the order of the two convolutions."""

    def __init__(self, source: Source, order: Order) -> None:
        super().__init__("SVDConv2d", source, unfold_kernel(source.weight, source.arguments["groups"], order))
        self.order = order

    def table(self, metric: Metric | None = None) -> RankTable:
        """Return all ranks with their errors: exact, but pointwise first under a metric a few percent too large.

        Pointwise first there are none for a 1 x 1 kernel, on which the other order is the same at no more MACs.
        """
        if self.order == "pointwise_first" and self.taps == 1:
            return RankTable.empty()
        return super().table(metric)

    def _errors_under(self, metric: Metric) -> Tensor:
        if self.order == "spatial_first":
            return weighted_svd_errors(self.weight, metric)
        return weighted_tucker1_errors(self.weight, metric)

    def macs(self, positions: Positions, *ranks: IntArray | int) -> IntArray:
        # The second convolution runs on output positions; a leading 1x1 runs on every input position.
        first = positions.outputs if self.order == "spatial_first" else positions.inputs
        return np.asarray(ranks[0]) * self.groups * self._weighted(first, positions.outputs)

    def _weighted(self, first: int, second: int) -> int:
        if self.order == "spatial_first":
            return self.columns * first + self.rows * second
        return self.rows * first + self.columns * second


def unfold_kernel(weight: Tensor, groups: int, order: Order) -> Tensor:
    """Return the matrix of each group, ``(groups, O/g, I/g K^2)``, or ``(groups, I/g, O/g K^2)`` pointwise first."""
    blocks = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return blocks.flatten(2) if order == "spatial_first" else blocks.transpose(1, 2).flatten(2)
