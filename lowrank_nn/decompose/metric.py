"""What a change of a weight does to the layer's output: the metric that data-aware fits minimise."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Metric:
    r"""The size of a change of a layer's weight, measured by what it does on data.

    .. math:: e(\Delta) = \sum_g \operatorname{tr}(H_g \Delta_g C_g \Delta_g^T)

    with, per group g of the layer, Delta_g the change of the unfolded weight (o x p), C_g the covariance of the input
    patches (p x p) and H_g the curvature of the network's output in the layer's output (o x o). With H from
    :func:`lowrank_nn.planning.collect_metrics`, e estimates the expected squared change of the network's output, so
    that errors of different layers can be added up. The covariance is about the mean: what a change does to the mean
    output, Delta mu, a bias makes up for.

    The matrices are float64 on the device where they were collected.

    Attributes:
        covariance: C, shape (groups, p, p), p = in_channels / groups * kh * kw in the order of the weight's own dims;
            or its diagonal, shape (groups, p), where p is too large for a matrix.
        mean: mu, shape (groups, p); zeros where nothing has to make up for it.
        curvature: H, shape (groups, o, o), o = out_channels / groups; None stands for the identity.
        outputs: Covariance of the layer's outputs, shape (groups, o, o), where ``covariance`` is only a diagonal and
            the outputs were seen; else None.
    """

    covariance: Tensor
    mean: Tensor
    curvature: Tensor | None = None
    outputs: Tensor | None = None

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.mean.shape[0]

    @property
    def is_diagonal(self) -> bool:
        """Whether only the diagonal of the covariance is known."""
        return self.covariance.dim() == 2

    def fits(self, groups: int, outputs: int, inputs: int) -> bool:
        """Whether all parts are finite and of the shapes for a weight of so many groups, outputs and inputs in each."""
        row, square = (groups, inputs), (groups, outputs, outputs)
        spread = row if self.is_diagonal else (*row, inputs)
        parts = ((self.covariance, spread), (self.mean, row), (self.curvature, square), (self.outputs, square))
        return all(part is None or (part.shape == shape and bool(part.isfinite().all())) for part, shape in parts)

    def error(self, change: Tensor) -> float:
        """Return e of a change of the weight, in the dense weight's shape."""
        delta = self.unfold(change)
        weighted = self.curvature @ delta if self.curvature is not None else delta
        return max(0.0, float((weighted * self.times_covariance(delta)).sum()))

    def unfold(self, weight: Tensor) -> Tensor:
        """Return a weight (out_channels, in_channels / groups, ...) as float64 (groups, o, p)."""
        return weight.detach().to(self.mean).reshape(self.groups, -1, self.mean.shape[1])

    def times_covariance(self, matrices: Tensor) -> Tensor:
        """Return matrices (groups, m, p) times C."""
        return matrices * self.covariance[:, None] if self.is_diagonal else matrices @ self.covariance

    def mean_output(self, change: Tensor) -> Tensor:
        """Return what a change of the weight adds to the mean of each output channel, shape (out_channels,)."""
        return (self.unfold(change) @ self.mean[:, :, None]).flatten()

    def output_covariance(self, weight: Tensor) -> Tensor:
        """Return the covariance of the outputs of ``weight``, shape (groups, o, o).

        Where the patches' covariance is only a diagonal, that of the trained layer's outputs as they were seen stands
        in for it, if they were.
        """
        if self.outputs is not None:
            return self.outputs
        unfolded = self.unfold(weight)
        return self.times_covariance(unfolded) @ unfolded.mT

    def without_mean(self) -> Metric:
        """Return the metric of a layer whose mean output something behind it corrects."""
        return dataclasses.replace(self, mean=torch.zeros_like(self.mean))

    def with_mean(self) -> Metric:
        """Return the metric of a layer that nothing corrects: a change of the mean output counts as error."""
        if self.is_diagonal:
            return dataclasses.replace(self.without_mean(), covariance=self.covariance + self.mean.square())
        raw = self.covariance + self.mean[:, :, None] * self.mean[:, None]
        return dataclasses.replace(self.without_mean(), covariance=raw)


class Roots(NamedTuple):
    """Symmetric square root of positive semidefinite matrices, and its inverse, both (..., n, n)."""

    root: Tensor
    inverse: Tensor


def square_root(matrices: Tensor, floor: float = 1e-7) -> Roots:
    """Return the symmetric square roots of positive semidefinite matrices, and their inverses.

    Args:
        matrices: Shape (..., n, n), symmetric.
        floor: Eigenvalues below this share of the largest are raised to it, so that the inverse exists.
    """
    values, vectors = torch.linalg.eigh(matrices)
    least = (floor * values[..., -1:]).clamp(min=torch.finfo(values.dtype).tiny)
    roots = values.clamp(min=least).sqrt()[..., None, :]
    return Roots((vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT)
