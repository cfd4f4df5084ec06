"""Ranges of the inputs of layers, measured on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from lowrank_nn.errors import CalibrationError
from lowrank_nn.graph.preserve import evaluating
from lowrank_nn.layers._observers import Observer, make_observer
from lowrank_nn.planning.calibration import layers_at, run_batches, watch


def collect_input_ranges(
    model: nn.Module,
    batches: Iterable[Any],
    paths: Iterable[str],
    *,
    observer: str = "minmax",
    bits: int = 8,
    max_batches: int | None = None,
    progress: bool = False,
) -> dict[str, tuple[float, float]]:
    """Run ``model`` on calibration data and return the range of the inputs of chosen layers.

    One pass in eval mode and without gradients; memory does not grow with the data. The model and the process are
    left as they were, also after an error.

    Args:
        model: The model.
        batches: What it is called with, batch by batch; see :func:`lowrank_nn.planning.calibration.model_inputs`. A
            single tensor or dict is one batch.
        paths: Dotted paths of the layers; "" for the model itself.
        observer: How a range is chosen: ``"minmax"``, ``"percentile"`` (from the 0.01st to the 99.99th) or ``"mse"``
            (least squared error of quantization to ``bits``).
        bits: Bits that the inputs will be quantized to; used by ``"mse"``.
        max_batches: Batches to take; None for all.
        progress: Whether to show a progress bar (never when the output is not a terminal).

    Returns:
        (min, max) by path; each range includes 0.

    Raises:
        CalibrationError: There are no batches, a layer was never called, an input is not finite, or the forward
            failed on a batch.
        PlanError: There is no layer at a path.
        OptionError: There is no such observer.
    """
    layers = layers_at(model, paths)
    observers = {layer: make_observer(observer, bits) for layer in layers.values()}
    first_paths = {layer: path for path, layer in reversed(layers.items())}
    with evaluating(model):
        for layer, path in first_paths.items():
            watch(layer, path, before=_values_of(observers[layer]))
        count = sum(1 for _ in run_batches(model, batches, max_batches=max_batches, progress=progress))
    return {path: _range(observers[layer], path, count) for path, layer in layers.items()}


def _values_of(observer: Observer) -> Callable[[Tensor], None]:
    def observe(x: Tensor) -> None:
        observer.observe(x.values() if x.is_nested else x)

    return observe


def _range(observer: Observer, path: str, batches: int) -> tuple[float, float]:
    try:
        return observer.range()
    except CalibrationError:
        raise CalibrationError(
            f"calibration: the layer was never called with a value in {batches} batches, so its range is unknown. "
            "Leave it as it is (but_not=...), or pass batches that reach it.",
            path=path,
        ) from None
