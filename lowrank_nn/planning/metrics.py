"""The metrics of layers, from one pass over calibration data."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from lowrank_nn.decompose import Metric
from lowrank_nn.errors import PlanError
from lowrank_nn.graph.preserve import evaluating
from lowrank_nn.layers import CompressedLayer
from lowrank_nn.planning.calibration import layers_at, run_batches, watch
from lowrank_nn.planning.curvature import CurvatureProbes
from lowrank_nn.planning.moments import LayerMoments

CURVATURE_IMAGES = 1000

_logger = logging.getLogger(__name__)


def collect_metrics(
    model: nn.Module,
    batches: Iterable[Any],
    paths: Iterable[str],
    *,
    curvature: bool = True,
    max_features: int = 5000,
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Metric]:
    r"""Run ``model`` on calibration data and return what a change of each layer's weight would do to its output.

    The metric of a layer estimates the expected squared change of the network's output, summed over its elements,
    per image:

    .. math:: E \Big\| P \sum_s J_s \Delta (u_s - \mu) \Big\|^2 \approx \operatorname{tr}(H \Delta C \Delta^T), \quad
              C = E (u_s - \mu)(u_s - \mu)^T

    with u_s the input patch at position s, J_s the derivative of the network's output in the layer's output there,
    and P the removal of the mean where the output is a matrix of logits (n, k): a shift of all logits counts as no
    change. For a layer with one position and a linear network behind it, H = J^T P J and both sides are equal. In
    general they are to first order in Delta, and on average over changes (:class:`CurvatureProbes`).

    One pass in eval mode. Every call of a layer counts. C is taken over all positions of small maps and over at most
    128 per image of large ones, drawn at random (:mod:`lowrank_nn.planning.patches`); H, which costs a forward and a
    backward more, over all positions of the batches up to the 1000th image. To be invertible in spite of inputs that
    never change, C gets 1e-5 of its mean diagonal entry added to its diagonal, H 1e-4. Products are computed in float32
    (float64 for models in float64) and added up in float64.

    Memory does not grow with the number of images: for each layer 8 bytes per entry of C (p x p per group, p =
    in_channels / groups * kh * kw) and 16 per entry of H (o x o per group, o = out_channels / groups), twice the
    largest of these, less than 200 MB of patches, and twice the activations and gradients of one batch.

    The model and the process are left as they were, also after an error.

    Args:
        model: The model.
        batches: What it is called with, batch by batch, samples along the first dim; see
            :func:`lowrank_nn.planning.calibration.model_inputs`. A single tensor or dict is one batch.
        paths: Dotted paths of the layers, each an ``nn.Conv2d`` or ``nn.Linear``, or a compressed layer in the place of
            one; "" for the model itself.
        curvature: Whether to estimate H.
        max_features: Largest p and o with a matrix. Where p is above, only C's diagonal is kept, and the covariance of
            the layer's outputs (o x o per group) where o is not; where o is above, there is no H.
        max_batches: Batches to take; None for all.
        seed: Seed of the positions and probes. The global random state plays no part.
        progress: Whether to show a progress bar (never when the output is not a terminal).

    Returns:
        The metric by path, on the device of the layer's inputs. A layer that was never called is left out. Where no
        gradient reaches a layer (no_grad or detach behind it, an operation without derivative), it has no curvature;
        this is logged.

    Raises:
        CalibrationError: There are no batches, an input of a layer is not finite, or the forward failed on a batch.
        PlanError: There is no layer at a path, or it is none of these.
    """
    layers = layers_at(model, paths)
    first_paths = {layer: path for path, layer in reversed(layers.items())}
    moments = {layer: LayerMoments(_dense(layer, path), max_features, seed) for layer, path in first_paths.items()}
    with evaluating(model):
        probes = CurvatureProbes(model, moments if curvature else {}, max_features, seed)
        for layer, path in first_paths.items():
            watch(layer, path, after=moments[layer].add)
        for inputs in run_batches(model, batches, max_batches=max_batches, progress=progress):
            if curvature and probes.images < CURVATURE_IMAGES:
                probes.probe(inputs)
    metrics = {layer: seen.metric(probes.curvature(layer)) for layer, seen in moments.items() if seen.called}
    missing = [first_paths[layer] for layer, metric in metrics.items() if metric.curvature is None]
    if curvature and missing:
        _logger.info("no curvature of %s: a change of their own outputs counts as it is.", ", ".join(missing))
    return {path: metrics[layer] for path, layer in layers.items() if layer in metrics}


def _dense(layer: nn.Module, path: str) -> nn.Conv2d | nn.Linear:
    """Return the layer itself, or the dense one that a compressed layer acts as."""
    dense = layer.to_dense_layer() if isinstance(layer, CompressedLayer) else layer
    if not isinstance(dense, (nn.Conv2d, nn.Linear)):
        raise PlanError(
            f"calibration: expected an nn.Conv2d or nn.Linear, got {type(layer).__name__}. Leave it out of paths.",
            path=path,
        )
    return dense
