"""Second moments of the inputs of layers, and the metrics made of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.decompose import Metric
from lowrank_nn.errors import PlanError
from lowrank_nn.graph.preserve import evaluating
from lowrank_nn.layers._observers import value_range
from lowrank_nn.planning.calibration import layers_at, run_batches, watch
from lowrank_nn.planning.curvature import CurvatureProbes
from lowrank_nn.planning.patches import PatchSampler

CURVATURE_IMAGES = 1000
COVARIANCE_RIDGE = 1e-5
CURVATURE_RIDGE = 1e-4

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
              H = E \sum_s J_s^T P J_s, \quad C = E (u_s - \mu)(u_s - \mu)^T

    with u_s the input patch at position s, J_s the derivative of the network's output in the layer's output there,
    and P the removal of the mean where the output is a matrix of logits (n, k): a shift of all logits counts as no
    change. It is exact for a network that is linear behind a layer with one position, and in general holds to first
    order in Delta, as far as J and u are independent, patches at different positions are uncorrelated and all
    positions have the same mean and covariance.

    One pass in eval mode. Every call of a layer counts. C is taken over all positions of small maps and over at most
    128 per image of large ones, drawn at random (:class:`PatchSampler`); H, which costs a forward and a backward more,
    over all positions of the batches up to the 1000th image (:class:`CurvatureProbes`). To be invertible in spite of
    inputs that never change, C gets 1e-5 of its mean diagonal entry added to its diagonal, H 1e-4. Products are
    computed in float32 (float64 for models in float64) and added up in float64.

    Memory does not grow with the number of images: for each layer 8 bytes per entry of C (p x p per group, p =
    in_channels / groups * kh * kw) and of H (o x o per group, o = out_channels / groups), twice the largest of these,
    less than 200 MB of patches, and the activations and gradients of one batch.

    The model and the process are left as they were, also after an error.

    Args:
        model: The model.
        batches: What it is called with, batch by batch, samples along the first dim; see
            :func:`lowrank_nn.planning.calibration.model_inputs`. A single tensor or dict is one batch.
        paths: Dotted paths of the layers, each an ``nn.Conv2d`` or ``nn.Linear``; "" for the model itself.
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
        PlanError: There is no layer at a path, or it is neither an ``nn.Conv2d`` nor an ``nn.Linear``.
    """
    layers = {path: _checked(layer, path) for path, layer in layers_at(model, paths).items()}
    first_paths = {layer: path for path, layer in reversed(layers.items())}
    moments = {layer: LayerMoments(layer, max_features, seed) for layer in first_paths}
    with evaluating(model):
        probes = CurvatureProbes(model, first_paths if curvature else (), max_features, seed)
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


