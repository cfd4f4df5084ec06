"""Tucker-2 under a metric: reduced-rank regression on the patches that an input factor leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lowrank_nn.decompose._gram import column_signs
from lowrank_nn.decompose._lbfgs import Curvature, descend
from lowrank_nn.decompose._regression import Point, Regression, regressions
from lowrank_nn.decompose.metric import Metric
from lowrank_nn.decompose.tucker import TuckerFactors
from lowrank_nn.decompose.weighted_svd import balanced, is_seen, weighted_svd

_ITERATIONS, _TOLERANCE = 12, 1e-3
_TABLE_ITERATIONS = 5  # leave an error within 1 % of that of a whole fit


@torch.no_grad()
def weighted_tucker2(
    weight: Tensor,
    metric: Metric,
    rank: tuple[int | None, int | None],
    *,
    start: Tensor | None = None,
    iterations: int = _ITERATIONS,
    tolerance: float = _TOLERANCE,
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
    elif searched is None and r_in == outputs * weight[0, 0].numel():
        core, out_factor, in_factor = _all_inputs_read(weight, metric)
    else:
        core, out_factor, in_factor = _search(weight, metric, searched, r_in, start, iterations, tolerance)
    if r_out == outputs:
        out_factor = torch.eye(outputs, dtype=core.dtype, device=core.device).expand(groups, -1, -1)
    if r_in == inputs:
        in_factor = torch.eye(inputs, dtype=core.dtype, device=core.device).expand(groups, -1, -1)
    return TuckerFactors(core.reshape(*core.shape[:3], *spatial), out_factor, in_factor)


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
    _, explained = _explained(weight, metric)  # (g, i, n, m, o)
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
def weighted_tucker1(weight: Tensor, metric: Metric, start: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose a kernel along its input mode under a metric: :func:`weighted_tucker2` of two factors, balanced.

    Args:
        weight: Shape (out_channels, in_channels / groups, *spatial).
        metric: What is to be small of the weight's change.
        start: The input factor (groups, I, r) that the result shall not be worse than, whatever goes with it.

    Returns:
        Factors (groups, I, r) and (groups, r, O * taps) of the matrices of inputs by outputs and positions, as a
        truncated SVD would share out the norm; float64.
    """
    core, _, in_factor = weighted_tucker2(weight, metric, (None, start.shape[-1]), start=start)
    assert in_factor is not None
    return balanced(in_factor, core.transpose(1, 2).flatten(2))


@torch.no_grad()
def weighted_tucker1_errors(weight: Tensor, metric: Metric, fitted: Sequence[int] = ()) -> Tensor:
    """Return the error under the metric at every rank of the input mode, the output mode left whole.

    As :func:`weighted_tucker2_errors`, these are of the start; with ranks to be ``fitted``, they are lowered by the
    shares by which a few steps of :func:`weighted_tucker2` lower them there, interpolated over the logarithm of the
    rank.

    Args:
        weight: Shape (out_channels, in_channels / groups, *spatial).
        metric: What the errors measure.
        fitted: Ranks from 1 to I, in ascending order.

    Returns:
        Shape (I,), float64.
    """
    regression, explained = _explained(weight, metric)
    errors = _tails(explained.square().sum((0, 2, 3, 4)))
    if not fitted:
        return errors
    shares = np.interp(
        np.log(np.arange(1, len(errors) + 1)), np.log(fitted), [_share_left(regression, rank) for rank in fitted]
    )
    return errors * torch.from_numpy(shares).to(errors)


def _share_left(regression: Regression, rank: int) -> float:
    """Return what a few steps at a rank leave of the start's error, the output mode left whole."""
    start = Point(regression, regression.start(rank))
    return _lowered(start, _TABLE_ITERATIONS, _TOLERANCE).value / start.value if 0 < start.value < math.inf else 1.0


