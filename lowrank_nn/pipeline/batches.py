"""Reading batches: which part goes into the model, which part is the target, and on which device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lowrank_nn.errors import CalibrationError, TrainingError
from lowrank_nn.graph.inputs import describe, tensors
from lowrank_nn.planning.calibration import ModelInputs

TARGET_KEYS = ("labels", "label", "targets", "target")


def split_batch(batch: Any, example_inputs: Any) -> tuple[Any, Tensor | None]:
    """Return the inputs (as for :func:`lowrank_nn.graph.call_model`) and the targets of a batch of training data.

    How many arguments the model takes is read off ``example_inputs``. For a model of one argument a batch is
    ``(inputs, targets)``; for one of n arguments ``(inputs, targets)`` or flat, n inputs and then the targets; in
    both cases the inputs alone are a batch too. In a dict the first of the entries ``labels``, ``label``, ``targets``
    and ``target`` is the target (and also stays an input if ``example_inputs`` has it); the others are keyword
    arguments, the one argument of a model that takes a dict or, if there is one other and the model is not called by
    keywords, that argument.

    Raises:
        TrainingError: The batch has none of these forms, or targets that are no tensor.
    """
    if isinstance(batch, Mapping):
        return _split_mapping(batch, example_inputs)
    inputs, rest = _leading(batch, example_inputs)
    count = len(_arguments(example_inputs))
    as_given = inputs is batch or any(inputs is item for item in batch)
    if len(rest) > 1 or not (as_given or len(inputs) == count):
        raise TrainingError(
            f"FineTune: a batch must be inputs for the model, which takes {count} argument{'s' * (count != 1)}, or a "
            f"pair (inputs, targets); got {describe(batch)}. Pass loss=..., a function of model and batch."
        )
    return inputs, _target(*rest)


def _leading(batch: Any, example_inputs: Any) -> tuple[Any, Sequence[Any]]:
    """Return what the model is called with in a batch that is no mapping, and what follows it."""
    arguments = _arguments(example_inputs)
    one_of_its_own = type(batch) not in (tuple, list) and [type(batch)] == [type(argument) for argument in arguments]
    if not isinstance(batch, (tuple, list)) or one_of_its_own:
        return batch, ()
    nested = not isinstance(example_inputs, Mapping) and any(_is_container(argument) for argument in arguments[:1])
    if len(batch) in (1, 2) and _is_container(batch[0]) and not nested:
        return batch[0], batch[1:]
    return tuple(batch[: len(arguments)]), batch[len(arguments) :]


def _arguments(example_inputs: Any) -> Sequence[Any]:
    return example_inputs if type(example_inputs) in (tuple, list) else (example_inputs,)


def _split_mapping(batch: Mapping[Any, Any], example_inputs: Any) -> tuple[Any, Tensor | None]:
    inputs, found = _mapping_inputs(batch, example_inputs)
    return inputs, None if found is None else _target(batch[found])


def _mapping_inputs(batch: Mapping[Any, Any], example_inputs: Any) -> tuple[Any, str | None]:
    """Return the inputs in a dict, and the key of the target."""
    by_keyword = isinstance(example_inputs, Mapping)
    whole = type(example_inputs) in (tuple, list) and [isinstance(item, Mapping) for item in example_inputs] == [True]
    wanted = set(example_inputs[0] if whole else example_inputs if by_keyword else ())
    found = next((key for key in TARGET_KEYS if key in batch), None)
    inputs = {key: value for key, value in batch.items() if key != found or key in wanted}
    if whole:
        return (inputs,), found
    if not by_keyword and len(inputs) == 1:
        return (next(iter(inputs.values())),), found
    return inputs, found


def read_calibration(calibration: Any, example_inputs: Any, device: torch.device) -> Any:
    """Return calibration data as something that can be gone through again, each batch read as one of training data.

    Batches none of whose tensors are on ``device`` are moved there; others are left to their maker, since not every
    argument of a model need be (lengths of sequences stay on the CPU).

    Raises:
        CalibrationError: They are nothing that can be gone through.
    """
    if calibration is None:
        return None
    if isinstance(calibration, Tensor):
        return calibration.to(device)
    if isinstance(calibration, Mapping):
        calibration = [calibration]
    if not (hasattr(calibration, "__iter__") or hasattr(calibration, "__getitem__")):
        raise CalibrationError(
            f"calibration must be an iterable of what the model is called with, got {type(calibration).__name__}. Pass "
            "a tensor (one batch), a list of batches or a DataLoader."
        )
    return _Calibration(list(calibration) if isinstance(calibration, Iterator) else calibration, example_inputs, device)


class _Calibration:
    """Batches as what the model is called with, labels left out.

    Random generators of a loader are put back after each pass, so that the next one sees the same order.
    """

    def __init__(self, batches: Any, example_inputs: Any, device: torch.device) -> None:
        self._batches, self._example_inputs, self._device = batches, example_inputs, device

    def __iter__(self) -> Iterator[Any]:
        states = [(generator, generator.get_state()) for generator in loader_generators(self._batches)]
        try:
            yield from map(self._read, self._batches)
        finally:
            for generator, state in states:
                generator.set_state(state)

    def __len__(self) -> int:
        return len(self._batches)

    def _read(self, batch: Any) -> Any:
        if all(tensor.device != self._device for tensor in tensors(batch)):
            batch = to_device(batch, self._device)
        if isinstance(batch, Mapping):
            return ModelInputs(_mapping_inputs(batch, self._example_inputs)[0])
        if isinstance(self._example_inputs, Mapping):  # which has no order: that of the forward counts
            return batch
        return ModelInputs(_leading(batch, self._example_inputs)[0])


def _target(value: Any = None) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    raise TrainingError(
        f"FineTune: the targets of a batch must be a tensor, got {describe(value)}. Pass loss=..., a function of model "
        "and batch."
    )


def _is_container(value: Any) -> bool:
    return isinstance(value, (tuple, list, Mapping))


def device_of(model: nn.Module) -> torch.device:
    """Return where the first parameter of a model is; the CPU if there is none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor in a nest of tuples, lists, mappings and dataclasses, and whatever else can, to ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, PackedSequence):  # a named tuple, one field of which stays on the CPU
        return value.to(device=device)  # type: ignore[call-arg]
    if isinstance(value, MutableMapping):
        moved = copy.copy(value)
        moved.update({key: to_device(item, device) for key, item in value.items()})
        return moved
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_device(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value.to(device) if callable(getattr(value, "to", None)) else value


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a model returned.

    They are the output itself, ``.logits``, ``["logits"]``, or else the first floating-point tensor that is no scalar.

    Raises:
        TrainingError: There is no such tensor.
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    for tensor in tensors(output):
        if tensor.is_floating_point() and tensor.dim() > 0:
            return tensor
    raise TrainingError(
        f"FineTune: the model returns {describe(output)}, in which no logits are found. Pass loss=..., a function of "
        "model and batch that returns a scalar."
    )


def class_logits(output: Any, inputs: Any) -> Tensor:
    """Return the logits in what a model returned for a batch.

    Raises:
        TrainingError: There are none, or one number for each input, which a softmax would take for as many classes.
    """
    logits = logits_of(output)
    if logits.dim() == 1 and any(tensor.shape[:1] == logits.shape for tensor in tensors(inputs)):
        raise TrainingError(
            f"FineTune: the model returns one number for each of {len(logits)} inputs, which are no classes to choose "
            "from. Pass loss=..., a function of model and batch that returns a scalar."
        )
    return logits


def loader_generators(loader: Any) -> list[torch.Generator]:
    """Return the random generators of its own that a ``DataLoader`` or its samplers draw from."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    return list({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())
