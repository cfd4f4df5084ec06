"""What the channels of layers never fall below, measured on calibration data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.errors import CalibrationError
from lowrank_nn.graph.absorption import Extremes
from lowrank_nn.graph.preserve import evaluating
from lowrank_nn.planning.calibration import layers_at, run_batches, watch


def collect_extremes(
    model: nn.Module, batches: Iterable[Any], paths: Iterable[str], *, progress: bool = False
) -> dict[str, Extremes]:
    """Run ``model`` on calibration data and return the least value of each output channel of chosen layers.

    One pass in eval mode and without gradients; the model and the process are left as they were.

    Args:
        model: The model.
        batches: See :func:`lowrank_nn.planning.calibration.model_inputs`. A single tensor or dict is one batch.
        paths: Dotted paths of convolutions and linear layers.
        progress: Whether to show a progress bar (never when the output is not a terminal).

    Returns:
        By path; layers that no batch reaches are left out.

    Raises:
        CalibrationError: There are no batches, a value is not finite, or the forward failed on a batch.
    """
    layers, found = layers_at(model, paths), dict[str, Extremes]()
    with evaluating(model):
        for path, layer in layers.items():
            watch(layer, path, after=_taken_into(found, path, layer))
        for _ in run_batches(model, batches, max_batches=None, progress=progress):
            pass
    return found


def _taken_into(found: dict[str, Extremes], path: str, layer: nn.Module) -> Callable[[Tensor, Any], None]:
    dim = -1 - len(getattr(layer, "kernel_size", ()))

    def take(x: Tensor, output: Tensor) -> None:
        values = output.detach().movedim(dim, 0).flatten(1).double()
        if not values.numel():
            return
        least, largest = values.amin(1).cpu(), float(values.abs().max())
        if not math.isfinite(largest):
            raise CalibrationError("calibration: there are NaN or infinite values. Look for the damaged sample.")
        known = found.get(path)
        if known is not None:
            least, largest = torch.minimum(known.least, least), max(known.largest, largest)
        found[path] = Extremes(least, largest)

    return take
