"""Reading batches: which part goes into the model, which part is the target, and on which device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_nn.errors import TrainingError

TARGET_KEYS = ("labels", "label", "targets", "target")


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Return the inputs and the targets of a batch of training data.

    A pair is (inputs, targets), as torch's loaders give it; of a dict, the entry ``labels`` or ``targets`` (or
    their singulars) is the target and the rest are keyword arguments; anything else is inputs without targets.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        found = [key for key in TARGET_KEYS if key in batch]
        inputs = {key: value for key, value in batch.items() if key not in found}
        return inputs, batch[found[0]] if found else None
    return batch, None


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor in a nest of tuples, lists, dicts and dataclasses to ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_device(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a classifier returned: itself, ``.logits``, ``["logits"]``, or the first tensor.

    Raises:
        TrainingError: There is no tensor to be found.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for item in items:
        if isinstance(item, Tensor):
            return item
    raise TrainingError(
        f"FineTune: the model returns {type(output).__name__}, in which no logits are found. Pass loss=..., a function "
        "of model and batch that returns a scalar."
    )
