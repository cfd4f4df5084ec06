"""Gram matrices and their eigenvectors: the cheap way to singular subspaces."""

from __future__ import annotations

import torch
from torch import Tensor

_ROW_BLOCK = 128
_CHUNK_ELEMENTS = 2**22


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64 for a float64 tensor, float32 for every narrower one."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def gram(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the lower triangle of ``matrix @ matrix.T``, computed in ``dtype``.

    Blocks above the diagonal are never computed, which halves the work of the product; ``torch.linalg.eigh``
    reads the lower triangle only. Columns are converted in chunks, so that a wide float32 matrix is never held
    in float64 as a whole.

    Args:
        matrix: Shape (m, n).
        dtype: Data type of the product and of its accumulation.

    Returns:
        Shape (m, m); entries above the diagonal are not meaningful.
    """
    rows, columns = matrix.shape
    if rows <= _ROW_BLOCK and matrix.dtype == dtype:
        return matrix @ matrix.T
    result = matrix.new_zeros((rows, rows), dtype=dtype)
    width = max(_CHUNK_ELEMENTS // max(rows, 1), 1)
    for first in range(0, columns, width):
        block = matrix[:, first : first + width].to(dtype)
        for start in range(0, rows, _ROW_BLOCK):
            stop = min(start + _ROW_BLOCK, rows)
            result[start:stop, :stop].addmm_(block[start:stop], block[:stop].T)
    return result


def whole_gram(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``matrix @ matrix.T``, computed as :func:`gram` does, with both triangles filled."""
    result = gram(matrix, dtype)
    for start in range(_ROW_BLOCK, len(result), _ROW_BLOCK):
        block = slice(start, start + _ROW_BLOCK)
        result[:start, block] = result[block, :start].T
    return result


def leading_eigenvectors(gram_matrix: Tensor, rank: int) -> Tensor:
    """Return the ``rank`` eigenvectors of largest eigenvalue, in descending order.

    Args:
        gram_matrix: Symmetric, shape (..., m, m); only the lower triangle is read.
        rank: Number of vectors, at most m.

    Returns:
        Orthonormal columns, shape (..., m, rank), of whatever sign.
    """
    vectors: Tensor = torch.linalg.eigh(gram_matrix).eigenvectors
    return vectors[..., vectors.shape[-1] - rank :].flip(-1)


def column_signs(columns: Tensor) -> Tensor:
    """Return the signs, shape (..., r), that make the entry of largest magnitude in each column positive."""
    least, largest = columns.aminmax(dim=-2)
    return torch.copysign(torch.ones_like(largest), largest + least)


def leading_left_vectors(matrix: Tensor, rank: int, *, exact: bool = False) -> tuple[Tensor, float]:
    """Return an orthonormal basis of the ``rank`` leading left singular vectors, and the energy it keeps.

    Args:
        matrix: Shape (m, n).
        rank: Number of vectors, at most m.
        exact: Take the singular value decomposition of ``matrix`` itself. A Gram matrix squares the spectrum
            and so loses directions below sqrt(eps) of the largest singular value.

    Returns:
        Orthonormal columns, shape (m, rank), in the dtype of ``matrix``, of whatever sign; and the sum of the squares
        of their singular values.
    """
    if not exact:
        values, vectors = torch.linalg.eigh(gram(matrix, matrix.dtype))
        first = len(values) - rank
        return vectors[:, first:].flip(1), float(values[first:].sum(dtype=torch.float64))
    rows, columns = matrix.shape
    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=rank > min(rows, columns))
    return vectors[:, :rank], float(values[:rank].double().square().sum())


def improved_left_vectors(matrix: Tensor, basis: Tensor) -> tuple[Tensor, float]:
    """Return a basis closer than the given one to the leading left singular vectors, and the energy it keeps.

    Two steps of orthogonal iteration. Each shrinks what the basis holds of a direction of singular value s by
    (s / r)^2, r being the singular value of the last direction kept, and loses no energy.

    Args:
        matrix: Shape (m, n).
        basis: Orthonormal columns, shape (m, rank), near the leading directions.

    Returns:
        Orthonormal columns, shape (m, rank), of whatever sign; and the sum of squares of ``basis.T @ matrix``.
    """
    symmetric = whole_gram(matrix, matrix.dtype)
    for _ in range(2):  # orthonormalised each time: the square of the Gram matrix would drown the weak directions
        basis = torch.linalg.qr(symmetric @ basis).Q
    return basis, float((basis * (symmetric @ basis)).sum(dtype=torch.float64))
