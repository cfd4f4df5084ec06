"""Ranks from the weights alone: the global analytic solution of empirical variational Bayes (EVBMF)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from lowrank_nn.decompose.svd import singular_values

Float64Array = NDArray[np.float64]

_DEAD_SHARE = 0.02
_FLOOR = 1e-6
_GRID_POINTS = 400
_GOLDEN = (math.sqrt(5) - 1) / 2


class EVBMF(NamedTuple):
    """Result of :func:`evbmf`.

    Attributes:
        rank: Number of singular values above the threshold; 0 where all look like noise.
        noise_variance: Estimated variance of the noise entries, in squared units of the matrix.
        threshold: Smallest singular value that counts as signal, in units of the matrix.
    """

    rank: int
    noise_variance: float
    threshold: float


@torch.no_grad()
def evbmf_rank(matrix: Tensor) -> int:
    """Return the rank that empirical variational Bayes assigns to a matrix.

    Rows and columns whose norm is under 2 % of the median norm are dead filters and are set aside; otherwise they
    would be taken for evidence of vanishing noise. The rank does not depend on the scale of the matrix nor on
    its transposition. 0 is a legitimate answer: nothing stands out from the noise.

    Args:
        matrix: Shape (m, n), any floating dtype.

    Returns:
        From 0 to min(m, n) - 1.
    """
    alive = _without_dead_rows(_without_dead_rows(matrix).T)
    if min(alive.shape) == 0:
        return 0
    return evbmf(singular_values(alive).cpu().numpy(), max(alive.shape)).rank


def evbmf(values: Float64Array, long_side: int) -> EVBMF:
    r"""Return rank and noise variance of a matrix from its singular values.

    With L <= M the sides of the matrix and alpha = L / M, the threshold is

    .. math:: \gamma = \sqrt{M \sigma^2 (1 + \tau)(1 + \alpha / \tau)}

    where tau is the root of Phi(tau) + Phi(tau / alpha) = 0, Phi(z) = log(z + 1) / z - 1/2, and sigma^2 minimises the
    free energy: searched on a grid in log sigma^2 between its bounds, then by golden section, because the
    free energy has several local minima. After Nakajima, Sugiyama, Babacan and Tomioka 2013 (Global analytic
    solution of fully-observed variational Bayesian matrix factorization, JMLR 14).

    Args:
        values: All L singular values in descending order, shape (L,).
        long_side: M, at least L.
    """
    short_side = len(values)
    alpha = short_side / long_side
    tau = _threshold_root(alpha)
    edge = (1 + tau) * (1 + alpha / tau)
    scale = float(values[0])
    if scale == 0 or short_side == 1:
        return EVBMF(0, float(np.square(values).sum()) / (short_side * long_side), math.inf)
    squares = np.square(np.maximum(values / scale, _FLOOR))
    variance = _noise_variance(squares, long_side, alpha, edge)
    rank = int((squares > long_side * variance * edge).sum())
    return EVBMF(rank, variance * scale**2, scale * math.sqrt(long_side * variance * edge))


def _without_dead_rows(matrix: Tensor) -> Tensor:
    """Return the matrix without the rows whose norm is under 2 % of the median norm."""
    norms = torch.linalg.vector_norm(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), dim=1)
    alive = norms > _DEAD_SHARE * norms.median()
    return matrix if bool(alive.all()) else matrix[alive]


def _threshold_root(alpha: float) -> float:
    """Return the root tau of Phi(tau) + Phi(tau / alpha) = 0."""

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    return float(brentq(lambda tau: phi(tau) + phi(tau / alpha), 1e-12, 10.0, xtol=1e-14))


def _noise_variance(squares: Float64Array, long_side: int, alpha: float, edge: float) -> float:
    """Minimise the free energy over the noise variance."""
    short_side = len(squares)
    signal = min(math.ceil(short_side / (1 + alpha)) - 1, short_side - 1)
    tail = squares[signal:]
    lower = max(float(tail[0]) / (long_side * edge), float(tail.sum()) / (long_side * len(tail)))
    upper = float(squares.sum()) / (short_side * long_side)
    if lower >= upper:
        return upper
    grid = np.linspace(math.log(lower), math.log(upper), _GRID_POINTS)
    energies = [_free_energy(squares, math.exp(point), long_side, alpha, edge) for point in grid]
    best = int(np.argmin(energies))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, _GRID_POINTS - 1)]
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    while high - low > 1e-12 * max(1.0, abs(low)):
        if _free_energy(squares, math.exp(left), long_side, alpha, edge) < _free_energy(
            squares, math.exp(right), long_side, alpha, edge
        ):
            high = right
        else:
            low = left
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    return math.exp((low + high) / 2)


def _free_energy(squares: Float64Array, variance: float, long_side: int, alpha: float, edge: float) -> float:
    """Return the free energy Omega up to a constant; every singular value is given, so no residual is left."""
    x = squares / (long_side * variance)
    energy = float((x - np.log(x)).sum())
    excess = x[x > edge] - (1 + alpha)
    tau = 0.5 * (excess + np.sqrt(np.square(excess) - 4 * alpha))
    return energy + float((np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau).sum())
