"""Putting the compressed layers that a file lists in the places of a fresh model's layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.errors import UnsupportedLayerError
from lowrank_nn.graph import replace_module
from lowrank_nn.layers import LAYERS, CompressedLayer, SplitMultiheadAttention
from lowrank_nn.layers._packed import is_channels_last
from lowrank_nn.storage._folds import fold_again, folds_norms
from lowrank_nn.storage._resized import resize_again
from lowrank_nn.storage._structure import LayerEntry, Structure

CPU = torch.device("cpu")


def rebuild_layers(
    model: nn.Module, structure: Structure, *, fill: bool
) -> tuple[nn.Module, dict[str, str], frozenset[str]]:
    """Put the layers of a file into ``model``, with values not yet loaded, split, cut and fold as it says.

    Args:
        model: Changed in place.
        structure: What the file says.
        fill: Give the new tensors memory where the layers they replace have it (the CPU for meta tensors), and fill
            the buffers that no file holds; else they stay on the meta device.

    Returns:
        The root, which is another object where the model itself was replaced; for every layer that does not fit, by
        path, why; and the paths where a layer was replaced. The layers inside one that does not fit are skipped.
    """
    problems = _split_again(model, structure.keys())
    problems |= resize_again(model, structure.resized, structure.shapes())
    replaced: set[str] = set()
    folds = folds_norms(model, structure.identities)
    for entry in structure.layers:
        if any(is_inside(entry.path, path) for path in problems):
            continue
        try:
            slot = _slot(model, entry)
            if not _is_there(entry, slot):
                layer = _construct(entry, slot)
                _check_arguments(layer, slot, takes_bias=folds)
                model = replace_module(model, entry.path, _prepare(layer, slot, entry, fill))
                replaced.update((entry.path, *entry.aliases))
        except _MisfitError as misfit:
            problems[entry.path] = str(misfit)
    problems |= fold_again(model, structure.identities, structure.keys() if folds else ())
    return model, problems, frozenset(replaced)


def _split_again(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Split the attentions whose projections are layers in the file; return by path why one cannot be."""
    problems = {}
    layers = {key.rpartition(".q_proj.")[0] for key in keys if ".q_proj." in f".{key}"}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and path in layers:
            try:
                SplitMultiheadAttention.split_(module)
            except UnsupportedLayerError as error:
                problems[path] = f"is split in the file: {error.message}"
    return problems


def is_inside(path: str, parent: str) -> bool:
    """Whether ``path`` (of a module or tensor) is ``parent`` or lies inside it."""
    return parent == "" or path == parent or path.startswith(f"{parent}.")


class _MisfitError(Exception):
    """A layer of the file does not fit the model; the message says why, to be put after its path."""


def _slot(model: nn.Module, entry: LayerEntry) -> nn.Module:
    """Return the module that stands where the layer goes."""
    cls = LAYERS.get(entry.name)
    if cls is None:
        raise _MisfitError(
            f"is a {entry.name}, which is not registered. Import the module that registers it, then load again "
            f"(registered: {', '.join(LAYERS)})."
        )
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    slot = modules.get(entry.path)
    if slot is None:
        raise _MisfitError(f"is a {entry.name} in the file, but the model has no module there.")
    stands_for = slot.replaces if isinstance(slot, CompressedLayer) else type(slot)
    if not issubclass(stands_for, cls.replaces):
        raise _MisfitError(
            f"is a {entry.name} in the file, which replaces {cls.replaces.__name__}; the model has "
            f"{type(slot).__name__}."
        )
    shared = {path for path, module in modules.items() if module is slot and path != entry.path}
    if shared != set(entry.aliases):
        raise _MisfitError(
            f"is shared with {sorted(entry.aliases) or 'no other path'} in the file, with "
            f"{sorted(shared) or 'no other path'} in the model."
        )
    return slot


def _is_there(entry: LayerEntry, slot: nn.Module) -> bool:
    if type(slot) is not LAYERS[entry.name]:
        return False
    return isinstance(slot, CompressedLayer) and bool(_plain(slot.config()) == _plain(entry.config))


def _construct(entry: LayerEntry, slot: nn.Module) -> CompressedLayer:
    """Return the layer on the meta device."""
    try:
        return LAYERS[entry.name](**entry.config, device="meta", dtype=_float_dtype(slot))
    except Exception as error:
        # A constructor may raise anything on values that it was not written for.
        raise _MisfitError(f"({entry.name}) has a config that its class refuses: {error}") from error


def _check_arguments(layer: CompressedLayer, slot: nn.Module, *, takes_bias: bool) -> None:
    """Refuse a layer of other sizes than the one in its place."""
    saved = layer.dense_arguments()
    if takes_bias and saved.get("bias"):
        del saved["bias"]  # a folded norm may have left it
    held = slot.dense_arguments() if isinstance(slot, CompressedLayer) else vars(slot) | _has_bias(slot)
    differing = [
        f"{name}={_plain(value)!r} in the file, {_plain(held[name])!r} in the model"
        for name, value in saved.items()
        if name in held and _plain(value) != _plain(held[name])
    ]
    if differing:
        raise _MisfitError(f"({type(layer).__name__}) has {'; '.join(differing)}.")


def _has_bias(layer: nn.Module) -> dict[str, Any]:
    return {"bias": layer._parameters["bias"] is not None} if "bias" in layer._parameters else {}


def _prepare(layer: CompressedLayer, slot: nn.Module, entry: LayerEntry, fill: bool) -> CompressedLayer:
    weight = slot._parameters.get("weight")
    bias = slot._parameters.get("bias")
    trains = any(p.requires_grad for p in slot.parameters()) if weight is None else weight.requires_grad
    for parameter in layer.parameters():
        keeps = bias.requires_grad if bias is not None and parameter is layer.bias else trains
        parameter.requires_grad_(parameter.requires_grad and keeps)
    if not fill:
        return layer
    device = next((t.device for t in _tensors(slot) if not t.is_meta), CPU)
    layer.to_empty(device=device)
    if weight is not None and is_channels_last(weight):
        layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _fill_unsaved_buffers(layer, entry)
    return layer


def _fill_unsaved_buffers(layer: CompressedLayer, entry: LayerEntry) -> None:
    unsaved = [
        (path, name) for path, module in layer.named_modules() for name in sorted(module._non_persistent_buffers_set)
    ]
    if not unsaved:
        return
    with torch.random.fork_rng(devices=[]):
        twin = type(layer)(**entry.config, device="cpu")
    for path, name in unsaved:
        value, target = twin.get_submodule(path)._buffers[name], layer.get_submodule(path)._buffers[name]
        if value is not None and target is not None:
            target.copy_(value)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _float_dtype(module: nn.Module) -> torch.dtype | None:
    return next((t.dtype for t in _tensors(module) if t.is_floating_point()), None)


def _plain(value: Any) -> Any:
    """Return ``value`` with lists as tuples, as JSON does not tell them apart."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return tuple(_plain(item) for item in value) if isinstance(value, (list, tuple)) else value
