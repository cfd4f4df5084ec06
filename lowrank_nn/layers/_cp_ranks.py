"""The ranks of CP as rank rules and the planner see them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lowrank_nn.decompose import Metric, cp_als, cp_full_rank, cp_tensor, weighted_cp_errors, weighted_svd_errors
from lowrank_nn.errors import OptionError, RankError
from lowrank_nn.layers._matrix import truncation_errors
from lowrank_nn.layers._rank_problem import IntArray, Positions, RankProblem, RankTable
from lowrank_nn.layers._source import Source

Factors = Literal[3, 4]

_TABLE_SHARES = np.geomspace(0.04, 0.8, 8)
_TABLE_SWEEPS = 20
_TABLE_WORK = 4e9
_TABLE_TERMS = 800  # per group; fits of more take minutes


class CPProblem(RankProblem):
    """The number of terms per group."""

    def __init__(self, source: Source, factors: Factors) -> None:
        super().__init__("CPConv2d", source)
        self.tensors = kernel_tensors(source.weight, self.groups, factors)
        self.limits = (cp_full_rank(self.tensors.shape[1:]),)

    def unfoldings(self) -> tuple[Tensor, ...]:
        raise RankError(
            "CPConv2d: VBMF and Energy choose the rank of a matrix, but the rank here is a number of terms, which no "
            "matrix has. Give a rank, Params(share) or SpeedUp(times)."
        )

    def params(self, *ranks: IntArray | int) -> IntArray:
        return np.asarray(ranks[0]) * self.groups * sum(self.tensors.shape[1:])

    def macs(self, positions: Positions, *ranks: IntArray | int) -> IntArray:
        out, inn, *spatial = self.tensors.shape[1:]
        spatial_places = (positions.outputs,) if len(spatial) == 1 else (positions.between, positions.outputs)
        per_term = inn * positions.inputs + out * positions.outputs
        per_term += sum(taps * places for taps, places in zip(spatial, spatial_places, strict=True))
        return np.asarray(ranks[0]) * self.groups * per_term

    def table(self, metric: Metric | None = None) -> RankTable:
        """Return the ranks between 4 % and 80 % of the dense parameters, up to 800, with the errors of short fits.

        Up to eight ranks are fitted; between them errors are interpolated, as falling geometrically with the rank. The
        error of a full fit is lower; there are no ranks where a single term costs more than the dense layer. For a
        1 x 1 kernel these are all ranks below the dense parameters, with exact errors.
        """
        break_even = self.weight.numel() / int(self.params(1))
        if self.taps == 1:
            return self._matrix_table(break_even, metric)
        wanted = np.clip(_TABLE_SHARES * break_even, 1, self.limits[0])
        ranks = np.unique(wanted.astype(np.int64) // self.multiple * self.multiple)
        ranks = ranks[(ranks > 0) & (ranks < break_even) & (ranks <= _TABLE_TERMS)]
        if metric is not None:
            errors = np.array(weighted_cp_errors(self.tensors.flatten(0, 1), metric, ranks.tolist()))
            return _filled_in(ranks, errors, self.multiple)
        errors = np.zeros(len(ranks))
        for tensor in self.tensors if len(ranks) else ():
            start = cp_als(tensor, int(ranks[-1]), sweeps=0)
            errors += [_short_fit_error(tensor, [factor[:, :rank] for factor in start]) for rank in ranks]
        return _filled_in(ranks, errors, self.multiple)

    def _matrix_table(self, break_even: float, metric: Metric | None) -> RankTable:
        """Return the ranks of a 1 x 1 kernel, whose CP decomposition is the truncated SVD."""
        matrices = self.tensors.flatten(2)
        if metric is None:
            every = truncation_errors(matrices)
        else:
            every = weighted_svd_errors(matrices.flatten(0, 1), metric).cpu().numpy()
        ranks = np.arange(self.multiple, min(self.limits[0] + 1, break_even), self.multiple, dtype=np.int64)
        return RankTable(ranks[:, None], every[ranks - 1])


def _filled_in(ranks: IntArray, errors: NDArray[np.float64], multiple: int) -> RankTable:
    """Return all multiples between the ranks, their errors interpolated on a logarithmic scale."""
    if not len(ranks):
        return RankTable(ranks[:, None], errors)
    every = np.arange(ranks[0], ranks[-1] + 1, multiple)
    falling = np.log(np.maximum(np.minimum.accumulate(errors), np.finfo(np.float64).tiny))
    return RankTable(every[:, None], np.exp(np.interp(every, ranks, falling)))


def _short_fit_error(tensor: Tensor, start: list[Tensor]) -> float:
    """Return the squared error after as many sweeps from ``start`` as a fixed amount of work pays for."""
    rank = start[0].shape[1]
    sweep = 4 * tensor.numel() * rank + 4 * rank**3
    factors = cp_als(tensor, rank, sweeps=min(_TABLE_SWEEPS, int(_TABLE_WORK // sweep)), start=start)
    return float((tensor - cp_tensor(factors)).double().square().sum())


def kernel_tensors(weight: Tensor, groups: int, factors: Factors) -> Tensor:
    """Return the tensor of each group, ``(groups, O/g, I/g, kh kw)``, or ``(groups, O/g, I/g, kh, kw)``."""
    check_factors(factors)
    tensors = weight.reshape(groups, -1, *weight.shape[1:])
    return tensors.flatten(3) if factors == 3 else tensors


def check_factors(factors: object) -> None:
    """Raise OptionError for a number of factors that there is not."""
    if factors not in (3, 4):
        raise OptionError(
            f"CPConv2d: factors must be 3 (1x1, k x k, 1x1) or 4 (1x1, k x 1, 1 x k, 1x1), got {factors!r}."
        )
