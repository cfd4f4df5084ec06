"""Tucker-2 under a metric: reduced-rank regression on the patches that an input factor leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_nn.decompose._gram import column_signs, leading_eigenvectors
from lowrank_nn.decompose.metric import Metric, square_root
from lowrank_nn.decompose.tucker import TuckerFactors
from lowrank_nn.decompose.weighted import output_roots, ridge, weighted_svd

_MEMORY = 6
_FLOOR = 1e-12  # only stops eigenvalues that rounding made negative: the covariance has a ridge


@torch.no_grad()
def weighted_tucker2(
    weight: Tensor,
    metric: Metric,
    rank: tuple[int | None, int | None],
    *,
    start: Tensor | None = None,
    iterations: int = 20,
    tolerance: float = 1e-3,
) -> TuckerFactors:
    r"""Decompose a kernel along its channel modes under a metric (Tucker-2; Tucker-1 where one rank is None).

    For a given input factor V, with P = V x 1 (1 over the kernel's positions), the best core and output factor are a
    reduced-rank regression (Izenman 1975), in closed form:

    .. math:: N = H^{1/2} W C P (P^T C P)^{-1} P^T C W^T H^{1/2}, \quad
        \hat W = H^{-1/2} U U^T H^{1/2} W C P (P^T C P)^{-1} P^T

    with U the leading eigenvectors of N. The error, tr(H W C W^T) less the leading eigenvalues of N, is so a function
    of V alone (variable projection, Golub and Pereyra 1973), which L-BFGS lowers. It starts from the HOSVD of the
    kernel weighted as if C were a product of a covariance of channels and one of positions, which is also what
    preconditions its steps. Where the input mode is left whole the result is the exact optimum.

    Args:
        weight: Shape (out_channels, in_channels / groups, *spatial); below, O and I are the channels per group.
        metric: What is to be small of the weight's change.
        rank: (r_out, r_in), from 1 to O (and no more than there are inputs) and from 1 to I; None leaves that mode as
            it is.
        start: An input factor (groups, I, r_in) that the result shall not be worse than, whatever goes with it.
        iterations: Largest number of steps.
        tolerance: Steps end when one lowers the error by no more than this share of it.

    Returns:
        Core (groups, r_out or O, r_in or I, *spatial) and factors with orthonormal columns (groups, O, r_out) and
        (groups, I, r_in), None where the mode is kept; float64.
    """
    groups, inputs, spatial = metric.groups, weight.shape[1], weight.shape[2:]
    outputs = weight.shape[0] // groups
    r_out, r_in = rank
    if weight.is_meta:
        like = weight.new_empty(0, dtype=torch.float64)
        return TuckerFactors(
            like.new_empty((groups, r_out or outputs, r_in or inputs, *spatial)),
            None if r_out is None else like.new_empty((groups, outputs, r_out)),
            None if r_in is None else like.new_empty((groups, inputs, r_in)),
        )
    # A full rank needs no search: any basis is optimal, and the identity is exact.
    searched = None if r_out == outputs else r_out
    if r_in is None or r_in == inputs:
        core, out_factor, in_factor = _whole_input(weight, metric, searched)
    else:
        core, out_factor, in_factor = _search(weight, metric, searched, r_in, start, iterations, tolerance)
    if r_out == outputs:
        out_factor = torch.eye(outputs).to(core).expand(groups, -1, -1)
    if r_in == inputs:
        in_factor = torch.eye(inputs).to(core).expand(groups, -1, -1)
    return TuckerFactors(core.unflatten(-1, spatial or (1,)).reshape(*core.shape[:3], *spatial), out_factor, in_factor)


@torch.no_grad()
def weighted_tucker2_errors(weight: Tensor, metric: Metric, in_ranks: Sequence[int]) -> Tensor:
    """Return the error under the metric at many rank pairs, summed over the groups.

    These are the errors of the best core and output factor for the input factor that :func:`weighted_tucker2` starts
    from; its steps lower them by a few percent. At r_in = I they are exact.

    Args:
        weight: Shape (out_channels, in_channels / groups, *spatial).
        metric: What the errors measure.
        in_ranks: Ranks of the input mode, from 1 to I, in ascending order.

    Returns:
        Shape (O, len(in_ranks)), float64: row a - 1 holds the errors at r_out = a.
    """
    explained = _explained(weight, metric)  # (g, i, n, m, o)
    missed = _tails(explained.square().sum((2, 3, 4)))
    N = explained.new_zeros(metric.groups, explained.shape[4], explained.shape[4])
    columns, done = [], 0
    for rank in in_ranks:
        rows = explained[:, done:rank].flatten(1, 3)
        N += rows.mT @ rows
        done = rank
        truncated = _tails(torch.linalg.eigvalsh(N).clamp(min=0).flip(1))
        columns.append((truncated + missed[:, rank - 1 : rank]).sum(0))
    return torch.stack(columns, dim=1)


@torch.no_grad()
def weighted_tucker1_errors(weight: Tensor, metric: Metric) -> Tensor:
    """Return the error under the metric at every rank of the input mode, the output mode left whole.

    As :func:`weighted_tucker2_errors`, these are of the start.

    Returns:
        Shape (I,), float64.
    """
    return _tails(_explained(weight, metric).square().sum((0, 2, 3, 4)))


def _explained(weight: Tensor, metric: Metric) -> Tensor:
    """Return what each direction of the start adds to the outputs that are explained, (groups, i, n, m, o).

    The start's directions are ordered, so one Cholesky decomposition serves the regressions of all ranks: N at rank r
    is the Gram matrix of the first r.
    """
    regression = _Regression(weight, metric, None)
    factor = regression.start(weight.shape[1])
    Z, Y = regression.products(factor, regression.image(factor))
    shape = (-1, weight.shape[1])
    Z = Z.unflatten(3, shape).unflatten(2, shape).permute(0, 1, 3, 2, 5, 4).flatten(4).flatten(2, 3)
    Y = Y.unflatten(3, shape).transpose(3, 4).flatten(3)
    explained = torch.linalg.solve_triangular(torch.linalg.cholesky(Z), Y.mT, upper=False)
    return explained.unflatten(2, shape[::-1]).transpose(1, 2)


def _tails(values: Tensor) -> Tensor:
    """Return, for each entry, the sum of all behind it along the last dim."""
    sums = values.flip(-1).cumsum(-1).flip(-1)
    return torch.nn.functional.pad(sums[..., 1:], (0, 1))


def _whole_input(weight: Tensor, metric: Metric, r_out: int | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return core (groups, a, i, taps) and factors where no channel of the input is merged with others."""
    if r_out is None:
        return metric.unfold(weight).unflatten(2, (weight.shape[1], -1)), None, None
    left, right = weighted_svd(weight, metric, r_out)
    Q, R = torch.linalg.qr(left)
    signs = column_signs(Q)[..., None, :]
    return ((signs.mT * R) @ right).unflatten(2, (weight.shape[1], -1)), Q * signs, None


def _search(
    weight: Tensor,
    metric: Metric,
    r_out: int | None,
    r_in: int,
    start: Tensor | None,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return core (groups, a, b, taps) and orthonormal factors with a small error under the metric."""
    regression = _Regression(weight, metric, r_out)
    point = regression.at(regression.start(r_in))
    if start is not None:
        point = _better(point, regression.at(torch.linalg.qr(start.to(metric.mean)).Q))
    point = _lower(regression, point, iterations, tolerance)
    V, R = torch.linalg.qr(point.factor)
    core = point.core.unflatten(3, (-1, r_in)).permute(0, 2, 4, 1, 3).flatten(3)  # (g, a, b, taps)
    core = torch.einsum("gabt,gcb->gact", core, R)
    signs = column_signs(V)
    core, V = core * signs[:, None, :, None], V * signs[:, None]
    inverse = regression.roots.inverse
    if point.basis is None:
        return torch.einsum("gxo,gobt->gxbt", inverse.expand(len(core), -1, -1), core), None, V
    U, R = torch.linalg.qr(inverse @ point.basis)
    signs = column_signs(U)
    return torch.einsum("gca,gabt->gcbt", signs[..., None] * R, core), U * signs[:, None], V


class _Point(NamedTuple):
    """An input factor and what is best for it, in coordinates in which H is the identity.

    Attributes:
        factor: V, shape (groups, i, b).
        image: C P, transposed, shape (groups, n, m b, m, i); linear in V.
        basis: U, shape (groups, o, a); None for the identity.
        core: Shape (groups, n, a or o, m b).
        error: Shape (groups,).
    """

    factor: Tensor
    image: Tensor
    basis: Tensor | None
    core: Tensor
    error: Tensor


class _Regression:
    """Regression of the outputs on patches whose channels are reduced by an input factor.

    The kernel's positions fall into n blocks of m that the covariance does not couple: one block, or as many as there
    are positions where only the diagonal is known.
    """

    def __init__(self, weight: Tensor, metric: Metric, r_out: int | None) -> None:
        channels = weight.shape[1]
        self.r_out = r_out
        self.covariance = _covariance_blocks(metric, channels)  # (g, n, m, i, m, i)
        self.roots = output_roots(metric, weight.shape[0] // metric.groups)
        W = (self.roots.root @ metric.unfold(weight)).unflatten(2, (channels, -1, self.covariance.shape[2]))
        self.weight = W.permute(0, 3, 1, 4, 2).contiguous()  # (g, n, o, m, i)
        matrices = self.covariance.flatten(4, 5).flatten(2, 3)
        self.moments = (self.weight.flatten(3) @ matrices).view_as(self.weight)  # W C
        self.total = (self.weight * self.moments).sum((1, 2, 3, 4))
        self.channels = self.covariance.diagonal(dim1=2, dim2=4).mean((1, 4))  # (g, i, i)
        positions = self.covariance.diagonal(dim1=3, dim2=5).mean(-1)  # (g, n, m, m)
        self.positions = positions / positions.diagonal(dim1=2, dim2=3).mean((1, 2))[:, None, None, None]
        self._channels_factor = torch.linalg.cholesky(self.channels)

    def start(self, rank: int) -> Tensor:
        """Return the input factor of the weighted kernel's HOSVD, orthonormal and ordered, shape (groups, i, rank)."""
        roots = square_root(self.channels, _FLOOR)
        spread = self.positions[:, :, None] @ self.weight
        gram = roots.root @ (self.weight.flatten(1, 3).mT @ spread.flatten(1, 3)) @ roots.root
        return torch.linalg.qr(roots.inverse @ leading_eigenvectors(gram, rank)).Q

    def image(self, factor: Tensor) -> Tensor:
        """Return (C P)^T, shape (groups, n, m b, m, i)."""
        groups, blocks, taps, channels = self.covariance.shape[:4]
        product = factor.mT[:, None, None] @ self.covariance.flatten(4)
        return product.view(groups, blocks, -1, taps, channels)

    def products(self, factor: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return P^T C P and W C P, shapes (groups, n, m b, m b) and (groups, n, o, m b)."""
        Z = _contract(image, factor)
        return (Z + Z.mT) / 2, _contract(self.moments, factor)

    def at(self, factor: Tensor, image: Tensor | None = None) -> _Point:
        """Return the best core and output factor for an input factor, and their error."""
        image = self.image(factor) if image is None else image
        Z, Y = self.products(factor, image)
        L = torch.linalg.cholesky(Z)
        explained = torch.linalg.solve_triangular(L, Y.mT, upper=False)
        basis = None
        if self.r_out is not None:
            basis = leading_eigenvectors((explained.mT @ explained).sum(1), self.r_out)
            explained = explained @ basis[:, None]
        core = torch.linalg.solve_triangular(L.mT, explained, upper=True).mT
        return _Point(factor, image, basis, core, self.total - explained.square().sum((1, 2, 3)))

    def gradient(self, point: _Point) -> tuple[Tensor, Tensor]:
        """Return half the gradient of the error in V, (groups, i, b), and the core's Gram matrices Q."""
        Q = point.core.mT @ point.core
        moments = self.moments if point.basis is None else _project(point.basis, self.moments)
        return self.curve(point.image, Q) - _join(moments, point.core), Q

    def curve(self, image: Tensor, Q: Tensor) -> Tensor:
        """Return half the second derivative of the error, core and output factor fixed, applied to the image's V."""
        return _join(image, Q)

    def preconditioner(self, Q: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the inverse of :meth:`curve` as if the covariance were one of channels x one of positions."""
        taps = self.positions.shape[2]
        Q = Q.unflatten(3, (taps, -1)).unflatten(2, (taps, -1))
        between = torch.einsum("gnmbsc,gnms->gbc", Q, self.positions)
        between = between + torch.diag_embed(ridge(between.diagonal(dim1=1, dim2=2)).expand(-1, between.shape[1]))
        L = torch.linalg.cholesky((between + between.mT) / 2)

        def solve(gradient: Tensor) -> Tensor:
            return torch.cholesky_solve(torch.cholesky_solve(gradient, self._channels_factor).mT, L).mT

        return solve


def _covariance_blocks(metric: Metric, channels: int) -> Tensor:
    """Return the covariance with a ridge, positions before channels, shape (groups, n, m, i, m, i)."""
    if metric.is_diagonal:
        diagonal = metric.covariance + ridge(metric.covariance)
        blocks = torch.diag_embed(diagonal.unflatten(1, (channels, -1)).mT)
        return blocks[:, :, None, :, None]
    blocks = metric.covariance.unflatten(2, (channels, -1)).unflatten(1, (channels, -1)).permute(0, 2, 1, 4, 3)
    blocks = blocks.clone(memory_format=torch.contiguous_format)
    diagonal = blocks.flatten(3).flatten(1, 2).diagonal(dim1=1, dim2=2)
    diagonal += ridge(diagonal)
    return blocks[:, None]


def _contract(tensor: Tensor, factor: Tensor) -> Tensor:
    """Return (groups, n, x, m, i) times V along i, shape (groups, n, x, m b)."""
    return (tensor.flatten(1, 3) @ factor).view(*tensor.shape[:3], -1)


def _join(tensor: Tensor, core: Tensor) -> Tensor:
    """Return the sum of (groups, n, x, m, i) times (groups, n, x, m b) over all but i and b, shape (groups, i, b)."""
    return tensor.flatten(1, 3).mT @ core.unflatten(3, (tensor.shape[3], -1)).flatten(1, 3)


def _project(basis: Tensor, tensor: Tensor) -> Tensor:
    """Return U^T times (groups, n, o, m, i), shape (groups, n, a, m, i)."""
    return (basis.mT[:, None] @ tensor.flatten(3)).unflatten(3, tensor.shape[3:])


def _better(first: _Point, second: _Point) -> _Point:
    """Return the point of less error, group by group."""
    chosen = second.error < first.error

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(chosen.view(-1, *[1] * (a.dim() - 1)), b, a)

    basis = None if first.basis is None or second.basis is None else pick(first.basis, second.basis)
    return _Point(
        pick(first.factor, second.factor),
        pick(first.image, second.image),
        basis,
        pick(first.core, second.core),
        pick(first.error, second.error),
    )


def _lower(regression: _Regression, point: _Point, iterations: int, tolerance: float) -> _Point:
    """Lower the error by preconditioned L-BFGS steps in V, in all groups at once; no step raises it."""
    memory: list[tuple[Tensor, Tensor, Tensor]] = []
    gradient, Q = regression.gradient(point)
    for _ in range(iterations):
        step = _direction(gradient, memory, regression.preconditioner(Q))
        image = regression.image(step)
        curvature = _dot(step, regression.curve(image, Q))
        # The minimum along the step for this very core, which a better core can only lower: the safe length.
        length = torch.where(curvature > 0, -_dot(step, gradient) / curvature, 0.0)
        before = point
        point = _along(regression, before, step, image, length.clamp(min=1) if memory else length)
        if bool((point.error > before.error).any()):
            point = _better(before, _along(regression, before, step, image, length))
        if float((before.error - point.error).sum()) <= tolerance * float(point.error.sum()):
            break
        last, (gradient, Q) = gradient, regression.gradient(point)
        moved, change = point.factor - before.factor, gradient - last
        product = _dot(moved, change)
        memory.append((moved, change, torch.where(product > 0, 1 / product, 0.0)))
        memory = memory[-_MEMORY:]
    return point


def _along(regression: _Regression, point: _Point, step: Tensor, image: Tensor, length: Tensor) -> _Point:
    return regression.at(point.factor + length * step, point.image + length[..., None, None] * image)


def _direction(
    gradient: Tensor, memory: list[tuple[Tensor, Tensor, Tensor]], precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the L-BFGS step (Nocedal 1980) from the moves, changes of gradient and 1 / their products so far."""
    step, weights = -gradient, []
    for moved, change, inverse in reversed(memory):
        weights.append(inverse * _dot(moved, step))
        step = step - weights[-1] * change
    step = precondition(step)
    if memory:
        _, change, inverse = memory[-1]
        scale = inverse * _dot(change, precondition(change))
        step = step * torch.where(scale > 0, 1 / scale, 1.0)
    for (moved, change, inverse), weight in zip(memory, reversed(weights), strict=True):
        step = step + (weight - inverse * _dot(change, step)) * moved
    return step


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Return the inner products of matrices, shape (groups, 1, 1)."""
    return (first * second).sum((1, 2), keepdim=True)
