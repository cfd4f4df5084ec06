"""Second moments of the inputs of layers, added up from batch to batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.decompose import Metric
from lowrank_nn.errors import CalibrationError
from lowrank_nn.layers._observers import value_range
from lowrank_nn.planning.patches import PatchSampler

COVARIANCE_RIDGE = 1e-5
CURVATURE_RIDGE = 1e-4

LARGEST = 1e15  # products are summed in float32, in float64 where the network computes in it
LARGEST_WIDE = 1e140


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
        self._mean = self._scatter = torch.zeros((), dtype=torch.float64, device="cpu")

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
            add_squares_(self._scatter, centred, weight)
            self._scatter.addcmul_(shift[:, :, None], shift[:, None], value=self.count * added / total)
        self._mean.add_(shift, alpha=added / total)
        self.count = total

    def mean(self) -> Tensor:
        """Return the mean, float64 (groups, p)."""
        return self._mean

    def variances(self) -> Tensor:
        """Return the variances, float64 (groups, p)."""
        return (self._scatter if self._diagonal else self._scatter.diagonal(dim1=1, dim2=2)) / self.count

    def covariance(self) -> Tensor:
        """Return the covariance, float64 (groups, p, p), or the variances (groups, p)."""
        return (self._scatter if self._diagonal else symmetric_(self._scatter)) / self.count

    def _start(self, mean: Tensor) -> None:
        self._mean = torch.zeros_like(mean)
        self._scatter = mean.new_zeros(mean.shape if self._diagonal else (*mean.shape, mean.shape[1]))


def add_squares_(total: Tensor, rows: Tensor, weight: float) -> None:
    """Add ``weight`` times the products of rows (groups, n, p) to (groups, p, p): the diagonal and all above it."""
    for start, stop in _blocks(total):
        total[:, start:stop, start:].add_(rows[..., start:stop].mT @ rows[..., start:], alpha=weight)


def symmetric_(total: Tensor) -> Tensor:
    """Complete what :func:`add_squares_` added up, below the diagonal; returned for convenience."""
    for start, stop in _blocks(total):
        total[:, stop:, start:stop] = total[:, start:stop, stop:].mT
    return total


def _blocks(matrices: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the rows of four blocks: only 10 of the 16 blocks of a matrix lie on or above its diagonal."""
    size = matrices.shape[1]
    step = -(-size // 4)
    yield from ((start, min(start + step, size)) for start in range(0, size, step))


class LayerMoments:
    """Moments of one layer's input patches, and of its outputs where the patches are too long for a matrix.

    Args:
        layer: The layer.
        max_features: Longest vectors of which a covariance matrix is kept.
        seed: Seed of the positions.

    Attributes:
        layer: The layer.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, max_features: int, seed: int) -> None:
        self.layer = layer
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
            CalibrationError: ``x`` is not a floating-point tensor, or holds NaN, infinite or nearly infinite values.
        """
        x = _flat(x)
        largest = max(map(abs, value_range(x)))
        if x.numel() == 0:
            return
        if largest > (LARGEST_WIDE if x.dtype is torch.float64 else LARGEST):
            raise CalibrationError(
                f"calibration: values of {largest:.0e} are too large to square and add up. Look for the damaged "
                "sample, or the layer before that diverges."
            )
        output = None if self._outputs is None else _flat(output)
        with torch.inference_mode(False):  # the sums outlive a forward that runs in this mode
            for patches in self._sampler.draw(x, output):
                self._inputs.add(patches.inputs, patches.weight)
                if self._outputs is not None and patches.outputs is not None:
                    self._outputs.add(patches.outputs, patches.weight)

    def mean(self) -> Tensor:
        """Return the mean patch so far, (groups, p) in the order of the weight."""
        return self._sampler.in_weight_order(self._inputs.mean())

    def total_variance(self) -> Tensor:
        """Return the trace of each group's covariance so far, (groups,)."""
        return self._inputs.variances().sum(1)

    def metric(self, curvature: Tensor | None) -> Metric:
        """Return the metric of what was seen, made invertible."""
        return Metric(
            _regularized(self._sampler.in_weight_order(self._inputs.covariance()), COVARIANCE_RIDGE),
            self.mean(),
            None if curvature is None else _regularized(curvature, CURVATURE_RIDGE),
            None if self._outputs is None else _regularized(self._outputs.covariance(), COVARIANCE_RIDGE),
        )


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
