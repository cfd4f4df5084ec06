"""Rounding to integers under a covariance: what one entry is off by, others make up for."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_nn.decompose.weighted_svd import RIDGES, not_semidefinite, ridge

BLOCK = 128


def round_jointly(points: Tensor, covariance: Tensor, low: Tensor, high: Tensor, kept: Tensor | None = None) -> Tensor:
    r"""Round real numbers to integers q so that the rows of the change have a small error under a covariance.

    .. math:: \sum_n \delta_n C \delta_n^T, \qquad \delta_n = q_n - x_n

    With C = M M^T, M upper triangular, the error of a row is the sum of squares of the entries of delta M, of which
    the j-th depends on the first j entries of delta only. So entry after entry is set to the integer that makes its own
    square smallest, in the order of falling variance: what the first ones are off by, later ones make up for. This is
    the sweep of GPTQ (Frantar et al.), without the inverse of C; in the theory of lattices it is Babai's nearest plane
    (Chen et al.). With a diagonal C the result is the nearest integers, the optimum. Deterministic; computed in the
    dtype of ``points``.

    Args:
        points: The numbers, shape (groups, n, p).
        covariance: C, shape (groups, p, p), positive semidefinite; or its diagonal, (groups, p).
        low: Smallest integer of each row, shape (n,) or 0-dimensional.
        high: Largest integer of each row, likewise.
        kept: Marks, in the shape of ``points``, the entries that may be other than 0; None for all.

    Returns:
        Integers as floating-point numbers, of the shape of ``points``.

    Raises:
        OptionError: The covariance is not positive semidefinite.

    References:
        Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers".
        Chen et al. 2025, "The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm".
    """
    bounds = [bound.to(points).expand(points.shape[1]) for bound in (low, high)]
    if covariance.dim() == 2:
        nearest = torch.round(points).clamp(bounds[0][:, None], bounds[1][:, None])
        return nearest if kept is None else torch.where(kept, nearest, 0)
    order = covariance.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    columns = order[:, None].expand_as(points)
    sorted_kept = None if kept is None else kept.gather(2, columns)
    rounded = _sweep(points.gather(2, columns), _upper_root(covariance, order), bounds, sorted_kept)
    return torch.empty_like(points).scatter_(2, columns, rounded)


def _sweep(points: Tensor, root: Tensor, bounds: list[Tensor], kept: Tensor | None) -> Tensor:
    """Round column after column; ``root`` is M in the order of the columns."""
    rounded, errors = torch.empty_like(points), torch.empty_like(points)
    features = points.shape[2]
    for start in range(0, features, BLOCK):
        stop = min(start + BLOCK, features)
        carried = errors[..., :start] @ root[:, :start, start:stop]
        for j in range(start, stop):
            pull = carried[..., j - start] / root[:, j, j, None]
            nearest = torch.round(points[..., j] - pull).clamp(*bounds)
            rounded[..., j] = nearest if kept is None else torch.where(kept[..., j], nearest, 0)
            errors[..., j] = rounded[..., j] - points[..., j]
            carried[..., j - start + 1 :] += errors[..., j, None] * root[:, None, j, j + 1 : stop]
    return rounded


def _upper_root(covariance: Tensor, order: Tensor) -> Tensor:
    """Return the upper triangular M with M M^T = C, rows and columns in the given order; C gets the ridge it needs."""
    groups = torch.arange(len(order), device=order.device)[:, None, None]
    last_first = order.flip(1)
    matrices = covariance[groups, last_first[:, :, None], last_first[:, None]]
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    step = ridge(diagonal)
    for times in RIDGES:
        diagonal += times * step
        lower, failed = torch.linalg.cholesky_ex(matrices)
        if not bool(failed.any()):
            root: Tensor = lower.flip(1, 2)
            return root
    raise not_semidefinite()
