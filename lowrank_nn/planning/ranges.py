"""Ranges of the inputs and outputs of layers, measured on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from lowrank_nn.errors import CalibrationError
from lowrank_nn.graph.inputs import tensors
from lowrank_nn.graph.preserve import evaluating
from lowrank_nn.layers._observers import Observer, ObserverName, make_observer
from lowrank_nn.planning.calibration import layers_at, run_batches, watch


class Ranges(NamedTuple):
    """Ranges of a layer, each (min, max), which include 0.

    Attributes:
        input: Of its first input.
        output: Of its output.
    """

    input: tuple[float, float]
    output: tuple[float, float]


def collect_ranges(
    model: nn.Module,
    batches: Iterable[Any],
    paths: Iterable[str],
    *,
    observer: ObserverName = "minmax",
    bits: int = 8,
    max_batches: int | None = None,
    progress: bool = False,
) -> dict[str, Ranges]:
    """Run ``model`` on calibration data and return the ranges of the inputs and outputs of chosen layers.

    One pass in eval mode and without gradients; memory does not grow with the data. The model and the process are
    left as they were, also after an error.

    Args:
        model: The model.
        batches: What it is called with, batch by batch; see :func:`lowrank_nn.planning.calibration.model_inputs`. A
            single tensor or dict is one batch.
        paths: Dotted paths of the layers; "" for the model itself.
        observer: How a range is chosen: ``"minmax"``, ``"percentile"`` (from the 0.01st to the 99.99th), ``"mse"``
            (least squared error of quantization to ``bits``) or ``"entropy"`` (least relative entropy to what it does).
        bits: Bits that the inputs will be quantized to; used by ``"mse"`` and ``"entropy"``. Outputs are for 8.
        max_batches: Batches to take; None for all.
        progress: Whether to show a progress bar (never when the output is not a terminal).

    Returns:
        The ranges by path.

    Raises:
        CalibrationError: There are no batches, a layer was never called, a tensor is not finite, or the forward
            failed on a batch.
        PlanError: There is no layer at a path.
        OptionError: There is no such observer.
    """
    layers = layers_at(model, paths)
    observers = {layer: (make_observer(observer, bits), make_observer(observer, 8)) for layer in layers.values()}
    first_paths = {layer: path for path, layer in reversed(layers.items())}
    with evaluating(model):
        for layer, path in first_paths.items():
            inputs, outputs = observers[layer]
            watch(layer, path, before=_values_of(inputs), after=_output_values_of(outputs))
        count = sum(1 for _ in run_batches(model, batches, max_batches=max_batches, progress=progress))
    return {path: Ranges(*(_range(o, path, count) for o in observers[layer])) for path, layer in layers.items()}


def _values_of(observer: Observer) -> Callable[[Tensor], None]:
    def observe(x: Tensor) -> None:
        observer.observe(x.values() if x.is_nested else x)

    return observe


def _output_values_of(observer: Observer) -> Callable[[Tensor, Any], None]:
    observe = _values_of(observer)

    def observe_output(x: Tensor, output: Any) -> None:
        observe(next(tensors(output)))

    return observe_output


def _range(observer: Observer, path: str, batches: int) -> tuple[float, float]:
    try:
        return observer.range()
    except CalibrationError:
        raise CalibrationError(
            f"calibration: the layer was never called with a value in {batches} batches, so its range is unknown. "
            "Leave it as it is (but_not=...), or pass batches that reach it.",
            path=path,
        ) from None
