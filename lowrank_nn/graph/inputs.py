"""What models are called with and return: tensors in any container."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.errors import CalibrationError, LowRankError, PlanError


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """Call ``model`` as its user does, with copies of the tensors: what a forward does to its inputs, they never see.

    Args:
        model: The model.
        example_inputs: A plain tuple or list gives the positional arguments, a dict (any mapping) the keyword
            arguments; anything else (a tensor, dataclass, namedtuple) is the only argument. A model that takes one
            dict is called with ``(the_dict,)``.

    Returns:
        What the model returns; of a generator, which computes nothing before that, a list of all that it yields.
    """
    inputs = _with_copies(example_inputs, {})
    if type(inputs) in (tuple, list):
        output = model(*inputs)
    else:
        output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return list(output) if isinstance(output, Iterator) else output


def run_model(model: nn.Module, example_inputs: Any) -> Any:
    """Call ``model`` as :func:`call_model` does.

    Raises:
        PlanError: The forward failed; the error it raised is chained.
    """
    try:
        return call_model(model, example_inputs)
    except Exception as error:
        raise PlanError(
            f"{type(model).__name__}: the forward failed on example_inputs = {describe(example_inputs)}: "
            f"{type(error).__name__}: {error}. Pass what the model is called with: a tensor, a tuple of positional "
            "arguments or a dict of keyword arguments, on the model's device and of its dtype."
        ) from error


def run_batch(model: nn.Module, inputs: Any, number: int) -> Any:
    """Call ``model`` as :func:`call_model` does, on one of several batches.

    Args:
        model: The model.
        inputs: What it is called with.
        number: Number of the batch, from 1, for the message.

    Raises:
        CalibrationError: The forward failed; the error it raised is chained.
    """
    try:
        return call_model(model, inputs)
    except LowRankError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"calibration: the forward failed on batch {number}: {type(error).__name__}: {error}. Each batch must be "
            "what the model is called with (labels may follow), on the model's device and of its dtype."
        ) from error


def _with_copies(value: Any, copies: dict[int, Tensor]) -> Any:
    """Return a nest of plain containers with copies of its tensors; one that is there twice is so afterwards."""
    if isinstance(value, Tensor):
        return copies.setdefault(id(value), value.clone())
    if type(value) in (tuple, list):
        return type(value)(_with_copies(item, copies) for item in value)
    if type(value) is dict:
        return {key: _with_copies(item, copies) for key, item in value.items()}
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in ``value``, in order: through containers, and attributes of objects that only hold values."""
    return _tensors(value, set())


def _tensors(value: Any, met: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    inner: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif id(value) not in met and _holds_values(value):
        met.add(id(value))  # such objects may know each other
        inner = list(vars(value).values())
    for item in inner:
        yield from _tensors(item, met)


def _holds_values(value: Any) -> bool:
    """Whether an object is a record of values: a distribution, a namespace, a cache, a class of the user's own."""
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, types.ModuleType)


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a copy of ``value`` with every tensor that :func:`tensors` finds in it replaced by what it becomes."""
    # Copying with the tensors foretold works for every container, whatever its constructor takes.
    return copy.deepcopy(value, {id(tensor): change(tensor) for tensor in tensors(value)})


def doubled(example_inputs: Any) -> Any:
    """Return the inputs with a batch twice as large: behind each entry along dim 0 stands a mirrored one."""
    batch = next((tensor.shape[0] for tensor in tensors(example_inputs) if tensor.dim()), 0)

    def twice(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != batch:
            return tensor
        mirrored = tensor.flip(-1) if tensor.dim() > 1 and tensor.is_floating_point() else tensor
        return torch.cat([tensor, mirrored])

    return map_tensors(twice, example_inputs)


def first_shape(value: Any) -> tuple[int, ...]:
    """Return the shape of the first tensor in ``value``; ``()`` if there is none."""
    first = next(tensors(value), None)
    if first is None:
        return ()
    if first.is_nested:  # it has no shape of its own: all positions in one dimension
        width = first.size(-1)
        return (first.values().numel() // width, width)
    return tuple(first.shape)


def describe(value: Any) -> str:
    """Return types, shapes, dtypes and devices in ``value``, for error messages."""
    if isinstance(value, Tensor):
        shape = "nested" if value.is_nested else list(value.shape)
        return f"Tensor({shape}, {value.dtype}, {value.device})"
    if type(value) in (tuple, list):
        return f"({', '.join(describe(item) for item in value)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(item)}" for key, item in value.items()) + "}"
    return type(value).__name__
