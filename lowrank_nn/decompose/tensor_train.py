"""Tensor trains: a tensor as a chain of cores, one for each of its modes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_nn.decompose._gram import working_dtype
from lowrank_nn.decompose.svd import singular_values, truncated_svd

Ranks = TypeVar("Ranks", int, NDArray[np.int64])

_SWEEPS, _TOLERANCE = 10, 1e-3


@torch.no_grad()
def tensor_train(
    tensor: Tensor, ranks: Sequence[int], *, sweeps: int = _SWEEPS, tolerance: float = _TOLERANCE
) -> list[Tensor]:
    r"""Decompose a tensor into a train of cores.

    .. math:: A_{i_1 \ldots i_d} \approx \sum_{a_1 \ldots a_{d-1}}
        G^1_{1 i_1 a_1} G^2_{a_1 i_2 a_2} \cdots G^d_{a_{d-1} i_d 1}

    Starts from TT-SVD (Oseledets 2011): truncated SVDs from the first bond to the last, each of what the cores so far
    leave. Its error is at most sqrt(d - 1) times the least possible, and the root of the sum of squares of what the
    unfoldings lose at these ranks. Sweeps over the cores then lower it: each core in turn is the best for all others
    (alternating least squares, with orthonormal cores on both sides).

    Args:
        tensor: Shape (n_1, ..., n_d), d at least 2, any floating dtype.
        ranks: (r_1, ..., r_{d-1}), each from 1; see :func:`reachable_ranks`, which lowers ranks to those of use.
        sweeps: Largest number of sweeps; 0 for TT-SVD itself. Two modes need none.
        tolerance: Sweeps end when one lowers the squared error by no more than this share of it.

    Returns:
        Cores (r_{k-1}, n_k, r_k) in the dtype of ``tensor``, r_0 = r_d = 1; all but the last are orthonormal:
        sum_{a i} G_{a i b} G_{a i c} = 1 where b = c and else 0 (columns without any energy may be zero instead).

    References:
        Oseledets 2011, "Tensor-Train Decomposition"; Holtz, Rohwedder, Schneider 2012, "The Alternating Linear Scheme
        for Tensor Optimization in the Tensor Train Format".
    """
    reachable = reachable_ranks(tensor.shape, ranks)
    if tensor.is_meta:
        bonds = (1, *reachable, 1)
        return [tensor.new_empty(size) for size in zip(bonds, tensor.shape, bonds[1:], strict=False)]
    wide = tensor.to(working_dtype(tensor))
    cores = _tt_svd(wide, ranks)
    if tuple(core.shape[2] for core in cores[:-1]) != reachable:
        cores = _sweep(wide, cores)  # what the cores behind cannot take goes on the way back
    if tensor.dim() > 2:
        total, kept = _energy(wide), _energy(cores[-1])
        for _ in range(sweeps):
            cores = _sweep(wide, cores)
            before, kept = kept, _energy(cores[-1])
            if kept - before <= tolerance * (total - kept):
                break
    return [core.to(tensor.dtype) for core in cores]


def tt_tensor(cores: Sequence[Tensor]) -> Tensor:
    """Return the tensor (n_1, ..., n_d) of a train of cores (r_{k-1}, n_k, r_k); differentiable."""
    product = cores[0].squeeze(0)
    for core in cores[1:]:
        # No tensordot, which refuses the product of an autocast and a core in another dtype.
        product = (product @ core.flatten(1)).reshape(*product.shape[:-1], *core.shape[1:])
    return product.squeeze(-1)


def tt_limits(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the largest useful rank of each bond, at which nothing is lost: the smaller side of the unfolding."""
    return tuple(min(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape)))


def reachable_ranks(shape: Sequence[int], ranks: Sequence[Ranks]) -> tuple[Ranks, ...]:
    """Lower ranks to what their neighbours can fill: r_k is at most r_{k-1} n_k, and at most n_{k+1} r_{k+1}.

    The tensors that have a train of these ranks stay the same.

    Args:
        shape: (n_1, ..., n_d).
        ranks: (r_1, ..., r_{d-1}), numbers, or arrays for many trains at once.
    """
    lowered = list(ranks)
    for k in range(len(lowered)):
        before = shape[0] if k == 0 else lowered[k - 1] * shape[k]
        lowered[k] = _smaller(lowered[k], before)
    for k in reversed(range(len(lowered))):
        behind = shape[-1] if k == len(lowered) - 1 else lowered[k + 1] * shape[k + 1]
        lowered[k] = _smaller(lowered[k], behind)
    return tuple(lowered)


