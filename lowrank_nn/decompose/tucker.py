"""Tucker-2: a convolution kernel compressed along its output and input channels."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lowrank_nn.decompose._gram import column_signs, gram, leading_eigenvectors, leading_left_vectors, working_dtype

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

    Starts from the leading eigenvectors of the output mode's Gram matrix and computes both factors in turn (HOOI).
    Works in float32 unless the truncated tail is so small that float64 is needed.
    After Kim et al. 2016 (Compression of deep convolutional neural networks for fast and low power mobile
    applications) and De Lathauwer et al. 2000 (On the best rank-1 and rank-(R1, ..., RN) approximation).

    Args:
        kernel: Shape (O, I, *spatial) with any number of spatial dimensions, any floating dtype.
        rank: (r_out, r_in), from 1 to O and from 1 to I; None leaves that mode as it is.
        sweeps: Number of times both factors are computed, at least 1; a single sweep is the sequentially
            truncated HOSVD. Has no effect where only one mode is truncated.

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
    by_out, by_in = X.permute(2, 0, 1).contiguous(), X.permute(2, 1, 0).contiguous()
    U = leading_eigenvectors(gram(by_in.flatten(0, 1).T, torch.float64), out_channels).to(X.dtype)
    V = leading_eigenvectors(gram(by_out.flatten(0, 1).T, torch.float64), in_channels).to(X.dtype)
    energy = (U.T @ by_out @ V).double().square().sum(dim=0)
    # Sums of what is left out, not the total less what is kept: no cancellation at high ranks.
    right = energy.flip(1).cumsum(1).flip(1)
    below = right[:, 0].flip(0).cumsum(0).flip(0)
    beside = torch.nn.functional.pad(right[:, 1:], (0, 1)).cumsum(0)
    return beside + torch.nn.functional.pad(below[1:], (0, 1))[:, None]


def _decompose(
    kernel: Tensor, rank: tuple[int | None, int | None], sweeps: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run HOOI on a kernel of shape (O, I, P) in the cheapest arithmetic that resolves the truncated tail."""
    # A full rank needs no search: any basis is optimal, and the identity is exact.
    searched = tuple(None if r == size else r for r, size in zip(rank, kernel.shape[:2], strict=True))
    total = _energy(kernel)
    for dtype, exact in _attempts(kernel):
        X = kernel.to(dtype)
        core, out_factor, in_factor = _hooi(X, searched[0], searched[1], sweeps, exact)
        tail = math.sqrt(max(1 - _energy(core) / total, 0.0)) if total > 0 else 1.0
        if tail > _TAIL_LIMIT[dtype] or core.shape == kernel.shape:
            break
    if out_factor is not None:
        signs = column_signs(out_factor)
        core, out_factor = core * signs[:, None, None], out_factor * signs
    if in_factor is not None:
        signs = column_signs(in_factor)
        core, in_factor = core * signs[:, None], in_factor * signs
    if rank[0] == kernel.shape[0]:
        out_factor = torch.eye(kernel.shape[0], dtype=core.dtype, device=core.device)
    if rank[1] == kernel.shape[1]:
        in_factor = torch.eye(kernel.shape[1], dtype=core.dtype, device=core.device)
    return core, out_factor, in_factor


def _attempts(kernel: Tensor) -> list[tuple[torch.dtype, bool]]:
    """Return pairs (dtype, decompose without Gram matrices), the cheapest first."""
    if kernel.dtype == torch.float64:
        return [(torch.float64, False), (torch.float64, True)]
    # A float32 product on an accelerator may silently run in a narrower format.
    narrow = [(torch.float32, False)] if kernel.device.type == "cpu" else []
    return [*narrow, (torch.float64, False)]


def _energy(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _hooi(
    X: Tensor, r_out: int | None, r_in: int | None, sweeps: int, exact: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return core and factors of X, shape (O, I, P); a mode whose rank is None keeps its axis."""
    if r_out is None and r_in is None:
        return X.clone(), None, None
    # With the points in front every product below reads its operands as they lie in memory.
    by_out, by_in = X.permute(2, 0, 1).contiguous(), X.permute(2, 1, 0).contiguous()
    if r_in is None and r_out is not None:
        U = _basis(by_in, r_out, exact)
        return (U.T @ by_out).permute(1, 2, 0), U, None
    if r_out is None and r_in is not None:
        V = _basis(by_out, r_in, exact)
        return (V.T @ by_in).permute(2, 1, 0), None, V
    U = _basis(by_in, cast(int, r_out), exact)
    for sweep in range(sweeps):
        if sweep > 0:
            U = _basis(V.T @ by_in, U.shape[1], exact)
        projected = U.T @ by_out
        V = _basis(projected, cast(int, r_in), exact)
    return (projected @ V).permute(1, 2, 0), U, V


def _basis(stack: Tensor, rank: int, exact: bool) -> Tensor:
    """Return the leading directions, shape (n, rank), of the last axis of (P, m, n)."""
    return leading_left_vectors(stack.flatten(0, 1).T, rank, exact=exact)
