"""The ranks of Tucker-2 as rank rules and the planner see them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_nn.decompose import Metric, tucker2_errors, weighted_svd_errors, weighted_tucker2_errors
from lowrank_nn.layers._rank_problem import IntArray, Positions, RankProblem, RankTable, cheapest_front, spread_ranks
from lowrank_nn.layers._source import Source


class TuckerProblem(RankProblem):
    """Ranks (out, in) per group; a rank at its limit means that the mode is left whole."""

    def __init__(self, source: Source) -> None:
        super().__init__("TuckerConv2d", source)
        self.kernels = kernel_blocks(source.weight, self.groups)  # (g, o, i, kh, kw)
        self.out, self.inn = self.kernels.shape[1:3]
        self.limits = tucker_limits(self.out, self.inn, self.taps)

    def unfoldings(self) -> tuple[Tensor, ...]:
        return self.kernels.flatten(2), self.kernels.transpose(1, 2).flatten(2)

    def params(self, *ranks: IntArray | int) -> IntArray:
        reduce, core, expand = self._sizes(*ranks)
        return reduce + core + expand

    def macs(self, positions: Positions, *ranks: IntArray | int) -> IntArray:
        reduce, core, expand = self._sizes(*ranks)
        return reduce * positions.inputs + (core + expand) * positions.outputs

    def _sizes(self, *ranks: IntArray | int) -> tuple[IntArray, IntArray, IntArray]:
        """Weights in reduce, core and expand of the layer that ``TuckerConv2d.rank_argument`` asks for."""
        out, inn = np.broadcast_arrays(*ranks)
        whole_out, whole_in = out == self.limits[0], inn == self.limits[1]
        lossless = whole_out & whole_in
        has_expand = np.where(lossless, out <= inn, ~whole_out)
        has_reduce = np.where(lossless, out > inn, ~whole_in)
        core_out, core_in = np.where(has_expand, out, self.out), np.where(has_reduce, inn, self.inn)
        core = self.groups * core_out * core_in * self.taps
        return self.groups * has_reduce * core_in * self.inn, core, self.groups * has_expand * core_out * self.out

    def table(self, metric: Metric | None = None) -> RankTable:
        """Return the pairs that no other pair of the grid beats in both error and size, or error and MACs.

        Pairs that save nothing are left out, but for the lossless one at the limits. The errors are those of the fits'
        starts: a few percent too large. Of a 1 x 1 kernel the input mode is left whole: no pair beats the plain SVD.
        """
        grids = [spread_ranks(limit, self.multiple) for limit in self.limits]
        if self.taps == 1:
            grids[1] = grids[1][-1:]
        pairs = np.stack(np.meshgrid(*grids, indexing="ij"), axis=-1).reshape(-1, 2)
        out, inn = pairs.T
        positions = self.typical_positions()
        params, macs = self.params(out, inn), self.macs(positions, out, inn)
        dense_params, dense_macs = self.dense(positions)
        small = (params < dense_params) | (macs < dense_macs)
        errors = np.zeros(len(pairs))
        if small.any():
            errors = self._errors(out, inn, metric)
        fronts = [cheapest_front(costs, errors, small) for costs in (params, macs)]
        # No front holds a pair that the constructor refuses: leaving one of its modes whole is cheaper and better.
        lossless = np.flatnonzero((out == self.limits[0]) & (inn == self.limits[1]))
        kept = np.unique(np.concatenate([*fronts, lossless]))
        return RankTable(pairs[kept], errors[kept])

    def _errors(self, out: IntArray, inn: IntArray, metric: Metric | None) -> NDArray[np.float64]:
        """Return the squared errors at pairs of ranks."""
        if metric is None:
            every = torch.stack([tucker2_errors(kernel) for kernel in self.kernels]).sum(0)
            row, column = out - 1, inn - 1
        elif self.taps == 1:
            every = weighted_svd_errors(self.weight, metric)[:, None]
            row, column = out - 1, np.zeros_like(inn)
        else:
            # A mode at its limit is left whole, and then its rank is its size.
            row = np.where(out == self.limits[0], self.out, out) - 1
            in_ranks, column = np.unique(np.where(inn == self.limits[1], self.inn, inn), return_inverse=True)
            every = weighted_tucker2_errors(self.weight, metric, in_ranks.tolist())
        errors: NDArray[np.float64] = every.cpu().numpy()[row, column]
        return errors


def kernel_blocks(weight: Tensor, groups: int) -> Tensor:
    """Return a weight (out, in / groups, ...) by groups, (groups, out / groups, in / groups, ...)."""
    return weight.reshape(groups, -1, *weight.shape[1:])


def tucker_limits(out: int, inn: int, taps: int) -> tuple[int, int]:
    """Return the largest useful ranks (out, in) of a kernel."""
    return min(out, inn * taps), min(inn, out * taps)
