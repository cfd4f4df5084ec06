"""Layers that lost channels: what a file says of their sizes, and cutting a fresh model's layers to these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.errors import OptionError, UnsupportedLayerError
from lowrank_nn.graph.attributes import mark_resized, resized_attributes
from lowrank_nn.layers import CompressedLayer, narrow_module
from lowrank_nn.layers._packed import is_channels_last

Size = int | list[int]
Attributes = dict[str, Size]
"""Sizes by name: whole numbers or lists of them."""


def describe_resized(model: nn.Module) -> dict[str, Attributes]:
    """Return, by path, the sizes of the layers that lost channels; parts of compressed layers go by their config.

    Raises:
        OptionError: An attribute that changed is neither a whole number nor a sequence of them.
    """
    found: dict[str, Attributes] = {}
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        attributes = resized_attributes(module)
        if isinstance(module, CompressedLayer):
            inside |= {child for child in module.modules() if child is not module}
            known = module.dense_arguments()
            attributes = None if attributes is None else {n: v for n, v in attributes.items() if n in known}
        if attributes is not None and module not in inside:
            found[path] = {name: _plain(path, name, value) for name, value in attributes.items()}
    return found


def read_attributes(value: Any) -> Attributes:
    """Return the sizes that a file gives for a layer.

    Raises:
        ValueError: They are not of that form.
    """
    fits = type(value) is dict and all(type(name) is str and _is_size(size) for name, size in value.items())
    if not fits:
        raise ValueError(f"sizes {value!r}"[:200])
    return dict(value)


def resize_again(
    model: nn.Module, resized: Mapping[str, Attributes], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Give layers the sizes that a file says, their tensors not yet filled.

    Nothing becomes larger than it is: a file takes no more memory than the model.

    Args:
        model: Changed in place, as far as sizes fit.
        resized: Attributes by path.
        shapes: Shapes of the file's tensors by state-dict key.

    Returns:
        By path of each layer that does not fit, why.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    problems: dict[str, str] = {}
    for path, attributes in resized.items():
        module = modules.get(path)
        if module is None:
            problems[path] = "has lost channels in the file, but the model has no module there."
            continue
        wrong = [_misfit(vars(module), name, size) for name, size in attributes.items()]
        wrong += _resize_tensors(module, path, shapes)
        if any(wrong):
            problems[path] = f"has lost channels in the file, and does not fit: {'; '.join(filter(None, wrong))}."
            continue
        for name, size in attributes.items():
            setattr(module, name, size if isinstance(size, int) else type(getattr(module, name))(size))
        mark_resized(module, attributes)
    return problems | _narrow(modules, resized.keys() - problems.keys())


def _plain(path: str, name: str, value: Any) -> Size:
    size = list(value) if isinstance(value, (tuple, list)) else value
    if not _is_size(size):
        raise OptionError(
            f"save: the model cannot be written: {name} of {path!r} changed when channels were removed, and is neither "
            f"a whole number nor a sequence of them, but {value!r}."
        )
    return size


def _is_size(value: Any) -> bool:
    numbers = value if type(value) is list else [value]
    return all(type(number) is int and number >= 0 for number in numbers)


def _misfit(held: Mapping[str, Any], name: str, size: Size) -> str:
    """Return why an attribute cannot have become ``size``; empty if it can."""
    now = held.get(name)
    present = list(now) if isinstance(now, (tuple, list)) else now
    if not _is_size(present) or type(present) is not type(size):
        return f"the model's {name} is {now!r}"[:100]
    old, new = (value if isinstance(value, list) else [value] for value in (present, size))
    fits = len(old) == len(new) and all(a >= b for a, b in zip(old, new, strict=True))
    return "" if fits else f"{name}={size} in the file, {now} in the model"


def _resize_tensors(module: nn.Module, path: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    problems = []
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            shape = shapes.get(f"{path}.{name}" if path else name)
            if tensor is None or shape is None:
                continue
            module._non_persistent_buffers_set.discard(name)
            if shape == tuple(tensor.shape):
                continue
            if len(shape) != tensor.dim() or any(new > old for new, old in zip(shape, tensor.shape, strict=True)):
                problems.append(f"{name} is {shape} in the file, {tuple(tensor.shape)} in the model")
                continue
            tensor.data = _smaller(tensor, shape)
    return problems


def _smaller(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    layout = torch.channels_last if is_channels_last(tensor) else torch.contiguous_format
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout)


def _narrow(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> dict[str, str]:
    """Make modules that lost heads such as can run; return by path why one cannot."""
    problems = {}
    for path in paths:
        try:
            narrow_module(modules[path])
        except UnsupportedLayerError as error:
            problems[path] = f"has lost heads in the file: {error.message}"
    return problems
