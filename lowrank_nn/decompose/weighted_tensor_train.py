"""Tensor trains under a metric taken as a product over the modes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_nn.decompose.metric import Metric, Roots, square_root
from lowrank_nn.decompose.tensor_train import tensor_train


class ModeRoots(NamedTuple):
    r"""A metric as the nearest product over the modes of inputs and outputs, by its square roots.

    .. math:: C \approx s_C \, C_1 \otimes \cdots \otimes C_m, \qquad H \approx s_H \, H_1 \otimes \cdots \otimes H_n

    with C_k and H_k the partial traces, of mean eigenvalue 1. Multiplying a mode by a matrix leaves the ranks of a
    tensor train as they are: under such a product the best train is that of the weighted tensor.

    Attributes:
        inputs: Roots of C_1, C_2, ..., each (groups, n, n).
        outputs: Roots of H_1, H_2, ..., each (groups, n, n).
        scale: s_C s_H, shape (groups,).
    """

    inputs: list[Roots]
    outputs: list[Roots]
    scale: Tensor


@torch.no_grad()
def mode_roots(metric: Metric, inputs: Sequence[int], outputs: Sequence[int]) -> ModeRoots:
    """Return the product over modes that stands in for a metric.

    Args:
        metric: The metric of a layer.
        inputs: Sizes of the modes that the layer's inputs per group are folded into, in the order of the weight.
        outputs: Sizes of the modes of the outputs per group.
    """
    covariances, scale = _marginals(metric.covariance, inputs)
    curvature = metric.curvature
    if curvature is None:
        curvature = metric.mean.new_ones(metric.groups, math.prod(outputs))
    curvatures, curved = _marginals(curvature, outputs)
    return ModeRoots([square_root(C) for C in covariances], [square_root(H) for H in curvatures], scale * curved)


@torch.no_grad()
def along_modes(tensor: Tensor, matrices: Sequence[Tensor], first: int = 0) -> Tensor:
    """Multiply consecutive modes of a tensor by square matrices, from the mode ``first`` on."""
    for dim, matrix in enumerate(matrices, start=first):
        tensor = torch.tensordot(matrix, tensor, dims=([1], [dim])).movedim(0, dim)
    return tensor


@torch.no_grad()
def weighted_tensor_train(tensor: Tensor, roots: Sequence[Sequence[Roots]], ranks: Sequence[int]) -> list[Tensor]:
    """Decompose a tensor into a train that is near it under a product metric: that of the weighted tensor, unweighted.

    Args:
        tensor: Its modes in the order of the cores; a core may hold several modes.
        roots: For each core the roots (n, n) of the metric along its modes.
        ranks: Ranks of the train.

    Returns:
        Cores (r_{k-1}, n_k, r_k), n_k the product of the core's modes, float64.
    """
    every = [root for of_core in roots for root in of_core]
    weighted = along_modes(tensor.to(every[0].root), [root.root for root in every])
    sizes = [[len(root.root) for root in of_core] for of_core in roots]
    cores = tensor_train(weighted.reshape([math.prod(size) for size in sizes]), ranks)
    found = []
    for core, size, of_core in zip(cores, sizes, roots, strict=True):
        modes = core.reshape(len(core), *size, -1)
        found.append(along_modes(modes, [root.inverse for root in of_core], 1).reshape(core.shape))
    return found


def _marginals(matrices: Tensor, sizes: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Return the partial traces (groups, n, n) of matrices, or of their diagonals, and what their product lacks."""
    groups = len(matrices)
    mean = (matrices if matrices.dim() == 2 else matrices.diagonal(dim1=1, dim2=2)).mean(1)
    parts = []
    for k, size in enumerate(sizes):
        before, behind = math.prod(sizes[:k]), math.prod(sizes[k + 1 :])
        if matrices.dim() == 2:
            part = torch.diag_embed(matrices.reshape(groups, before, size, behind).sum((1, 3)))
        else:
            folded = matrices.reshape(groups, *[before, size, behind] * 2)
            part = torch.einsum("gaibajb->gij", folded)
        average = (mean * before * behind)[:, None, None]
        seen = average > 0  # where the inputs never change, any weight is as good
        unit = torch.eye(size, dtype=part.dtype, device=part.device)
        parts.append(torch.where(seen, part / torch.where(seen, average, 1.0), unit))
    return parts, mean