def _explained(weight: Tensor, metric: Metric) -> tuple[Regression, Tensor]:
    """Return the regression, and what each direction of the start adds to what is explained, (groups, i, n, m, o).

    The start's directions are ordered, so one Cholesky decomposition serves the regressions of all ranks: N at rank r
    is the Gram matrix of the first r.
    """
    for regression in regressions(weight, metric, None):
        factor = regression.start(weight.shape[1])
        Z, Y = regression.products(factor, regression.image(factor))
        groups, blocks, taps, channels = regression.covariance.shape[:4]
        # Channels before positions: rank r takes the first r m rows.
        order = torch.arange(taps * channels, device=Z.device).view(taps, channels).T.flatten()
        L, failed = torch.linalg.cholesky_ex(Z[:, :, order[:, None], order])
        if not bool(failed.any()):
            break
    explained: Tensor = torch.linalg.solve_triangular(L, Y[..., order].mT, upper=False)
    explained = explained * is_seen(metric)[:, None, None, None]
    return regression, explained.view(groups, blocks, channels, taps, -1).transpose(1, 2)


def _tails(values: Tensor) -> Tensor:
    """Return, for each entry, the sum of all behind it along the last dim."""
    sums = values.flip(-1).cumsum(-1).flip(-1)
    return torch.nn.functional.pad(sums[..., 1:], (0, 1))


def _whole_input(weight: Tensor, metric: Metric, r_out: int | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return core (groups, a, i, taps) and factors where no channel of the input is merged with others."""
    taps = weight[0, 0].numel()
    if r_out is None:
        return metric.unfold(weight).clone().reshape(metric.groups, -1, weight.shape[1], taps), None, None
    left, right = weighted_svd(weight, metric, r_out)
    Q, R = torch.linalg.qr(left)
    signs = column_signs(Q)[..., None, :]
    core = (signs.mT * R) @ right
    return core.view(metric.groups, -1, weight.shape[1], taps), Q * signs, None


def _all_inputs_read(weight: Tensor, metric: Metric) -> tuple[Tensor, None, Tensor]:
    """Return core (groups, o, b, taps) and input factor that lose nothing: a basis of what the kernel reads."""
    groups, taps = metric.groups, weight[0, 0].numel()
    kernels = metric.unfold(weight).reshape(groups, -1, weight.shape[1], taps)
    V, R = torch.linalg.qr(kernels.transpose(1, 2).flatten(2))
    signs = column_signs(V)
    core = (signs[..., None] * R).reshape(groups, R.shape[1], -1, taps).transpose(1, 2)
    return core, None, V * signs[:, None]


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
    for regression in regressions(weight, metric, r_out):
        points = [Point(regression, regression.start(r_in))]
        if start is not None:
            points.append(Point(regression, torch.linalg.qr(start.to(metric.mean)).Q))
        best = min(points, key=lambda point: point.value)
        if best.value < math.inf:
            break
    del points
    return _orthonormal(_lowered(best, iterations, tolerance), regression.roots.inverse)


def _lowered(start: Point, iterations: int, tolerance: float) -> Point:
    """Return the point after steps from a start."""

    def at(flat: Tensor) -> Point:
        return Point(start.regression, flat.view_as(start.factor))

    found, _ = descend(start, at, Curvature(), iterations, tolerance)
    return found


def _orthonormal(point: Point, inverse: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return core (groups, a, b, taps) and factors with orthonormal columns, given H^{-1/2}."""
    groups, _, r_in = point.factor.shape
    V, R = torch.linalg.qr(point.factor)
    signs = column_signs(V)
    core = point.core.view(*point.core.shape[:3], -1, r_in)  # (g, n, a, m, b)
    core = torch.einsum("gnamb,gcb->gacnm", core, signs[..., None] * R).flatten(3)
    V = V * signs[:, None]
    if point.basis is None:
        return (inverse @ core.flatten(2)).view(groups, -1, *core.shape[2:]), None, V
    U, R = torch.linalg.qr(inverse @ point.basis)
    signs = column_signs(U)
    return ((signs[..., None] * R) @ core.flatten(2)).view_as(core), U * signs[:, None], V
