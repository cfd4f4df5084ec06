"""The error of a CP under a metric as a function of all factors but the first."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_nn.decompose._cp_start import slice_terms
from lowrank_nn.decompose._khatri_rao import balance, khatri_rao

# The normal equations of the first factor are kept definite by this share of their diagonal.
_RIDGE = {torch.float32: 1e-6, torch.float64: 1e-12}
# In the preconditioner: a share of the diagonal that stands for what the approximation of the Hessian leaves out.
_DAMPING = 0.01
_SCALE_FLOOR = 1e-10  # variance of a dead input channel, as a share of the mean


class CPObjective:
    r"""The least error of a CP whose factors are given except for the first, and its gradient.

    .. math:: e(Z) = \min_E \operatorname{tr}(H (E Z^T - W) C (E Z^T - W)^T), \quad E = W C Z (Z^T C Z)^{-1}

    with Z the Khatri-Rao product of the other factors. The curvature H cancels in E and remains in e. To e comes
    ``weight`` times the penalty sum_r e(E_r Z_r^T), the errors that each term alone would make: it is large where
    terms nearly cancel one another. Both are relative to e(W). The input channels are scaled to unit variance, which
    makes the function the same for every scale of the inputs.

    Args:
        tensor: W, float64, shape (o, i, ...).
        covariance: C, float64, shape (p, p) or its diagonal (p,).
        curvature: H, float64, shape (o, o), or None for the identity.
        dtype: Of the large products.
    """

    def __init__(self, tensor: Tensor, covariance: Tensor, curvature: Tensor | None, dtype: torch.dtype) -> None:
        self.tensor, self.covariance, self.curvature, self.dtype = tensor, covariance, curvature, dtype
        self.modes = tuple(tensor.shape[1:])
        matrix = tensor.flatten(1)
        root = matrix if curvature is None else _root_transposed(curvature) @ matrix
        weighted = _times(root, covariance)
        self.size = max(0.0, float((weighted * root).sum()))
        self._weight = 0.0
        self.deviations = _channel_deviations(covariance, self.modes)
        scale = self.deviations.repeat_interleave(math.prod(self.modes[1:]))
        self._scaled = root * scale
        self._inner = (weighted / scale).to(dtype)
        self._covariance = _standardised(covariance, scale, dtype)

    @property
    def sees_nothing(self) -> bool:
        """Whether no change of the tensor can be seen: it is zero, or the metric is."""
        return not self.size > torch.finfo(torch.float64).tiny

    def error(self, change: Tensor) -> float:
        """Return tr(H D C D^T) of a change, shape (o, p)."""
        curved = change if self.curvature is None else self.curvature @ change
        return max(0.0, float((curved * _times(change, self.covariance)).sum()))

    def widened(self) -> CPObjective:
        """Return the same function with all products in float64."""
        wide = CPObjective(self.tensor, self.covariance, self.curvature, torch.float64)
        wide._weight = self._weight
        return wide

    def first_point(self, rank: int) -> Tensor:
        """Return the factors of the largest rank-one terms over the slices of the weighted tensor."""
        return self._largest_terms(self._scaled, rank)

    def grown(self, state: CPState, rank: int) -> Tensor:
        """Return the factors of a state with more terms, the largest of what they leave of the weighted tensor."""
        left = self._scaled - state.first @ khatri_rao(state.factors).T
        more = self._largest_terms(left, rank - state.rank)
        pairs = zip(state.factors, self.split(more), strict=True)
        return _flatten([torch.cat(pair, dim=1) for pair in pairs])

    def point(self, factors: Sequence[Tensor]) -> Tensor:
        """Return the point that stands for given factors, the first of them left out."""
        scaled = [factors[1].double() * self.deviations[:, None], *(factor.double() for factor in factors[2:])]
        return _flatten(balance(scaled))

    def factors(self, state: CPState) -> list[Tensor]:
        """Return all factors in the scale of the tensor, columns of equal norm, the first of them solved in float64."""
        others = [state.factors[0] / self.deviations[:, None], *state.factors[1:]]
        Z = khatri_rao(others)
        CZ = _times(Z.T, self.covariance).T
        normal = self._definite(Z.T @ CZ, max(self._weight, _RIDGE[torch.float64]))
        first = torch.cholesky_solve((self.tensor.flatten(1) @ CZ).T, torch.linalg.cholesky(normal)).T
        return balance([first, *others])

    def evaluate(self, point: Tensor) -> CPState:
        """Return the value and the gradient at a point."""
        factors = self.split(point)
        Z = khatri_rao(factors).to(self.dtype)
        CZ = self._covariance[:, None] * Z if self.covariance.dim() == 1 else self._covariance @ Z
        return self._state(_Products(point, factors, CZ, (Z.T @ CZ).double(), (self._inner @ Z).double()))

    def reweighted(self, state: CPState, weight: float) -> CPState:
        """Return the state at the same point with another weight of the penalty, from now on."""
        self._weight = weight
        return self._state(state.products)

    def split(self, point: Tensor) -> list[Tensor]:
        """Return the factors (n_k, rank) that a point holds."""
        rank = point.numel() // sum(self.modes)
        parts: tuple[Tensor, ...] = torch.split(point, [size * rank for size in self.modes])
        return [part.view(-1, rank) for part in parts]

    def _state(self, products: _Products) -> CPState:
        weight = max(self._weight, _RIDGE[self.dtype])
        normal = self._definite(products.normal, weight)
        cholesky, failed = torch.linalg.cholesky_ex(normal)
        first = torch.cholesky_solve(products.inner.T, cholesky).T
        gram = first.T @ first
        value = 1 - float((first * products.inner).sum()) / self.size
        penalty = float(gram.diagonal() @ products.normal.diagonal()) / self.size
        if failed or not math.isfinite(value):
            value = math.inf
        gradient = self._gradient(products, first, gram, weight)
        return CPState(products, first, gram, weight, value, penalty, gradient, self)

    def _gradient(self, products: _Products, first: Tensor, gram: Tensor, weight: float) -> Tensor:
        """Return the gradient; by the envelope theorem the first factor counts as constant."""
        wide = gram + torch.diag(weight * gram.diagonal())
        by_Z = products.CZ @ wide.to(self.dtype) - self._inner.T @ first.to(self.dtype)
        left = by_Z.double().view(*self.modes, -1)
        parts = []
        for mode in range(len(self.modes) - 1):
            # Contract this mode's partners behind it, then this mode itself for those that follow.
            behind = khatri_rao(products.factors[mode + 1 :])
            parts.append((left.reshape(self.modes[mode], -1, left.shape[-1]) * behind).sum(dim=1))
            own = products.factors[mode].reshape(-1, *[1] * (left.dim() - 2), left.shape[-1])
            left = (left * own).sum(dim=0)
        return _flatten([*parts, left]) * (2 / self.size)

    def _definite(self, normal: Tensor, weight: float) -> Tensor:
        diagonal = normal.diagonal()
        tiny = torch.finfo(torch.float64).eps * diagonal.mean() + torch.finfo(torch.float64).tiny
        return normal + torch.diag(weight * diagonal + tiny)

    def _largest_terms(self, matrix: Tensor, rank: int) -> Tensor:
        norm = torch.linalg.vector_norm(matrix).clamp(min=torch.finfo(torch.float64).tiny)
        factors, _ = slice_terms((matrix / norm).view(-1, *self.modes).to(self.dtype), rank)
        return _flatten([factor.double() for factor in factors[1:]])


@dataclasses.dataclass(frozen=True)
class _Products:
    """What a point costs: its large products, from which the value follows for any weight of the penalty."""

    point: Tensor
    factors: list[Tensor]
    CZ: Tensor
    normal: Tensor
    inner: Tensor


@dataclasses.dataclass(frozen=True)
class CPState:
    """The value and the gradient at one point.

    Attributes:
        products: The large products at the point.
        first: H^(1/2) E, shape (o, r).
        gram: Its Gram matrix, shape (r, r).
        weight: Weight of the penalty.
        value: Error plus weighted penalty, relative to the size of the tensor.
        penalty: Sum over the terms of the error that each makes alone, relative to the size of the tensor.
        gradient: Of the value.
        objective: The function.
    """

    products: _Products
    first: Tensor
    gram: Tensor
    weight: float
    value: float
    penalty: float
    gradient: Tensor
    objective: CPObjective

    @property
    def point(self) -> Tensor:
        """The factors as one vector."""
        return self.products.point

    @property
    def factors(self) -> list[Tensor]:
        """The factors but the first, input channels scaled."""
        return self.products.factors

    @property
    def rank(self) -> int:
        """Number of terms."""
        return self.first.shape[1]

    @property
    def error(self) -> float:
        """Error alone, relative to the size of the tensor."""
        return max(0.0, self.value - self.weight * self.penalty)

    def precondition(self, vector: Tensor) -> Tensor:
        """Solve the normal equations of each factor for white inputs, as alternating least squares does."""
        parts = zip(self.objective.split(vector), self._normal_factors, strict=True)
        solved = [torch.cholesky_solve(part.T, cholesky).T for part, cholesky in parts]
        return _flatten(solved) * (self.objective.size / 2)

    @functools.cached_property
    def _normal_factors(self) -> list[Tensor]:
        grams = [factor.T @ factor for factor in self.factors]
        result = []
        for mode in range(len(grams)):
            normal = math.prod(grams[:mode] + grams[mode + 1 :], start=self.gram)
            diagonal = normal.diagonal()
            ridge = (self.weight + _DAMPING) * diagonal + 1e-12 * diagonal.mean() + torch.finfo(torch.float64).tiny
            result.append(torch.linalg.cholesky(normal + torch.diag(ridge)))
        return result


def _root_transposed(curvature: Tensor) -> Tensor:
    """Return a matrix A with A^T A = H."""
    values, vectors = torch.linalg.eigh(curvature)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root.T


def _times(matrix: Tensor, covariance: Tensor) -> Tensor:
    return matrix * covariance if covariance.dim() == 1 else matrix @ covariance


def _standardised(covariance: Tensor, deviations: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the covariance of inputs divided by their deviations; one copy of a matrix that may be large."""
    scaled = covariance.to(dtype, copy=True)
    if covariance.dim() == 2:
        scaled /= deviations[:, None].to(dtype)
        return scaled.div_(deviations.to(dtype))
    return scaled.div_(deviations.square().to(dtype))


def _channel_deviations(covariance: Tensor, modes: tuple[int, ...]) -> Tensor:
    """Return the standard deviation of each input channel, (i,); positive for dead ones too."""
    diagonal = covariance if covariance.dim() == 1 else covariance.diagonal()
    variances = diagonal.reshape(modes[0], -1).mean(dim=1)
    floor = _SCALE_FLOOR * variances.mean() + torch.finfo(torch.float64).tiny
    return variances.clamp(min=0).add(floor).sqrt()


def _flatten(factors: Sequence[Tensor]) -> Tensor:
    return torch.cat([factor.reshape(-1) for factor in factors])
