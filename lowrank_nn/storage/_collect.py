"""What of a model is to be written: its compressed layers, its tensors, and how layers pack theirs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowrank_nn.errors import OptionError
from lowrank_nn.layers import LAYERS, CompressedLayer, Packing
from lowrank_nn.storage._encoding import unstorable
from lowrank_nn.storage._structure import LayerEntry


def describe_layers(model: nn.Module) -> tuple[LayerEntry, ...]:
    """List the compressed layers of ``model``, parents first.

    Raises:
        OptionError: A layer is not registered, its config is not JSON or not that of its tensors, or a module is
            parametrized.
    """
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        modules[id(module)] = module
        paths.setdefault(id(module), []).append(path)
    entries, problems = [], []
    for key, module in modules.items():
        path, *aliases = paths[key]
        if parametrize.is_parametrized(module):
            problems.append(
                f"{path!r} has parametrized tensors. Call torch.nn.utils.parametrize.remove_parametrizations first."
            )
        elif isinstance(module, CompressedLayer):
            problem = _unwritable(module)
            if problem is None:
                entries.append(LayerEntry(path, type(module).__name__, module.config(), tuple(aliases)))
            else:
                problems.append(f"{path!r} {problem}")
    _refuse(problems)
    return tuple(entries)


def state_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of the state dict, each once, and for every further key of one the first key.

    Raises:
        OptionError: The state holds something that a file cannot.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    problems = []
    for key, value in model.state_dict(keep_vars=True).items():
        problem = unstorable(value) if isinstance(value, Tensor) else f"is a {type(value).__name__}, not a tensor."
        if key.endswith("_extra_state"):
            problem = "is extra state of a module, which a file cannot hold. Make it a buffer."
        if problem is not None:
            problems.append(f"{key!r} {problem}")
            continue
        earlier = first.setdefault(_identity(value), key)
        if earlier == key:
            tensors[key] = value
        else:
            tied[key] = earlier
    _refuse(problems)
    return tensors, tied


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise OptionError("save: the model cannot be written:\n" + "\n".join(f"  - {p}" for p in problems))


def packings(model: nn.Module) -> dict[str, Packing]:
    """Return what the compressed layers of ``model`` say about their tensors, by key; masks are named by their keys."""
    found: dict[str, Packing] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, CompressedLayer):
            continue
        prefix = f"{path}." if path else ""
        for name, packing in module.packing().items():
            mask = None if packing.mask is None else prefix + packing.mask
            found[prefix + name] = Packing(packing.bits, mask)
            if mask is not None:
                found.setdefault(mask, Packing(bits=1))
    return found


def _unwritable(layer: CompressedLayer) -> str | None:
    name = type(layer).__name__
    if LAYERS.get(name) is not type(layer):
        return f"is a {name}, which is not registered. Decorate the class with lowrank_nn.layers.register_layer."
    try:
        json.dumps(layer.config(), allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"({name}) has a config that is not JSON ({error}). config() must return plain numbers and strings."
    return _unlike_its_class(layer)


def _unlike_its_class(layer: CompressedLayer) -> str | None:
    """Return in what the layer differs from one of its class and config, which is what ``load`` builds."""
    name = type(layer).__name__
    if any(parametrize.is_parametrized(module) for module in layer.modules()):
        return None  # which is listed
    try:
        with torch.random.fork_rng(devices=[]):
            twin = type(layer).empty(device="meta", dtype=None, **layer.config())
    except Exception as error:
        # A constructor may raise anything on a config that it was not written for.
        return f"({name}) cannot be built from its config(): {error}"
    inside = tuple(f"{path}." for path, m in layer.named_modules() if path and isinstance(m, CompressedLayer))
    held, built = (
        {key: tuple(t.shape) for key, t in m.state_dict().items() if not key.startswith(inside)} for m in (layer, twin)
    )
    differing = sorted(key for key in held.keys() | built.keys() if held.get(key) != built.get(key))
    if not differing:
        return None
    return (
        f"({name}) was changed: {', '.join(differing)} are not those that its class makes from its config, so it could "
        "not be loaded. Undo hooks that compute weights (torch.nn.utils.prune.remove, remove_weight_norm); derive a "
        "class for other changes."
    )


def _identity(tensor: Tensor) -> Any:
    if tensor.numel() == 0:
        return id(tensor)
    place = (tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride())
    return (*place, tensor.is_conj(), tensor.is_neg())  # which are bits of a view, not of what is in memory
