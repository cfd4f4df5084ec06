"""CP decomposition under a metric, by variable projection."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowrank_nn.decompose._cp_objective import CPObjective, CPState
from lowrank_nn.decompose._khatri_rao import balance
from lowrank_nn.decompose._lbfgs import Curvature, descend
from lowrank_nn.decompose.cp import cp, cp_full_rank, cp_tensor
from lowrank_nn.decompose.metric import Metric
from lowrank_nn.decompose.weighted_svd import weighted_svd

# The penalty on terms that cancel one another: its weight, at which it about equals what rounding the factors to six
# bits adds to the error, and the share of the error that it may reach.
_PENALTY = 1e-3
_PENALTY_SHARE = 0.05
_SEGMENT = 10  # iterations between two adjustments of the penalty
# Below this relative error float32 products no longer tell a better point from a worse one.
_FLOAT32_LIMIT = 1e-5
# Multiply-accumulates that a fit may cost, unless that leaves it fewer iterations than the least; the same for tables.
_WORK, _FEWEST = 1.5e11, 15
_TABLE_WORK, _TABLE_FEWEST, _TABLE_MOST = 1e10, 1, 20


@torch.no_grad()
def weighted_cp(
    weight: Tensor,
    metric: Metric,
    rank: int,
    *,
    start: Sequence[Tensor] | None = None,
    iterations: int = 50,
    epc: bool = True,
) -> list[Tensor]:
    r"""Decompose a kernel into rank-one terms whose error under a metric is small.

    .. math:: e = \operatorname{tr}(H \Delta C \Delta^T), \quad
        \Delta_{o, i k} = \sum_{r=1}^{R} E_{o r} R_{i r} S_{k r} - W_{o, i k}

    With Z the Khatri-Rao product of all factors but the first, the best first one is E = W C Z (Z^T C Z)^-1. What
    remains is a function of Z alone (variable projection, Golub and Pereyra 1973), which L-BFGS lowers from the
    largest rank-one terms over the slices of the weighted kernel; its steps are preconditioned by the normal equations
    of alternating least squares. At a rank that holds every kernel (:func:`cp_full_rank`) it is the closed form.

    With ``epc``, the errors that the terms would make one by one are added up as a penalty, of a weight at which it is
    at most 5 % of the error (and at most 1e-3). Without it terms grow against one another at next to no gain, after
    which rounding the factors destroys the layer (Phan et al. 2020). A kernel of one position is a matrix, and the
    result that of :func:`lowrank_nn.decompose.weighted_svd`.

    Args:
        weight: Shape (out_channels, in_channels / groups, ...): (O, I, kh * kw) or (O, I, kh, kw).
        metric: What is to be small of the weight's change.
        rank: Number of terms per group, at least 1.
        start: Factors (groups, n_k, rank) to start from, the first of which is found anew. The result is never of more
            error than these.
        iterations: Largest number of steps; very large kernels get fewer.
        epc: Whether to add the penalty.

    Returns:
        Factors (groups, n_k, rank), float64, columns of equal norm across modes.
    """
    tensors = weight.reshape(metric.groups, -1, *weight.shape[1:])
    if weight.is_meta:
        return [weight.new_empty((metric.groups, size, rank), dtype=torch.float64) for size in tensors.shape[1:]]
    if tensors[0, 0, 0].numel() == 1 and rank < cp_full_rank(tensors.shape[1:]):
        pairs = zip(*weighted_svd(weight, metric, rank), strict=True)
        taps = [weight.new_ones((1, rank), dtype=torch.float64)] * (tensors.dim() - 3)
        parts = [balance([left, right.T, *taps]) for left, right in pairs]
        return [torch.stack(factor) for factor in zip(*parts, strict=True)]
    steps = _affordable(tensors, rank, iterations, _WORK, _FEWEST)
    parts = []
    for group, objective in enumerate(_objectives(tensors, metric)):
        if start is not None:
            parts.append(_refitted(objective, [factor[group].double() for factor in start], steps, epc))
        elif rank >= cp_full_rank(objective.tensor.shape) or objective.sees_nothing:
            parts.append(cp(objective.tensor, rank, epc=epc))
        else:
            parts.append(_fitted(objective, objective.first_point(rank), steps, epc))
    return [torch.stack(factor) for factor in zip(*parts, strict=True)]


@torch.no_grad()
def weighted_cp_errors(weight: Tensor, metric: Metric, ranks: Sequence[int]) -> list[float]:
    """Return the errors of short fits at several ranks; those of :func:`weighted_cp` are somewhat lower.

    Each fit starts from the last one, with the largest terms added over the slices of what it leaves.

    Args:
        weight: Shape (out_channels, in_channels / groups, ...).
        metric: What the errors measure.
        ranks: Numbers of terms per group, rising.
    """
    tensors = weight.reshape(metric.groups, -1, *weight.shape[1:])
    errors = [0.0 for _ in ranks]
    for objective in _objectives(tensors, metric):
        state = None
        for index, rank in enumerate(ranks if not objective.sees_nothing else ()):
            point = objective.first_point(rank) if state is None else objective.grown(state, rank)
            steps = _affordable(tensors, rank, _TABLE_MOST, _TABLE_WORK, _TABLE_FEWEST)
            state = _minimised(objective, point, steps, epc=True, widen=False)
            errors[index] += state.error * objective.size
    return errors


def _fitted(objective: CPObjective, point: Tensor, iterations: int, epc: bool) -> list[Tensor]:
    state = _minimised(objective, point, iterations, epc=epc, widen=True)
    return state.objective.factors(state)


def _refitted(objective: CPObjective, start: list[Tensor], iterations: int, epc: bool) -> list[Tensor]:
    """Return factors fitted from a start, or the start where it is better."""
    if objective.sees_nothing:
        return start
    factors = _fitted(objective, objective.point(start), iterations, epc)
    errors = [objective.error((cp_tensor(these) - objective.tensor).flatten(1)) for these in (factors, start)]
    return factors if errors[0] <= errors[1] else start


def _minimised(objective: CPObjective, point: Tensor, iterations: int, *, epc: bool, widen: bool) -> CPState:
    """Descend from a point; the penalty follows the error down, and products may become float64 where float32 fails."""
    curvature = Curvature()
    state, alive = objective.evaluate(point), True
    for first in range(0, iterations, _SEGMENT):
        if epc:
            share = _PENALTY_SHARE * state.error / state.penalty if state.penalty > 0 else 0.0
            wanted = min(_PENALTY, share)
            alive = alive or wanted < 0.9 * state.weight
            state = objective.reweighted(state, wanted)
        if not alive:
            break
        state, alive = descend(state, objective.evaluate, curvature, min(_SEGMENT, iterations - first))
        if widen and objective.dtype == torch.float32 and (state.error < _FLOAT32_LIMIT or not alive):
            objective, alive = objective.widened(), True
            state = objective.evaluate(state.point)
    return state


def _objectives(tensors: Tensor, metric: Metric) -> Iterator[CPObjective]:
    """Yield the function to minimise of each group."""
    dtype = torch.float64 if tensors.dtype == torch.float64 else torch.float32
    curvatures = [None] * metric.groups if metric.curvature is None else list(metric.curvature)
    for tensor, covariance, curvature in zip(tensors.to(metric.mean), metric.covariance, curvatures, strict=True):
        yield CPObjective(tensor, covariance, curvature, dtype)


def _affordable(tensors: Tensor, rank: int, most: int, work: float, fewest: int) -> int:
    """Return how many iterations keep to the amount of work: at least ``fewest``, at most ``most``."""
    groups, outputs, patch = tensors.shape[0], tensors.shape[1], math.prod(tensors.shape[2:])
    each = groups * patch * rank * (patch + 2 * rank + 2 * outputs)
    return min(most, max(fewest, int(work / each)))
