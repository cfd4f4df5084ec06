"""Tensor products shared by the CP algorithms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Return the column-wise Kronecker product, shape (prod n_k, R), last factor varying fastest."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None, :] * factor[None, :, :]).flatten(0, 1)
    return product


def factor_gram(factor: Tensor) -> Tensor:
    """Return ``factor.T @ factor`` in float64, shape (R, R)."""
    wide = factor.double()
    return wide.T @ wide


def balance(factors: Sequence[Tensor]) -> list[Tensor]:
    """Scale the columns so that each component has the same norm in every mode."""
    norms = torch.stack([torch.linalg.vector_norm(factor, dim=0, dtype=torch.float64) for factor in factors])
    target = norms.log().mean(dim=0).exp()  # a component that is zero in one mode becomes zero in all
    scales = torch.where(norms > 0, target / norms, 0.0)
    return [factor * scale.to(factor.dtype) for factor, scale in zip(factors, scales, strict=True)]


class Unfolding:
    """A tensor laid out once for the products that CP sweeps need.

    The first two modes are taken to be the large ones (channels); all others together are the small mode. The
    product with the second mode's factor is shared by the first mode and all small ones, so that a sweep costs two
    large matrix products whatever the number of modes.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.points = math.prod(self.shape[2:])
        self.by_first = tensor.reshape(self.shape[0], self.shape[1] * self.points)
        swapped = tensor.transpose(0, 1)
        self.by_second = swapped.reshape(self.shape[1], self.shape[0] * self.points)
        self.squared_norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2

    def without_second(self, factors: Sequence[Tensor]) -> Tensor:
        """Return the tensor contracted with the second factor, shape (R, n_0, points)."""
        return (factors[1].T @ self.by_second).view(-1, self.shape[0], self.points)

    def without_first(self, factors: Sequence[Tensor]) -> Tensor:
        """Return the tensor contracted with the first factor, shape (R, n_1, points)."""
        return (factors[0].T @ self.by_first).view(-1, self.shape[1], self.points)

    def contract_points(self, partial: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """Contract (R, n, points) with the small factors, component by component: shape (n, R)."""
        if len(factors) == 2:
            return partial.squeeze(2).T
        return torch.bmm(partial, khatri_rao(factors[2:]).T[:, :, None]).squeeze(2).T

    def contract_rows(self, partial: Tensor, factor: Tensor) -> Tensor:
        """Contract (R, n, points) with a (n, R) factor, component by component: shape (R, *small)."""
        contracted = torch.bmm(factor.T[:, None, :], partial)
        return contracted.view(-1, *self.shape[2:])

    def contract_small(self, small: Tensor, factors: Sequence[Tensor], mode: int) -> Tensor:
        """Contract (R, *small) with all small factors but ``mode``: shape (n_mode, R)."""
        result = small
        for other in range(len(factors) - 1, 1, -1):
            if other != mode:
                view = [1] * result.ndim
                view[0], view[other - 1] = -1, result.shape[other - 1]
                result = (result * factors[other].T.reshape(view)).sum(dim=other - 1, keepdim=True)
        return result.reshape(small.shape[0], -1).T
