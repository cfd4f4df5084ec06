"""Second-order refinement of any low-rank layer under a metric."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from lowrank_nn.decompose import Metric
from lowrank_nn.layers._base import CompressedLayer


def refine_(layer: CompressedLayer, weight: Tensor, metric: Metric, *, iterations: int = 60) -> None:
    """Lower the metric's error of a low-rank layer's dense weight by L-BFGS over all its factors.

    Works for every layer with a differentiable ``dense_weight()``; never ends above where it started.

    Args:
        layer: A low-rank layer with factors to start from; changed in place.
        weight: The weight it is to come near, of shape ``weight_shape``.
        metric: What is to be small of the difference.
        iterations: Largest number of iterations.
    """
    if weight.is_meta:
        return
    factors = [p for name, p in layer.named_parameters() if not name.endswith("bias")]
    wide = copy.deepcopy(layer).double()
    variables = [p.requires_grad_() for name, p in wide.named_parameters() if not name.endswith("bias")]
    start = metric.error(weight - layer.dense_weight())
    scale = max(metric.error(weight), torch.finfo(torch.float64).tiny)
    optimizer = torch.optim.LBFGS(variables, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")
    target = metric.unfold(weight)

    def closure() -> Tensor:
        optimizer.zero_grad()
        delta = wide.dense_weight().reshape(target.shape) - target
        curved = delta if metric.curvature is None else metric.curvature @ delta
        loss = (curved * metric.times_covariance(delta)).sum() / scale
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    if metric.error(weight.double() - wide.dense_weight()) < start:
        with torch.no_grad():
            for factor, variable in zip(factors, variables, strict=True):
                factor.copy_(variable)
