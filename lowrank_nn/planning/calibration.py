"""Ranges of the inputs of layers, measured on calibration data."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_nn.errors import CalibrationError, LowRankError, PlanError
from lowrank_nn.graph import call_model
from lowrank_nn.graph.inputs import tensors
from lowrank_nn.graph.preserve import untouched
from lowrank_nn.graph.sites import describe_paths
from lowrank_nn.layers._observers import Observer, make_observer


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
        batches: What it is called with, batch by batch; see :func:`model_inputs`. A single tensor or dict is one batch.
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
    paths = list(dict.fromkeys(paths))
    layers = {path: _layer_at(model, path) for path in paths}
    observers = {layer: make_observer(observer, bits) for layer in layers.values()}
    if isinstance(batches, (Tensor, Mapping)):
        batches = [batches]
    shown = tqdm(batches, desc="calibration", disable=None if progress else True, leave=False)
    count = 0
    with _watching(model, {layer: (path, observers[layer]) for path, layer in reversed(layers.items())}):
        for count, batch in enumerate(itertools.islice(shown, max_batches), 1):
            _run(model, batch, count)
    if count == 0:
        raise CalibrationError("calibration: there are no batches. Pass an iterable with at least one.")
    return {path: _range(observers[layer], path, count) for path, layer in layers.items()}


def model_inputs(model: nn.Module, batch: Any) -> Any:
    """Return what ``model`` is called with out of a calibration batch, labels left out; for :func:`call_model`.

    A tensor, or anything else that is not a tuple or list, is taken whole; a mapping holds keyword arguments. Of a
    tuple or list the leading items are taken, as many as the model's forward has required arguments, at least one:
    ``(images, labels)`` gives the images to a model of one argument. Its first item may also be a mapping of keyword
    arguments, or, where the model has several arguments, the tuple or list of them: ``((left, right), labels)``.

    Args:
        model: The model.
        batch: One batch, such as a ``DataLoader`` yields.
    """
    if not isinstance(batch, (tuple, list)) or not batch:
        return batch
    needed, first = _required_arguments(model), batch[0]
    if isinstance(first, Mapping):
        return first
    if needed > 1 and isinstance(first, (tuple, list)):
        return tuple(first)
    return tuple(batch[: max(needed, 1)])


def _required_arguments(model: nn.Module) -> int:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    arguments = inspect.signature(model.forward).parameters.values()
    return sum(a.kind in positional and a.default is inspect.Parameter.empty for a in arguments)


def _layer_at(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        paths = (name for name, module in model.named_modules() if not module._modules)
        raise PlanError(f"calibration: no layer at {path!r}. {describe_paths(paths)}") from None


@contextlib.contextmanager
def _watching(model: nn.Module, watched: Mapping[nn.Module, tuple[str, Observer]]) -> Iterator[None]:
    """Observe the inputs of layers while the block runs, with the model in eval mode and no gradients."""
    with untouched(model), torch.no_grad():
        # Encoder layers in eval mode hand their weights to a fused kernel, which calls none of their layers.
        torch.backends.mha.set_fastpath_enabled(False)
        for module in model.modules():
            vars(module).update(training=False, _compiled_call_impl=None)
        for layer, (path, observer) in watched.items():
            # Not a hook: hooks change the way that torch's own modules run.
            vars(layer)["forward"] = _observed(layer.forward, path, observer)
        yield


def _observed(forward: Callable[..., Any], path: str, observer: Observer) -> Callable[..., Any]:
    @functools.wraps(forward)
    def observed(*args: Any, **kwargs: Any) -> Any:
        x = next(tensors((args, kwargs)), None)
        if x is not None:
            try:
                observer.observe(x.values() if x.is_nested else x)
            except LowRankError as error:
                raise error.at(path) from error
        return forward(*args, **kwargs)

    return observed


def _run(model: nn.Module, batch: Any, number: int) -> None:
    inputs: Any = model_inputs(model, batch)
    try:
        call_model(model, inputs)
    except LowRankError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"calibration: the forward failed on batch {number}: {type(error).__name__}: {error}. Each batch must be "
            "what the model is called with (labels may follow), on the model's device and of its dtype."
        ) from error


def _range(observer: Observer, path: str, batches: int) -> tuple[float, float]:
    try:
        return observer.range()
    except CalibrationError:
        raise CalibrationError(
            f"calibration: the layer was never called with a value in {batches} batches, so its range is unknown. "
            "Leave it as it is (but_not=...), or pass batches that reach it.",
            path=path,
        ) from None
