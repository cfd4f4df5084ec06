"""The truncated singular value decomposition under a metric, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_nn.decompose._gram import column_signs, leading_eigenvectors
from lowrank_nn.decompose.metric import Metric, Roots, square_root
from lowrank_nn.decompose.svd import truncated_svd
from lowrank_nn.errors import OptionError

# What the data never show still counts this little, against the mean of what they do show: it settles ties, so that
# singular matrices need no case of their own.
_RIDGE = 1e-9
RIDGES = (1.0, 1e3, 1e5, 1e7)  # times that it is tried to be: sums in float32 leave eigenvalues below zero
ROOT_FLOOR = 1e-12  # for square roots of matrices with a ridge: only stops eigenvalues that rounding made negative


@torch.no_grad()
def weighted_svd(weight: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    r"""Return the approximation of rank r that is best under a metric, as two balanced factors per group.

    With U the r leading eigenvectors of H^{1/2} W C W^T H^{1/2}, the covariance of the weighted outputs,

    .. math:: \hat W = H^{-1/2} U U^T H^{1/2} W

    which needs neither the inverse of C nor, where only a diagonal of C is known but the outputs were seen, C itself.
    A tall weight goes through the equivalent problem on its inputs. After Zhang et al. 2016 (Accelerating very deep
    convolutional networks for classification and detection); in statistics this is reduced-rank regression (Izenman
    1975, Reduced-rank regression for the multivariate linear model).

    Args:
        weight: Shape (out_channels, in_channels / groups, ...); with o and p as in :class:`Metric`.
        metric: What is to be small of the weight's change.
        rank: From 1 to min(o, p).

    Returns:
        ``left`` of shape (groups, o, rank) and ``right`` of shape (groups, rank, p), float64. Column i of ``left`` and
        row i of ``right`` have the same norm; both factors have orthogonal directions.
    """
    blocks = weight.reshape(metric.groups, weight.shape[0] // metric.groups, -1)
    if rank == min(blocks.shape[1:]) or weight.is_meta:
        parts = [truncated_svd(block.double(), rank) for block in blocks]
        return torch.stack([left for left, _ in parts]), torch.stack([right for _, right in parts])
    W = metric.unfold(weight)
    if _is_tall(W, metric):
        roots = _input_roots(metric)
        weighted = W @ roots.root
        V = leading_eigenvectors(_input_gram(weighted, metric), rank)
        return balanced(weighted @ V, V.mT @ roots.inverse)
    roots = output_roots(metric, W.shape[1])
    U = leading_eigenvectors(_output_gram(weight, metric, roots.root), rank)
    return balanced(roots.inverse @ U, U.mT @ (roots.root @ W))


@torch.no_grad()
def weighted_svd_errors(weight: Tensor, metric: Metric) -> Tensor:
    """Return the error under the metric of :func:`weighted_svd` at every rank, summed over the groups.

    Args:
        weight: Shape (out_channels, in_channels / groups, ...).
        metric: What the errors measure.

    Returns:
        Shape (min(o, p),), float64: entry r - 1 is the error at rank r.
    """
    W = metric.unfold(weight)
    if _is_tall(W, metric):
        squares = torch.linalg.eigvalsh(_input_gram(W @ _input_roots(metric).root, metric))
    else:
        squares = torch.linalg.eigvalsh(_output_gram(weight, metric, output_roots(metric, W.shape[1]).root))
    squares = (squares.clamp(min=0) * is_seen(metric)[:, None]).sum(0)
    if metric.outputs is not None:
        # Correlated inputs make outputs larger or smaller than the diagonal tells: keep to its scale.
        squares = squares * (metric.error(weight) / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny))
    tails = torch.nn.functional.pad(squares.cumsum(0), (1, 0)).flip(0)[1:]
    return tails[: min(W.shape[1:])]


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Turn two factors into those with the same product that a truncated SVD gives.

    Args:
        left: Shape (groups, m, r).
        right: Shape (groups, r, n).

    Returns:
        The factors in the same shapes, U S^{1/2} and S^{1/2} V^T for the product's singular value decomposition.
    """
    Q, R = torch.linalg.qr(left)
    inner = R @ right
    U = leading_eigenvectors(inner @ inner.mT, inner.shape[-2])
    basis, projected = Q @ U, U.mT @ inner
    signs = column_signs(basis)
    root = torch.linalg.vector_norm(projected, dim=-1).sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    return basis * (signs * root)[..., None, :], projected * (signs * inverse)[..., None]


def output_roots(metric: Metric, channels: int) -> Roots:
    """Return H^{1/2} and its inverse, shapes (groups or 1, channels, channels); identities without a curvature."""
    if metric.curvature is None:
        eye = torch.eye(channels, dtype=metric.mean.dtype, device=metric.mean.device)[None]
        return Roots(eye, eye)
    return square_root(_regular(metric.curvature), ROOT_FLOOR)


def ridge(diagonal: Tensor) -> Tensor:
    """Return what to add to matrices (groups, n, n) of this diagonal (groups, n) against singularity: (groups, 1)."""
    mean = diagonal.mean(-1, keepdim=True)
    return torch.where(mean > 0, (_RIDGE * mean).clamp(min=torch.finfo(mean.dtype).tiny), 1.0)


def not_semidefinite() -> OptionError:
    """Return the error of a covariance that is not positive definite with the largest ridge either."""
    return OptionError(
        "metric: the covariance is not positive semidefinite. Collect it again, with collect_metrics or as the mean of "
        "the patches' outer products in float64."
    )


def is_seen(metric: Metric) -> Tensor:
    """Return, shape (groups,), whether any change of the weight counts at all: not where the inputs never change."""
    seen = _input_variances(metric).mean(1) > 0
    return seen if metric.curvature is None else seen & (metric.curvature.diagonal(dim1=1, dim2=2).mean(1) > 0)


def _regular(matrices: Tensor) -> Tensor:
    """Return matrices (groups, n, n) with a ridge."""
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    return matrices + torch.diag_embed(ridge(diagonal).expand_as(diagonal))


def _is_tall(W: Tensor, metric: Metric) -> bool:
    """Whether the inputs are the smaller side, of (groups, o, p); outputs that were seen say more than a diagonal."""
    return W.shape[2] < W.shape[1] and metric.outputs is None


def _input_variances(metric: Metric) -> Tensor:
    return metric.covariance if metric.is_diagonal else metric.covariance.diagonal(dim1=1, dim2=2)


def _input_roots(metric: Metric) -> Roots:
    """Return C^{1/2} and its inverse, shape (groups, p, p)."""
    variances = _input_variances(metric)
    if metric.is_diagonal:
        root = (variances + ridge(variances)).sqrt()
        return Roots(torch.diag_embed(root), torch.diag_embed(1 / root))
    return square_root(_regular(metric.covariance), ROOT_FLOOR)


def _input_gram(weighted: Tensor, metric: Metric) -> Tensor:
    """Return C^{1/2} W^T H W C^{1/2} of W C^{1/2}, shape (groups, p, p)."""
    curved = weighted if metric.curvature is None else _regular(metric.curvature) @ weighted
    return weighted.mT @ curved


def _output_gram(weight: Tensor, metric: Metric, root: Tensor) -> Tensor:
    """Return H^{1/2} W C W^T H^{1/2}, shape (groups, o, o)."""
    W = metric.unfold(weight)
    unseen = ridge(_input_variances(metric))[:, :, None] * (W @ W.mT)
    return root @ (metric.output_covariance(weight) + unseen) @ root
