"""Tucker-2: a convolution kernel compressed along its output and input channels."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lowrank_nn.decompose._gram import (
    column_signs,
    gram,
    improved_left_vectors,
    leading_eigenvectors,
    leading_left_vectors,
    working_dtype,
)

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
def tucker2(
    kernel: Tensor, rank: tuple[int | None, int | None], *, sweeps: int = 20, tolerance: float = 5e-5
) -> TuckerFactors:
    r"""Decompose a kernel along its two channel modes (Tucker-2; Tucker-1 where one rank is None).

    .. math:: K_{o i p} \approx \sum_{a b} U^{out}_{o a} \, G_{a b p} \, U^{in}_{i b}

    Starts from the leading eigenvectors of the output mode's Gram matrix and computes both factors in turn (HOOI).
    Works in float32 unless the truncated tail is so small that float64 is needed.
    After Kim et al. 2016 (Compression of deep convolutional neural networks for fast and low power mobile
    applications) and De Lathauwer et al. 2000 (On the best rank-1 and rank-(R1, ..., RN) approximation).

    Args:
        kernel: Shape (O, I, *spatial) with any number of spatial dimensions, any floating dtype.
        rank: (r_out, r_in), from 1 to O and from 1 to I; None leaves that mode as it is.
        sweeps: Largest number of times both factors are computed, at least 1; a single sweep is the sequentially
            truncated HOSVD. Has no effect where only one mode is truncated.
        tolerance: Sweeps end once all further ones are expected to lower the error by no more than this share of it;
            0 for all sweeps.

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
    core, out_factor, in_factor = _decompose(kernel.reshape(out_channels, in_channels, -1), rank, sweeps, tolerance)
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
    kernel: Tensor, rank: tuple[int | None, int | None], sweeps: int, tolerance: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run HOOI on a kernel of shape (O, I, P) in the cheapest arithmetic that resolves the truncated tail."""
    # A full rank needs no search: any basis is optimal, and the identity is exact.
    searched = tuple(None if r == size else r for r, size in zip(rank, kernel.shape[:2], strict=True))
    total = _energy(kernel)
    for dtype, exact in _attempts(kernel):
        X = kernel.to(dtype)
        stop = _Convergence(total, sweeps, tolerance, dtype)
        core, out_factor, in_factor = _hooi(X, searched[0], searched[1], stop, exact)
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
    """Return the squared norm of (m, n, p): rows in their own precision, their sum in float64."""
    return float(torch.linalg.vector_norm(tensor, dim=(1, 2)).double().square().sum())


def _hooi(
    X: Tensor, r_out: int | None, r_in: int | None, convergence: _Convergence, exact: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return core and factors of X, shape (O, I, P); a mode whose rank is None keeps its axis."""
    if r_out is None and r_in is None:
        return X.clone(), None, None
    # The mode to project stands in front and the one to decompose last: each is one product of matrices as they lie.
    out_first, in_first = X.transpose(1, 2).contiguous(), X.permute(1, 2, 0).contiguous()
    if r_in is None and r_out is not None:
        U, _ = _basis(in_first, r_out, exact)
        return _project(U, out_first).transpose(1, 2), U, None
    if r_out is None and r_in is not None:
        V, _ = _basis(out_first, r_in, exact)
        return _project(V, in_first).permute(2, 0, 1), None, V
    U, _ = _basis(in_first, cast(int, r_out), exact)
    projected = _project(U, out_first)
    V, kept = _basis(projected, cast(int, r_in), exact)
    # Where spectra decay evenly the second sweep is the last, and improving V is as good as an eigendecomposition at
    # a third of its cost. Later sweeps are for kernels that converge slowly, and slower still with inexact bases.
    second = not exact
    while not convergence.reached(kept):
        U, kept = _basis(_project(V, in_first), U.shape[1], exact)
        convergence.watch(kept)
        projected = _project(U, out_first)
        V, kept = _improved(projected, V) if second else _basis(projected, V.shape[1], exact)
        second = False
    return (projected @ V).transpose(1, 2), U, V


class _Convergence:
    """Tells when further sweeps would gain next to nothing."""

    def __init__(self, total: float, sweeps: int, tolerance: float, dtype: torch.dtype) -> None:
        self._total, self._sweeps, self._tolerance = total, sweeps, tolerance
        self._noise = 4 * torch.finfo(dtype).eps * total
        self._kept: list[float] = []

    def watch(self, kept: float) -> None:
        """Note the energy kept after half a sweep."""
        self._kept.append(kept)

    def reached(self, kept: float) -> bool:
        """Note the energy kept after a whole sweep; return whether to stop."""
        self.watch(kept)
        if len(self._kept) > 2 * self._sweeps - 2:
            return True
        if len(self._kept) < 3 or self._tolerance == 0:
            return False
        before, gain = self._kept[-2] - self._kept[-3], self._kept[-1] - self._kept[-2]
        if gain <= self._noise:
            return True
        # Gains shrink about geometrically, so that all further ones sum to gain * ratio / (1 - ratio).
        ratio = gain / before if before > gain else 1.0
        # A relative change t of the error is one of 2 t of its square.
        return gain * ratio <= (1 - ratio) * 2 * self._tolerance * max(self._total - kept, 0.0)


def _project(basis: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor (n, P, m) with its first mode projected on the basis (n, r): shape (r, P, m)."""
    return (basis.T @ tensor.flatten(1)).view(-1, *tensor.shape[1:])


def _basis(tensor: Tensor, rank: int, exact: bool) -> tuple[Tensor, float]:
    """Return the leading directions, shape (n, rank), of the last mode of (m, P, n), and the energy they keep."""
    return leading_left_vectors(tensor.flatten(0, 1).T, rank, exact=exact)


def _improved(tensor: Tensor, basis: Tensor) -> tuple[Tensor, float]:
    """Return what :func:`_basis` does, nearly, given a basis that is close."""
    return improved_left_vectors(tensor.flatten(0, 1).T, basis)
