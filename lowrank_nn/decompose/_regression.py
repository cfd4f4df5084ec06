"""Regression of a layer's outputs on patches with fewer channels: what Tucker under a metric is made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lowrank_nn.decompose._gram import leading_eigenvectors
from lowrank_nn.decompose.metric import Metric
from lowrank_nn.decompose.weighted_svd import RIDGES, not_semidefinite, output_roots, ridge


class Regression:
    """Regression of the outputs on patches whose channels are reduced by an input factor.

    The kernel's positions fall into n blocks of m that the covariance does not couple: one block, or as many as there
    are positions where only the diagonal is known. Outputs are in coordinates in which H is the identity.

    Attributes:
        r_out: Rank of the output mode; None where it is whole.
        roots: H^{1/2} and H^{-1/2}.
        covariance: C, shape (groups, n, m, i, m, i).
        moments: W C, shape (groups, n, o, m, i).
        total: tr(W C W^T), summed over the groups.
        positions: What C shares among channels, shape (groups, n, m, m), with a mean diagonal entry of 1.
        channels: What C shares among positions, shape (groups, i, i).
        is_regular: Whether ``channels`` is positive definite, as the search needs it.
    """

    def __init__(self, weight: Tensor, metric: Metric, r_out: int | None, ridges: float = 1.0) -> None:
        channels = weight.shape[1]
        self.r_out = r_out
        self.roots = output_roots(metric, weight.shape[0] // metric.groups)
        self.covariance = _covariance_blocks(metric, channels, ridges)
        groups, blocks, taps = self.covariance.shape[:3]
        W = (self.roots.root @ metric.unfold(weight)).reshape(groups, -1, channels, blocks, taps)
        self._weight = W.permute(0, 3, 1, 4, 2).contiguous()  # (g, n, o, m, i)
        matrices = self.covariance.flatten(4, 5).flatten(2, 3)
        self.moments = (self._weight.flatten(3) @ matrices).view_as(self._weight)
        self.total = float((self._weight * self.moments).sum())
        self.channels = self.covariance.diagonal(dim1=2, dim2=4).mean((1, 4))
        positions = self.covariance.diagonal(dim1=3, dim2=5).mean(-1)
        self.positions = positions / positions.diagonal(dim1=2, dim2=3).mean((1, 2))[:, None, None, None]
        self.channels_factor, failed = torch.linalg.cholesky_ex(self.channels)
        self.is_regular = not bool(failed.any())

    def start(self, rank: int) -> Tensor:
        """Return the input factor of the weighted kernel's HOSVD, orthonormal and ordered, shape (groups, i, rank)."""
        factor: Tensor = torch.linalg.qr(self._directions[..., :rank]).Q
        return factor

    @functools.cached_property
    def _directions(self) -> Tensor:
        """What the factors of all ranks start from, the most important column first, shape (groups, i, i)."""
        L = self.channels_factor
        spread = self.positions[:, :, None] @ self._weight
        gram = L.mT @ (self._weight.flatten(1, 3).mT @ spread.flatten(1, 3)) @ L
        directions: Tensor = torch.linalg.solve_triangular(L.mT, leading_eigenvectors(gram, L.shape[1]), upper=True)
        return directions

    def image(self, factor: Tensor) -> Tensor:
        """Return (C P)^T, shape (groups, n, m b, m, i)."""
        groups, blocks, taps, channels = self.covariance.shape[:4]
        image: Tensor = factor.mT[:, None, None] @ self.covariance.flatten(4)
        return image.view(groups, blocks, -1, taps, channels)

    def products(self, factor: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return P^T C P and W C P, shapes (groups, n, m b, m b) and (groups, n, o, m b)."""
        return _contract(image, factor), _contract(self.moments, factor)


def regressions(weight: Tensor, metric: Metric, r_out: int | None) -> Iterator[Regression]:
    """Yield regressions of rising ridge, the first of which is nearly always enough.

    A covariance added up in float32, of fewer patches than it has rows, has eigenvalues below zero.

    Raises:
        OptionError: All were asked for.
    """
    for ridges in RIDGES:
        regression = Regression(weight, metric, r_out, ridges)
        if regression.is_regular:
            yield regression
    raise not_semidefinite()


class Point:
    """An input factor V with the core and output factor that are best for it: a state of the descent.

    Attributes:
        regression: As given.
        factor: V, shape (groups, i, b).
        basis: U, shape (groups, o, a); None for the identity.
        core: Shape (groups, n, a or o, m b).
        value: The error, summed over the groups; infinite where the columns of V are dependent.
    """

    def __init__(self, regression: Regression, factor: Tensor) -> None:
        self.regression, self.factor = regression, factor
        self._image = regression.image(factor)
        Z, Y = regression.products(factor, self._image)
        L, failed = torch.linalg.cholesky_ex(Z)
        self.basis: Tensor | None = None
        self.value = math.inf
        if bool(failed.any()):
            return
        explained = torch.linalg.solve_triangular(L, Y.mT, upper=False)
        if regression.r_out is not None:
            self.basis = leading_eigenvectors((explained.mT @ explained).sum(1), regression.r_out)
            explained = explained @ self.basis[:, None]
        self.core = torch.linalg.solve_triangular(L.mT, explained, upper=True).mT
        self.value = regression.total - float(explained.square().sum())

    @property
    def point(self) -> Tensor:
        """V, flat."""
        return self.factor.flatten()

    @functools.cached_property
    def gradient(self) -> Tensor:
        """Half the gradient of the error in V, flat. What a change of core and factor does is of second order."""
        moments = self.regression.moments
        if self.basis is not None:
            projected = self.basis.mT[:, None] @ moments.flatten(3)
            moments = projected.view(*projected.shape[:3], *moments.shape[3:])
        return (_join(self._image, self._gram) - _join(moments, self.core)).flatten()

    def precondition(self, vector: Tensor) -> Tensor:
        """Return the inverse of half the second derivative, times a vector.

        The core and output factor stay as they are, and the covariance counts as one of channels x one of positions.
        """
        left = torch.cholesky_solve(vector.view_as(self.factor), self.regression.channels_factor)
        solved: Tensor = torch.cholesky_solve(left.mT, self._between)
        return solved.mT.flatten()

    @functools.cached_property
    def _gram(self) -> Tensor:
        gram: Tensor = self.core.mT @ self.core
        return gram

    @functools.cached_property
    def _between(self) -> Tensor:
        """Cholesky factor of the second derivative between columns of V, shape (groups, b, b)."""
        taps, width = self.regression.positions.shape[2], self.factor.shape[2]
        gram = self._gram.view(*self._gram.shape[:2], taps, width, taps, width)
        between = torch.einsum("gnmbsc,gnms->gbc", gram, self.regression.positions)
        diagonal = between.diagonal(dim1=1, dim2=2)
        diagonal += ridge(diagonal)
        factor: Tensor = torch.linalg.cholesky(between)
        return factor


def _covariance_blocks(metric: Metric, channels: int, ridges: float) -> Tensor:
    """Return the covariance with as many times the ridge, positions before channels, shape (groups, n, m, i, m, i)."""
    groups, inputs = metric.mean.shape
    taps = inputs // channels
    if metric.is_diagonal:
        variances = metric.covariance + ridges * ridge(metric.covariance)
        blocks: Tensor = torch.diag_embed(variances.reshape(groups, channels, taps).mT)
        return blocks[:, :, None, :, None]
    covariance = metric.covariance.reshape(groups, channels, taps, channels, taps).permute(0, 2, 1, 4, 3)
    covariance = covariance.clone(memory_format=torch.contiguous_format)
    diagonal = covariance.view(groups, inputs, inputs).diagonal(dim1=1, dim2=2)
    diagonal += ridges * ridge(diagonal)
    return covariance[:, None]


def _contract(tensor: Tensor, factor: Tensor) -> Tensor:
    """Return (groups, n, x, m, i) times V along i, shape (groups, n, x, m b)."""
    product: Tensor = tensor.flatten(1, 3) @ factor
    return product.view(*tensor.shape[:3], -1)


def _join(tensor: Tensor, core: Tensor) -> Tensor:
    """Return the sum of (groups, n, x, m, i) times (groups, n, x, m b) over all but i and b, shape (groups, i, b)."""
    rows = core.reshape(*core.shape[:3], tensor.shape[3], -1)
    product: Tensor = tensor.flatten(1, 3).mT @ rows.flatten(1, 3)
    return product