@torch.no_grad()
def tensor_train_errors(tensor: Tensor, grid: Sequence[Sequence[int]]) -> Tensor:
    """Return the squared error of TT-SVD at all combinations of some ranks for each bond.

    What TT-SVD loses at each bond is orthogonal to what it loses at the others, so the errors of one decomposition
    after the other add up, and the ranks of the last bond come from one spectrum. Sweeps (:func:`tensor_train`) can
    only lower them; so does the one that takes away what neighbours cannot fill.

    Args:
        tensor: Shape (n_1, ..., n_d), any floating dtype.
        grid: For each of the d - 1 bonds the ranks wanted, in ascending order. All but the last should be few.

    Returns:
        Shape (len(grid[0]), ..., len(grid[d-2])), float64.
    """
    if tensor.is_meta:
        return tensor.new_empty([len(ranks) for ranks in grid], dtype=torch.float64)
    return _errors(tensor.to(working_dtype(tensor))[None], grid)


def _errors(rest: Tensor, grid: Sequence[Sequence[int]]) -> Tensor:
    """Return the errors for what is left of a tensor, (r_{k-1}, n_k, ..., n_d)."""
    matrix = rest.flatten(0, 1).flatten(1)
    squares, ranks = singular_values(matrix).square(), [min(rank, *matrix.shape) for rank in grid[0]]
    tails = torch.nn.functional.pad(squares.flip(0).cumsum(0).flip(0)[1:], (0, 1))
    lost = tails[[rank - 1 for rank in ranks]]
    if len(grid) == 1:
        return lost
    _, projected = _leading(matrix, ranks[-1])
    parts = [_errors(projected[:rank].reshape(rank, *rest.shape[2:]), grid[1:]) for rank in ranks]
    return torch.stack([part + tail for part, tail in zip(parts, lost, strict=True)])


def _tt_svd(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    cores, rest = [], tensor[None]
    for rank in ranks:
        matrix = rest.flatten(0, 1).flatten(1)
        basis, projected = _leading(matrix, min(rank, *matrix.shape))
        cores.append(basis.reshape(*rest.shape[:2], -1))
        rest = projected.reshape(len(projected), *rest.shape[2:])
    return [*cores, rest[:, :, None]]


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading left singular vectors (m, rank), and the matrix in their coordinates, (rank, n)."""
    left, right = truncated_svd(matrix, rank)
    root = torch.linalg.vector_norm(left, dim=0)
    return left / torch.where(root > 0, root, 1.0), right * root[:, None]


def _sweep(tensor: Tensor, cores: list[Tensor]) -> list[Tensor]:
    """Return better cores, orthonormal as the given ones are: each in turn, from the last to the first and back."""
    left = [tensor[None]]  # what the cores up to k leave, (r_k, n_{k+1}, ..., n_d)
    for core in cores[:-1]:
        left.append(_projected(core, left[-1]))
    right = [tensor.new_ones((1, 1))]  # the cores from k + 1 on, (n_{k+1} ... n_d, r_k)
    for rest in left[:0:-1]:
        best = _seen(rest, right[-1]).reshape(len(rest), -1)
        basis = torch.linalg.qr(best.mT).Q.mT.reshape(-1, rest.shape[1], right[-1].shape[1])
        right.append(torch.einsum("aib,nb->ina", basis, right[-1]).flatten(0, 1))
    better, rest = [], tensor[None]
    for behind in right[:0:-1]:
        basis = torch.linalg.qr(_seen(rest, behind)).Q
        better.append(basis.reshape(len(rest), rest.shape[1], -1))
        rest = _projected(better[-1], rest)
    return [*better, rest[:, :, None]]


def _seen(rest: Tensor, behind: Tensor) -> Tensor:
    """Return a tensor (r_{k-1}, n_k, ..., n_d) in the coordinates of the cores from k + 1 on, (r_{k-1} n_k, r_k)."""
    return rest.reshape(-1, len(behind)) @ behind


def _projected(core: Tensor, rest: Tensor) -> Tensor:
    """Return a tensor (r_{k-1}, n_k, ...) in the coordinates of a core, (r_k, ...)."""
    projected: Tensor = torch.tensordot(core, rest, dims=([0, 1], [0, 1]))
    return projected


def _energy(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _smaller(rank: Ranks, bound: Ranks | int) -> Ranks:
    return min(rank, int(bound)) if isinstance(rank, int) else np.minimum(rank, bound)
