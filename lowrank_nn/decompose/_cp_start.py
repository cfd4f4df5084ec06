"""The start of CP: orthogonal rank-one terms from the slices of the rotated tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_nn.decompose._gram import gram, leading_eigenvectors
from lowrank_nn.decompose._khatri_rao import balance

# Below this share of missed energy the float32 Gram matrices are not trusted.
_FLOAT32_LIMIT = 1e-3


def slice_terms(tensor: Tensor, rank: int) -> tuple[list[Tensor], float]:
    """Return the largest rank-one terms over the slices of the tensor rotated in its small modes.

    All terms are mutually orthogonal, so that what they miss is known exactly.

    Args:
        tensor: Shape (n_0, n_1, ...), float32 or float64.
        rank: Number of terms; where fewer exist, columns of zeros fill up.

    Returns:
        The balanced factors, shapes (n_k, rank), in the dtype of ``tensor``, and the relative Frobenius error
        of the sum of the terms.
    """
    trusted = tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    if trusted:
        factors, missed = _terms(tensor, rank)
        if missed > _FLOAT32_LIMIT:
            return factors, missed
    factors, missed = _terms(tensor.double(), rank)
    return [factor.to(tensor.dtype) for factor in factors], missed


def _terms(tensor: Tensor, rank: int) -> tuple[list[Tensor], float]:
    bases = []
    rotated = tensor
    for mode in range(2, tensor.ndim):
        unfolded = tensor.movedim(mode, 0).flatten(1)
        bases.append(leading_eigenvectors(gram(unfolded, torch.float64), unfolded.shape[0]).to(tensor.dtype))
        rotated = torch.tensordot(rotated, bases[-1], dims=([2], [0]))
    slices = rotated.flatten(2).movedim(2, 0) if tensor.ndim > 2 else rotated[None]
    left, values, right = _slice_svd(slices)
    count = min(rank, values.numel())
    order = values.flatten().sort(descending=True, stable=True).indices
    kept, dropped = order[:count], order[count:]
    energy = values.flatten().double().square()
    total = float(energy.sum())
    missed = math.sqrt(float(energy[dropped].sum()) / total) if total > 0 else 0.0
    position, term = kept // values.shape[1], kept % values.shape[1]
    factors = [
        left[position, :, term].T * values.flatten()[kept],
        right[position, term].T,
    ]
    for index, basis in zip(_unravel(position, tensor.shape[2:]), bases, strict=True):
        factors.append(basis[:, index])
    padding = (0, rank - count)
    return balance([torch.nn.functional.pad(factor, padding) for factor in factors]), missed


def _slice_svd(slices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (S, n, t), singular values (S, t) and V^T (S, t, m) of slices (S, n, m), t = min(n, m)."""
    if slices.dtype == torch.float64:
        U, values, Vh = torch.linalg.svd(slices, full_matrices=False)
        return U, values, Vh
    if slices.shape[1] > slices.shape[2]:
        U, values, Vh = _slice_svd(slices.transpose(1, 2))
        return Vh.transpose(1, 2), values, U.transpose(1, 2)
    left = torch.linalg.eigh(slices @ slices.transpose(1, 2)).eigenvectors.flip(2)
    right = left.transpose(1, 2) @ slices
    values = torch.linalg.vector_norm(right, dim=2)
    return left, values, right / values.clamp(min=torch.finfo(values.dtype).tiny)[:, :, None]


def _unravel(flat: Tensor, shape: torch.Size) -> list[Tensor]:
    """Return the index along each mode of positions in a row-major layout."""
    indices = []
    for size in reversed(shape):
        indices.append(flat % size)
        flat = flat // size
    return indices[::-1]
