"""CP decomposition: a tensor as a sum of rank-one terms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_nn.decompose._cp_start import slice_terms
from lowrank_nn.decompose._gram import working_dtype
from lowrank_nn.decompose._khatri_rao import Unfolding, balance, factor_gram, khatri_rao
from lowrank_nn.decompose.epc import cp_epc

# A sweep that lowers the squared error by less than this share ends the iteration.
_STAGNATION = 1e-4
_EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}


@torch.no_grad()
def cp(tensor: Tensor, rank: int, *, sweeps: int = 50, epc: bool = True, tolerance: float = 1.05) -> list[Tensor]:
    """Decompose a tensor into rank-one terms: alternating least squares, then error-preserving correction.

    A rank that can hold the tensor exactly (:func:`cp_full_rank` always does) gives the closed form, without
    iteration.

    Args:
        tensor: Shape (n_0, ..., n_{N-1}), N >= 2, any floating dtype. The first two modes should be the large
            ones: (O, I, kh * kw) or (O, I, kh, kw) for a convolution kernel.
        rank: Number of terms, at least 1.
        sweeps: Largest number of sweeps of the alternating least squares.
        epc: Whether to run :func:`cp_epc` after them.
        tolerance: Error that the correction may reach, as a multiple of the error it starts from.

    Returns:
        N factors of shapes (n_k, rank) in the dtype of ``tensor``, columns of equal norm across modes.
    """
    factors = cp_als(tensor, rank, sweeps=sweeps)
    return cp_epc(tensor, factors, tolerance=tolerance) if epc else factors


@torch.no_grad()
def cp_als(tensor: Tensor, rank: int, *, sweeps: int = 50, start: Sequence[Tensor] | None = None) -> list[Tensor]:
    r"""Decompose a tensor into rank-one terms by alternating least squares from a deterministic start.

    .. math:: X_{i j k} \approx \sum_{r=1}^{R} a_{i r} b_{j r} c_{k r}

    The start is made of orthogonal rank-one terms: the small modes are rotated to their principal axes, each
    rotated slice (over the first two modes) is decomposed by SVD, and the ``rank`` largest terms over all slices are
    kept. Where they hold the whole tensor they are the answer.

    Args:
        tensor: Shape (n_0, ..., n_{N-1}), N >= 2, any floating dtype. The first two modes should be the large ones.
        rank: Number of terms, at least 1.
        sweeps: Largest number of sweeps; they end early once the error stagnates. 0 returns the start.
        start: Factors of shapes (n_k, rank) to start from instead. The terms of the usual start come in order of
            size, so that its first r columns are the start at rank r.

    Returns:
        N factors of shapes (n_k, rank) in the dtype of ``tensor``, columns of equal norm across modes.
    """
    if tensor.is_meta:
        return [tensor.new_empty((size, rank)) for size in tensor.shape]
    X = tensor.to(working_dtype(tensor))
    if start is None:
        factors, missed = slice_terms(X, rank)
    else:
        factors, missed = [factor.to(X.dtype) for factor in start], math.inf
    if missed > _EXACT[X.dtype] and sweeps > 0:
        factors = _alternate(X, factors, sweeps)
    return [factor.to(tensor.dtype) for factor in balance(factors)]


def cp_tensor(factors: Sequence[Tensor]) -> Tensor:
    """Return the tensor that the factors stand for.

    Args:
        factors: N >= 2 matrices of shapes (n_k, R).

    Returns:
        Shape (n_0, ..., n_{N-1}); differentiable in every factor.
    """
    shape = [factor.shape[0] for factor in factors]
    return (factors[0] @ khatri_rao(factors[1:]).T).reshape(shape)


@torch.no_grad()
def cp_sensitivity(factors: Sequence[Tensor]) -> float:
    r"""Return the expected squared change of the tensor under unit noise on every factor entry.

    .. math:: s = \sum_k n_k \sum_r \prod_{m \ne k} \|f_{m r}\|^2

    To first order in independent noise of unit variance. Large values mean that components nearly cancel one another
    (degeneracy). After Phan et al. 2020 (Stable low-rank tensor decomposition for compression of
    convolutional neural network).

    Args:
        factors: N >= 2 matrices of shapes (n_k, R).
    """
    squares = torch.stack([factor.double().square().sum(dim=0) for factor in factors])
    total = 0.0
    for mode, factor in enumerate(factors):
        others = torch.cat([squares[:mode], squares[mode + 1 :]])
        total += factor.shape[0] * float(others.prod(dim=0).sum())
    return total


def cp_full_rank(shape: Sequence[int]) -> int:
    """Return a number of terms that holds every tensor of the shape exactly.

    The slices over the first two modes have min(n_0, n_1) terms each; there is one slice per position of the rest.

    Args:
        shape: (n_0, n_1, ...), such as (O, I, kh * kw) or (O, I, kh, kw).
    """
    return min(shape[0], shape[1]) * math.prod(shape[2:])


def _alternate(tensor: Tensor, factors: Sequence[Tensor], sweeps: int) -> list[Tensor]:
    """Update the factors in turn until the error stagnates."""
    X = Unfolding(tensor)
    current = list(factors)
    grams = [factor_gram(factor) for factor in current]
    previous = math.inf
    for _ in range(sweeps):
        partial = X.without_second(current)
        _update(X.contract_points(partial, current), current, grams, 0)
        small = X.contract_rows(partial, current[0])
        for mode in range(2, len(current)):
            _update(X.contract_small(small, current, mode), current, grams, mode)
        product = X.contract_points(X.without_first(current), current)
        _update(product, current, grams, 1)
        inner = float((product.double() * current[1].double()).sum())
        error = X.squared_norm - 2 * inner + float(torch.stack(grams).prod(dim=0).sum())
        if error > previous * (1 - _STAGNATION):
            break
        previous = error
    return current


def _update(product: Tensor, factors: list[Tensor], grams: list[Tensor], mode: int) -> None:
    """Solve the normal equations of one mode in place; ``product`` is the tensor times all other factors.

    The proximal term keeps the equations definite and vanishes at a fixed point.
    """
    H = torch.stack([matrix for other, matrix in enumerate(grams) if other != mode]).prod(dim=0)
    ridge = torch.finfo(product.dtype).eps * H.diagonal().mean() + torch.finfo(torch.float64).tiny
    H.diagonal().add_(ridge)
    right = product.double() + ridge * factors[mode].double()
    factors[mode] = torch.cholesky_solve(right.T, torch.linalg.cholesky(H)).T.to(product.dtype)
    grams[mode] = factor_gram(factors[mode])
