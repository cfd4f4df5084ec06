"""Second-order refinement of any low-rank layer under a metric."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lowrank_nn.decompose import Metric
from lowrank_nn.layers._base import CompressedLayer


def refine_(layer: CompressedLayer, weight: Tensor, metric: Metric, *, iterations: int = 60) -> None:
    """Lower the metric's error of a low-rank layer's dense weight by L-BFGS over all its factors.

    Works for every layer with a differentiable ``dense_weight()``, in float64 whatever the layer's dtype; never ends
    above where it started. Formats with a structure to use have faster ways.

    Args:
        layer: A low-rank layer with factors to start from; changed in place. Parameters that are fixed
            (``requires_grad=False``) stay as they are, unless the whole layer is frozen; flags are kept.
        weight: The weight it is to come near, of shape ``weight_shape``.
        metric: What is to be small of the difference.
        iterations: Largest number of iterations.
    """
    factors = _factors(layer)
    if weight.is_meta or not factors:
        return
    start = stored_error(layer, weight, metric)
    if not start > 0:
        return
    wide = copy.deepcopy(layer).to(metric.mean)  # float64, on the metric's device
    variables = [variable.requires_grad_() for variable in _factors(wide)]
    _minimise(wide, variables, metric.unfold(weight), metric, start, iterations)
    before = [factor.detach().clone() for factor in factors]
    _copy(variables, factors)
    if not stored_error(layer, weight, metric) < start:  # also where an iterate is not finite
        _copy(before, factors)


def _minimise(
    wide: CompressedLayer, variables: list[Tensor], target: Tensor, metric: Metric, start: float, iterations: int
) -> None:
    optimizer = torch.optim.LBFGS(variables, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        delta = wide.dense_weight().reshape(target.shape) - target
        curved = delta if metric.curvature is None else metric.curvature @ delta
        loss = (curved * metric.times_covariance(delta)).sum() / start
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]


def _factors(layer: CompressedLayer) -> list[nn.Parameter]:
    """Return the parameters to vary: all but the bias, and but those that are fixed in a layer that is not frozen."""
    candidates = [parameter for parameter in layer.parameters() if parameter is not layer.bias]
    trained = [parameter for parameter in candidates if parameter.requires_grad]
    return trained or candidates


@torch.no_grad()
def stored_error(layer: CompressedLayer, weight: Tensor, metric: Metric) -> float:
    """Return the error of the layer's factors as they are stored, their product computed in float64."""
    wide = copy.deepcopy(layer).to(metric.mean)
    return metric.error(wide.dense_weight() - weight.to(metric.mean))


@torch.no_grad()
def _copy(values: list[Tensor], into: list[nn.Parameter]) -> None:
    for value, parameter in zip(values, into, strict=True):
        parameter.copy_(value)
