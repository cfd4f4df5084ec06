"""Error-preserving correction: CP factors of the same error and the least sensitivity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_nn.decompose._khatri_rao import Unfolding, balance, factor_gram, khatri_rao

# A sweep that lowers the sensitivity by less than this share ends the iteration.
_STAGNATION = 1e-3


@torch.no_grad()
def cp_epc(tensor: Tensor, factors: Sequence[Tensor], *, tolerance: float = 1.05, sweeps: int = 50) -> list[Tensor]:
    r"""Lower the sensitivity of CP factors while their error stays within a bound.

    .. math:: \min_{A, B, C} s(A, B, C) \quad \text{s.t.} \quad \|X - [[A, B, C]]\|_F \le \delta

    with s the sensitivity (:func:`cp_sensitivity`) and delta = ``tolerance`` times the error of ``factors``. Where
    the factors explain less than half of the tensor's energy, delta^2 exceeds their squared error by
    (tolerance^2 - 1) times the energy explained instead, so that a poor fit is never traded for zero. In each mode
    the problem is a ridge regression whose residual grows with the ridge; the largest admissible ridge is found by
    bisection. Factors that hold the tensor exactly are returned as they are, balanced.
    After Phan et al. 2020 (Stable low-rank tensor decomposition for compression of convolutional neural network).

    Args:
        tensor: Shape (n_0, ..., n_{N-1}), N >= 2, any floating dtype.
        factors: N matrices of shapes (n_k, R).
        tolerance: Error bound as a multiple of the error of ``factors``, at least 1.
        sweeps: Largest number of sweeps over all modes.

    Returns:
        N factors of the same shapes, in the dtype of ``tensor``, columns of equal norm across modes. Their
        sensitivity is never above that of ``factors`` balanced, and their error never above the bound.
    """
    if tensor.is_meta:
        return [tensor.new_empty((size, factors[0].shape[1])) for size in tensor.shape]
    X = Unfolding(tensor.double())
    best = balance([factor.double() for factor in factors])
    error = _residual_norm(X, best)
    exact = 1e-6 if tensor.dtype != torch.float64 else 1e-12
    if error > exact * math.sqrt(X.squared_norm):
        slack = (tolerance**2 - 1) * min(error**2, max(X.squared_norm - error**2, 0.0))
        best = _correct(X, best, error**2 + slack, sweeps)
    return [factor.to(tensor.dtype) for factor in best]


def _correct(X: Unfolding, start: list[Tensor], bound: float, sweeps: int) -> list[Tensor]:
    """Sweep over the modes; ``bound`` is the largest squared error allowed."""
    current, previous = list(start), _sensitivity(start)
    for _ in range(sweeps):
        partial = X.without_second(current)
        current[0] = _ridge_update(X, X.contract_points(partial, current), current, 0, bound)
        small = X.contract_rows(partial, current[0])
        for mode in range(2, len(current)):
            current[mode] = _ridge_update(X, X.contract_small(small, current, mode), current, mode, bound)
        product = X.contract_points(X.without_first(current), current)
        current[1] = _ridge_update(X, product, current, 1, bound)
        current = balance(current)
        sensitivity = _sensitivity(current)
        if sensitivity > previous * (1 - _STAGNATION):
            break
        previous = sensitivity
    improved = _sensitivity(current) <= _sensitivity(start)
    within = _residual_norm(X, current) ** 2 <= bound * (1 + 1e-9)
    return current if improved and within else start


def _ridge_update(X: Unfolding, product: Tensor, factors: Sequence[Tensor], mode: int, bound: float) -> Tensor:
    """Return the factor of least weighted norm whose squared error is ``bound`` (or the least error possible)."""
    others = [factor for other, factor in enumerate(factors) if other != mode]
    H = torch.stack([factor_gram(factor) for factor in others]).prod(dim=0)
    weights = _sensitivity_weights(others)
    scale = torch.where(weights > 0, weights.rsqrt(), 0.0)
    eigenvalues, V = torch.linalg.eigh(scale[:, None] * H * scale)
    projected = (product * scale) @ V
    energy = projected.square().sum(dim=0)
    resolved = eigenvalues > eigenvalues[-1].clamp(min=0) * torch.finfo(torch.float64).eps
    eigenvalues, energy = eigenvalues.clamp(min=0)[resolved], energy[resolved]
    ridge = _largest_ridge(eigenvalues, energy, X.squared_norm, bound)
    updated: Tensor = (projected[:, resolved] / (eigenvalues + ridge)) @ V[:, resolved].T * scale
    return updated


def _largest_ridge(eigenvalues: Tensor, energy: Tensor, squared_norm: float, bound: float) -> float:
    """Return the largest ridge whose residual is within the bound, by bisection in its logarithm; 0 if none is."""
    if eigenvalues.numel() == 0:
        return 0.0
    values, weights = eigenvalues.cpu().numpy(), energy.cpu().numpy()

    def residual(ridge: float) -> float:
        return squared_norm - float((weights * (values + 2 * ridge) / (values + ridge) ** 2).sum())

    low, high = math.log(values[-1]) - 40.0, math.log(values[-1]) + 10.0
    if residual(math.exp(low)) > bound:
        return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if residual(math.exp(middle)) <= bound else (low, middle)
    return math.exp(low)


def _sensitivity_weights(others: Sequence[Tensor]) -> Tensor:
    """Return, for each column of the mode left out, what its squared norm adds to the sensitivity; shape (R,)."""
    squares = torch.stack([factor.square().sum(dim=0) for factor in others])
    weights = torch.zeros_like(squares[0])
    for index, factor in enumerate(others):
        weights += factor.shape[0] * torch.cat([squares[:index], squares[index + 1 :]]).prod(dim=0)
    return weights


def _sensitivity(balanced: Sequence[Tensor]) -> float:
    modes = len(balanced)
    sizes = sum(factor.shape[0] for factor in balanced)
    return sizes * float(balanced[0].square().sum(dim=0).pow(modes - 1).sum())


def _residual_norm(X: Unfolding, factors: Sequence[Tensor]) -> float:
    return float(torch.linalg.vector_norm(X.by_first - factors[0] @ khatri_rao(factors[1:]).T))
