"""The rank problem of the formats whose rank is that of one matrix per group."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lowrank_nn.decompose import Metric, singular_values
from lowrank_nn.layers._ranks import IntArray, RankProblem, RankTable


class MatrixProblem(RankProblem):
    """The rank of one matrix per group; subclasses give the cost."""

    def __init__(self, name: str, matrices: Tensor) -> None:
        self.name = name
        self.matrices = matrices
        self.groups, self.rows, self.columns = matrices.shape
        self.limits = (min(self.rows, self.columns),)

    def unfoldings(self) -> tuple[Tensor, ...]:
        """Return the one matrix of each group."""
        return (self.matrices,)

    def params(self, *ranks: IntArray | int) -> IntArray:
        """Return the scalars in both factors."""
        return np.asarray(ranks[0]) * self.groups * (self.rows + self.columns)

    def table(self, metric: Metric | None = None) -> RankTable:
        """Return all ranks, with the errors of the truncated singular value decomposition."""
        # Eckart-Young: the squared error of rank r is the sum of the squared singular values after the r-th.
        squares = torch.stack([singular_values(m) for m in self.matrices]).square().sum(0).cpu().numpy()
        tails = np.append(np.cumsum(squares[::-1])[::-1][1:], 0.0)
        return RankTable(np.arange(1, self.limits[0] + 1)[:, None], tails)
