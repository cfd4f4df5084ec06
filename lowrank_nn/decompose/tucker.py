"""Tucker-2: a convolution kernel compressed along its output and input channels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_nn.decompose._gram import gram, leading_eigenvectors, leading_left_vectors, working_dtype

# Relative truncated tails below which a Gram matrix of the given type no longer finds the right subspace.
_TAIL_LIMIT = {torch.float32: 1e-3, torch.float64: 1e-7}


class TuckerFactors(NamedTuple):
    """Factors of ``kernel ~ core x_0 out_factor x_1 in_factor``.

    Attributes:
        core: Shape (r_out or O, r_in or I, *spatial).
        out_factor: Orthonormal columns, shape (O, r_out); None where the output mode is kept.
        in_factor: Orthonormal columns, shape (I, r_in); None where the input mode is kept.
    """

    core: Tensor
    out_factor: Tensor | None
    in_factor: Tensor | None


@torch.no_grad()
def tucker2(kernel: Tensor, rank: tuple[int | None, int | None], *, sweeps: int = 3) -> TuckerFactors:
    r"""Decompose a kernel along its two channel modes (Tucker-2; Tucker-1 where one rank is None).

    .. math:: K_{o i p} \approx \sum_{a b} U^{out}_{o a} \, G_{a b p} \, U^{in}_{i b}

    Starts from the leading eigenvectors of the output mode's Gram matrix and improves both factors in turn (HOOI).
    Computed in float32 unless the truncated tail is so small that float64 is needed.
    After Kim et al. 2016 (Compression of deep convolutional neural networks for fast and low power mobile
    applications) and De Lathauwer et al. 2000 (On the best rank-1 and rank-(R1, ..., RN) approximation).

    Args:
        kernel: Shape (O, I, *spatial) with any number of spatial dimensions, any floating dtype.
        rank: (r_out, r_in), from 1 to O and from 1 to I; None leaves that mode as it is.
        sweeps: Number of times both factors are updated; 0 gives the plain truncated bases.

    Returns:
        Core and factors in the dtype of ``kernel``.
    """
    out_channels, in_channels, *spatial = kernel.shape
    r_out, r_in = rank
    if kernel.is_meta:
        return TuckerFactors(
            kernel.new_empty((r_out or out_channels, r_in or in_channels, *spatial)),
            None if r_out is None else kernel.new_empty((out_channels, r_out)),
            None if r_in is None else kernel.new_empty((in_channels, r_in)),
        )
    core, out_factor, in_factor = _decompose(kernel.reshape(out_channels, in_channels, -1), rank, sweeps)
    return TuckerFactors(
        core.reshape(*core.shape[:2], *spatial).to(kernel.dtype),
        None if out_factor is None else out_factor.to(kernel.dtype),
        None if in_factor is None else in_factor.to(kernel.dtype),
    )


@torch.no_grad()
def tucker2_errors(kernel: Tensor) -> Tensor:
    """Return the squared HOSVD error of every rank pair at once.

    The kernel is rotated once into the eigenbases of both channel modes; the error at ranks (a, b) is the energy
    outside the leading a x b block, read off two-dimensional cumulative sums. HOOI sweeps (:func:`tucker2`) can
    only lower it.

    Args:
        kernel: Shape (O, I, *spatial), any floating dtype.

    Returns:
        Shape (O, I), float64: entry [a - 1, b - 1] is the squared Frobenius error at ranks (a, b). The last
        column holds the errors of the output mode alone, the last row those of the input mode alone.
    """
    out_channels, in_channels = kernel.shape[:2]
    if kernel.is_meta:
        return kernel.new_empty((out_channels, in_channels), dtype=torch.float64)
    X = kernel.reshape(out_channels, in_channels, -1).to(working_dtype(kernel))
    X_out, X_in = X.flatten(1), X.transpose(0, 1).flatten(1)
    out_basis = leading_eigenvectors(gram(X_out, torch.float64), out_channels).to(X.dtype)
    in_basis = leading_eigenvectors(gram(X_in, torch.float64), in_channels).to(X.dtype)
    rotated = in_basis.T @ (out_basis.T @ X_out).view_as(X)
    energy = rotated.double().square().sum(dim=2)
    # Sums of what is left out, not the total less what is kept: no cancellation at high ranks.
    right = energy.flip(1).cumsum(1).flip(1)
    below = right[:, 0].flip(0).cumsum(0).flip(0)
    beside = torch.nn.functional.pad(right[:, 1:], (0, 1)).cumsum(0)
    return beside + torch.nn.functional.pad(below[1:], (0, 1))[:, None]


def _decompose(
    kernel: Tensor, rank: tuple[int | None, int | None], sweeps: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run HOOI in the cheapest arithmetic that resolves the truncated tail."""
    dtype = working_dtype(kernel)
    # A float32 product on an accelerator may silently run in a narrower format.
    attempts = [(dtype, False)] if kernel.device.type == "cpu" else []
    attempts += [(torch.float64, False)] if (torch.float64, False) not in attempts else []
    attempts += [(torch.float64, True)] if dtype == torch.float64 else []
    total = _energy(kernel)
    for attempt_dtype, exact in attempts:
        core, out_factor, in_factor = _hooi(kernel.to(attempt_dtype), rank, sweeps, exact)
        tail = math.sqrt(max(1 - _energy(core) / total, 0.0)) if total > 0 else 1.0
        if tail > _TAIL_LIMIT[attempt_dtype] or core.shape == kernel.shape:
            break
    return core, out_factor, in_factor


def _energy(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _hooi(
    X: Tensor, rank: tuple[int | None, int | None], sweeps: int, exact: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Alternate between the two factors; X has shape (O, I, P)."""
    out_channels, in_channels, points = X.shape
    r_out, r_in = rank
    out_factor = _full_basis(X, out_channels, r_out)
    in_factor = _full_basis(X, in_channels, r_in)
    out_open = r_out is not None and out_factor is None
    in_open = r_in is not None and in_factor is None
    X_out = X.reshape(out_channels, in_channels * points)
    X_in = X.transpose(0, 1).reshape(in_channels, out_channels * points)
    if r_out is not None and out_open:
        out_factor = leading_left_vectors(X_out, r_out, exact=exact)
    if r_in is not None and in_open:
        projected = X_out if out_factor is None else out_factor.T @ X_out
        for sweep in range(max(sweeps, 1)):
            in_factor = leading_left_vectors(
                projected.view(-1, in_channels, points).transpose(0, 1).flatten(1), r_in, exact=exact
            )
            if r_out is None or not out_open or sweeps == 0:
                break
            half = (in_factor.T @ X_in).view(r_in, out_channels, points).transpose(0, 1).flatten(1)
            out_factor = leading_left_vectors(half, r_out, exact=exact)
            projected = out_factor.T @ X_out if sweep < sweeps - 1 else projected
    core = X_in if in_factor is None else in_factor.T @ X_in
    core = core.view(-1, out_channels, points).transpose(0, 1).flatten(1)
    core = core if out_factor is None else out_factor.T @ core
    return core.view(core.shape[0], -1, points), out_factor, in_factor


def _full_basis(X: Tensor, size: int, rank: int | None) -> Tensor | None:
    """Return the identity where the rank is the full size: any basis is optimal, and this one is exact."""
    return torch.eye(size, dtype=X.dtype, device=X.device) if rank == size else None