class RunningCovariance:
    """Mean and covariance about it of vectors that come in pieces, by the pairwise update of Chan et al. 1983.

    Each piece is centred on its own mean before its products are taken, so nothing cancels.

    Args:
        diagonal: Whether to keep the variances only.

    Attributes:
        count: Weight of all vectors so far.
    """

    def __init__(self, *, diagonal: bool = False) -> None:
        self.count = 0.0
        self._diagonal = diagonal
        self._mean = self._scatter = torch.zeros(())

    def add(self, rows: Tensor, weight: float = 1.0) -> None:
        """Take in vectors (groups, n, p), n at least 1, each counting ``weight`` times; ``rows`` is overwritten."""
        rounded = rows.mean(1)
        centred = rows.sub_(rounded[:, None])
        mean = rounded.double() + centred.mean(1)  # what float32 lost of a mean that is large beside the deviation
        if not self.count:
            self._start(mean)
        added = weight * rows.shape[1]
        shift, total = mean - self._mean, self.count + added
        if self._diagonal:
            self._scatter.add_(centred.square().sum(1), alpha=weight)
            self._scatter.addcmul_(shift, shift, value=self.count * added / total)
        else:
            for start, stop in self._blocks():
                self._scatter[:, start:stop, start:].add_(
                    centred[..., start:stop].mT @ centred[..., start:], alpha=weight
                )
            self._scatter.addcmul_(shift[:, :, None], shift[:, None], value=self.count * added / total)
        self._mean.add_(shift, alpha=added / total)
        self.count = total

    def mean(self) -> Tensor:
        """Return the mean, float64 (groups, p)."""
        return self._mean

    def covariance(self) -> Tensor:
        """Return the covariance, float64 (groups, p, p), or the variances (groups, p)."""
        if not self._diagonal:
            for start, stop in self._blocks():
                self._scatter[:, stop:, start:stop] = self._scatter[:, start:stop, stop:].mT
        return self._scatter / self.count

    def _start(self, mean: Tensor) -> None:
        self._mean = torch.zeros_like(mean)
        self._scatter = mean.new_zeros(mean.shape if self._diagonal else (*mean.shape, mean.shape[1]))

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the rows of four blocks: only 10 of the 16 blocks of the matrix lie on or above its diagonal."""
        size = self._mean.shape[1]
        step = -(-size // 4)
        yield from ((start, min(start + step, size)) for start in range(0, size, step))


class LayerMoments:
    """Moments of one layer's input patches, and of its outputs where the patches are too long for a matrix.

    Args:
        layer: The layer.
        max_features: Longest vectors of which a covariance matrix is kept.
        seed: Seed of the positions.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, max_features: int, seed: int) -> None:
        self._sampler = PatchSampler(layer, seed)
        outputs = layer.out_channels // layer.groups if isinstance(layer, nn.Conv2d) else layer.out_features
        wide = self._sampler.features > max_features
        self._inputs = RunningCovariance(diagonal=wide)
        self._outputs = RunningCovariance() if wide and outputs <= max_features else None

    @property
    def called(self) -> bool:
        """Whether the layer was called with anything."""
        return self._inputs.count > 0

    def add(self, x: Tensor, output: Any) -> None:
        """Take one call into account.

        Raises:
            CalibrationError: ``x`` is not a floating-point tensor, or holds NaN or infinite values.
        """
        x = _flat(x)
        value_range(x)
        if x.numel() == 0:
            return
        output = None if self._outputs is None else _flat(output)
        with torch.inference_mode(False):  # the sums outlive a forward that runs in this mode
            for patches in self._sampler.draw(x, output):
                self._inputs.add(patches.inputs, patches.weight)
                if self._outputs is not None and patches.outputs is not None:
                    self._outputs.add(patches.outputs, patches.weight)

    def metric(self, curvature: Tensor | None) -> Metric:
        """Return the metric of what was seen, made invertible."""
        return Metric(
            _regularized(self._sampler.in_weight_order(self._inputs.covariance()), COVARIANCE_RIDGE),
            self._sampler.in_weight_order(self._inputs.mean()),
            None if curvature is None else _regularized(curvature, CURVATURE_RIDGE),
            None if self._outputs is None else _regularized(self._outputs.covariance(), COVARIANCE_RIDGE),
        )


def _checked(layer: nn.Module, path: str) -> nn.Conv2d | nn.Linear:
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        raise PlanError(
            f"calibration: expected an nn.Conv2d or nn.Linear, got {type(layer).__name__}. Leave it out of paths.",
            path=path,
        )
    return layer


def _flat(x: Tensor) -> Tensor:
    """Return a tensor detached, and a nested one as all its positions."""
    return (x.values().reshape(-1, x.size(-1)) if x.is_nested else x).detach()


def _regularized(values: Tensor, share: float) -> Tensor:
    """Add a share of the mean diagonal entry to the diagonal of matrices (groups, n, n) or (groups, n); in place."""
    diagonal = values if values.dim() == 2 else values.diagonal(dim1=1, dim2=2)
    size = diagonal.mean(1, keepdim=True)
    # A group whose inputs never change gets a little of what the others get; any number does where there are none.
    diagonal += share * size.clamp(min=1e-6 * float(size.mean()) or 1e-12)
    return values
