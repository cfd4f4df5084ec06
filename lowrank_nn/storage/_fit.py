"""Whether a file fits a model: every difference at once, found without touching the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lowrank_nn.graph.derive import meta_copy
from lowrank_nn.layers import CompressedLayer
from lowrank_nn.storage._encoding import DTYPES
from lowrank_nn.storage._open import OpenFile
from lowrank_nn.storage._rebuild import is_inside, rebuild_layers
from lowrank_nn.storage._structure import StoredTensor, Structure


def find_misfits(file: OpenFile, model: nn.Module) -> list[str]:
    """Return all in which the file and the model differ, a sentence each.

    The layers are rebuilt on a copy of the model that has shapes but no memory, whose state is then compared.
    """
    structure = file.structure
    skeleton, failed, replaced = rebuild_layers(meta_copy(model), structure, fill=False)
    problems = [f"{path!r} {problem}" for path, problem in failed.items()]
    problems += _unlisted_layers(structure, skeleton)

    def compared(key: str) -> bool:
        return not any(is_inside(key, path) for path in failed)

    expected = {key: value for key, value in skeleton.state_dict(keep_vars=True).items() if compared(key)}
    first_keys = {key: first for key, first in structure.keys().items() if compared(key)}
    stored = {key: structure.tensors[first] for key, first in first_keys.items()}
    problems += [f"{key!r} is in the model, but missing in the file." for key in expected if key not in stored]
    problems += [f"{key!r} is in the file, but not in the model." for key in stored if key not in expected]
    for key, value in expected.items():
        if key in stored:
            rebuilt = any(is_inside(key, path) for path in replaced)
            problems += [f"{key!r} {problem}" for problem in _differences(value, stored[key], rebuilt)]
    return problems + _broken_ties(expected, first_keys, file) + _unfillable(model)


def _unlisted_layers(structure: Structure, model: nn.Module) -> list[str]:
    listed = {entry.path for entry in structure.layers}
    return [
        f"{path!r} is a {type(module).__name__} in the model, and no compressed layer in the file."
        for path, module in model.named_modules()
        if isinstance(module, CompressedLayer) and path not in listed
    ]


def _differences(value: Any, stored: StoredTensor, rebuilt: bool) -> list[str]:
    if not isinstance(value, Tensor):
        return [f"is a {type(value).__name__} in the model, a tensor in the file."]
    problems = []
    shape, dtype = stored.encoding.shape, DTYPES[stored.encoding.dtype]
    if tuple(value.shape) != shape:
        problems.append(f"has shape {shape} in the file, {tuple(value.shape)} in the model.")
    both_float = dtype.is_floating_point and value.dtype.is_floating_point
    if dtype != value.dtype and not (rebuilt and both_float):
        problems.append(
            f"is {dtype} in the file, {value.dtype} in the model. Convert the fresh model first (model.to(dtype))."
        )
    return problems


def _broken_ties(expected: Mapping[str, Any], first_keys: Mapping[str, str], file: OpenFile) -> list[str]:
    first: dict[int, str] = {}
    problems = []
    for key, value in expected.items():
        earlier = first.setdefault(id(value), key)
        if key in first_keys and earlier in first_keys and not file.same(first_keys[key], first_keys[earlier]):
            problems.append(f"{key!r} and {earlier!r} are one tensor in the model, but differ in the file.")
    return problems


def _unfillable(model: nn.Module) -> list[str]:
    state = model.state_dict(keep_vars=True)
    return [
        f"{name!r} is a non-persistent buffer on the meta device: no file holds it. Build the model on a real device."
        for name, buffer in model.named_buffers()
        if buffer.is_meta and name not in state
    ]
