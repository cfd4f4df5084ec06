"""Removing channels for good: smaller tensors in the same modules."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.errors import LowRankError, PlanError, UnsupportedLayerError
from lowrank_nn.graph.attributes import Cut, mark_resized, update_attributes
from lowrank_nn.graph.groups import ChannelGroup
from lowrank_nn.graph.heads import update_heads
from lowrank_nn.graph.preserve import MODULE_TABLES
from lowrank_nn.graph.sizes import Attribute, shrink_attributes
from lowrank_nn.graph.special import release_fast_path
from lowrank_nn.layers import CompressedLayer

Cuts = dict[str, dict[int, Cut]]
"""By name of a parameter or buffer and by dim: the positions that go."""


@dataclasses.dataclass(frozen=True)
class Removal:
    """Units of one channel group that are to go.

    Attributes:
        group: The group.
        units: Their numbers, from 0 to ``group.size - 1``, in ascending order.
    """

    group: ChannelGroup
    units: tuple[int, ...]


def remove_units(model: nn.Module, removals: Sequence[Removal]) -> Callable[[], None]:
    """Cut units of channel groups out of all tensors that they are members of, and keep the modules' attributes right.

    Parameters and buffers stay the objects they are (shared ones stay shared, optimizers and hooks keep their hold on
    them), with data of another shape; dtype, device, memory format and ``requires_grad`` stay too, gradients go. So do
    tensors that modules concerned keep in dicts (caches).

    Args:
        model: Changed in place; on any device, meta included.
        removals: At most one for each group, all for the model as it is.

    Returns:
        A function that undoes the removal, if nothing else was changed in between.

    Raises:
        PlanError: The model has no such tensor, a tensor would be emptied, or groups of a convolution would differ in
            size. The model is as it was.
        UnsupportedLayerError: A layer cannot be cut (a masked or quantized one, say); the model is as it was.
        RankError: A low-rank layer would have a rank above what its new size admits; the model is as it was.
    """
    tensors = named_tensors(model)
    cuts = cuts_of(removals, tensors)
    less = _lowered(removals)
    by_module = _by_module(model, {id(tensors[name]): dims for name, dims in cuts.items()}, less)
    undo = contextlib.ExitStack()
    try:
        for name, dims in cuts.items():
            undo.callback(_set_data, tensors[name], tensors[name].data)
            _set_data(tensors[name], cut_tensor(tensors[name].data, dims))
        before = {module: (type(module), dict(vars(module))) for module, _, _ in by_module}
        for module, (cls, attributes) in before.items():
            undo.callback(_restore_attributes, module, attributes)
            undo.callback(object.__setattr__, module, "__class__", cls)  # a module's own may refuse
        for removal in removals:
            update_heads(model, removal.group, removal.units)
        shrink_attributes(model, less, {module: attributes for module, (_, attributes) in before.items()})
        for module, path, own in by_module:
            _update(module, path, own)
            _note_changes(module, *before[module], own)
            _drop_caches(module)
        release_fast_path(model)
    except BaseException:
        undo.close()
        raise
    return undo.close


@contextlib.contextmanager
def masked_units(model: nn.Module, removals: Sequence[Removal]) -> Iterator[None]:
    """Hold at zero, within a block, all slices of tensors that :func:`remove_units` would cut away.

    In place, so that no more than these slices is kept beside the model.
    """
    tensors = named_tensors(model)
    with contextlib.ExitStack() as undo:
        for name, dims in cuts_of(removals, tensors).items():
            data = tensors[name].data
            if 0 in data.stride():  # expanded: one number stands for many
                undo.callback(_set_data, tensors[name], data)
                data = data.clone(memory_format=torch.contiguous_format)
                _set_data(tensors[name], data)
            for dim, cut in dims.items():
                removed = torch.tensor(cut.removed, device=data.device)
                undo.callback(data.index_copy_, dim, removed, data.index_select(dim, removed))
                data.index_fill_(dim, removed, 0)
        yield


def cuts_of(removals: Sequence[Removal], tensors: Mapping[str, Tensor]) -> Cuts:
    """Return what ``removals`` take from each tensor.

    Args:
        removals: Units of groups.
        tensors: The tensors of the model, by every name.

    Raises:
        PlanError: There is no such tensor, dim or position, or nothing of a tensor would be left.
    """
    doomed: dict[tuple[str, int], set[int]] = {}
    for removal in removals:
        for member in removal.group.members:
            gone = doomed.setdefault((member.name, member.dim), set())
            gone.update(position for unit in removal.units for position in member.positions[unit])
    cuts: Cuts = {}
    for (name, dim), positions in doomed.items():
        tensor = tensors.get(name)
        size = 0 if tensor is None or dim >= tensor.dim() else tensor.shape[dim]
        if not positions:
            continue
        if not 0 <= min(positions) <= max(positions) < size:
            raise PlanError(f"remove_units: {name!r} has no positions {sorted(positions)[-3:]} in dim {dim}.")
        if len(positions) == size:
            raise PlanError(f"remove_units: nothing of dim {dim} of {name!r} would be left. Keep a unit at least.")
        cuts.setdefault(name, {})[dim] = Cut(size, tuple(sorted(positions)))
    return cuts


def cut_tensor(tensor: Tensor, dims: Mapping[int, Cut]) -> Tensor:
    """Return what is left of a tensor after the cuts along each dim, in its memory format."""
    left = tensor
    for dim, cut in dims.items():
        left = left.index_select(dim, torch.tensor(cut.kept, device=tensor.device))
    for dims_of_format, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dims_of_format and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout):
            left = left.contiguous(memory_format=layout)
    return left


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under all their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return dict(parameters) | dict(model.named_buffers(remove_duplicate=False))


def _lowered(removals: Sequence[Removal]) -> dict[Attribute, int]:
    """Return what is taken from each number that a module keeps."""
    less: collections.Counter[Attribute] = collections.Counter()
    for removal in removals:
        for source, count in removal.group.sizes:
            less[source] += count * len(removal.units)
    return dict(less)


def _by_module(
    model: nn.Module, cuts: Mapping[int, dict[int, Cut]], less: Mapping[Attribute, int]
) -> list[tuple[nn.Module, str, Cuts]]:
    """Return every module that a cut tensor is in, or whose attributes change, inner ones first.

    Each with its path, and the cuts by name inside it.
    """
    found = []
    owners = {source.module for source in less}
    for path, module in model.named_modules():
        own = {name: cuts[id(tensor)] for name, tensor in named_tensors(module).items() if id(tensor) in cuts}
        if own or path in owners:
            found.append((module, path, own))
    return found[::-1]


def _update(module: nn.Module, path: str, cuts: Cuts) -> None:
    """Set the attributes of one module by what was cut inside it."""
    try:
        if not isinstance(module, CompressedLayer):
            update_attributes(module, cuts)
            return
        if any("." not in name for name in cuts) and not module.rearranges:
            raise UnsupportedLayerError(
                f"{type(module).__name__}: channels cannot be removed from a layer that holds its weight in a form of "
                "its own (masked, quantized, shared, ...). Remove filters before."
            )
        module.resize_to_stages_()
        type(module).empty(device="meta", dtype=None, **module.config())  # raises where no such layer can be built
    except LowRankError as error:
        raise error.at(path) from error


def _note_changes(module: nn.Module, cls: type[nn.Module], before: dict[str, Any], cuts: Cuts) -> None:
    """Mark a module that holds cut tensors itself, or whose class or attributes changed, as a smaller one."""
    now = vars(module)
    changed = [
        name
        for name, value in before.items()
        if name not in MODULE_TABLES and now[name] is not value and now[name] != value
    ]
    if changed or type(module) is not cls or any("." not in name for name in cuts):
        mark_resized(module, changed)
    # No file holds a buffer that is not persistent, and no fresh model has it in this size.
    hidden = module._non_persistent_buffers_set
    module._non_persistent_buffers_set = hidden - cuts.keys()


def _drop_caches(module: nn.Module) -> None:
    """Forget tensors that a module keeps in dicts of its own: they were computed of larger ones."""
    for name, value in list(vars(module).items()):
        if type(value) is dict and name not in MODULE_TABLES and any(isinstance(x, Tensor) for x in value.values()):
            vars(module)[name] = {key: item for key, item in value.items() if not isinstance(item, Tensor)}


def _restore_attributes(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name in vars(module).keys() - attributes.keys():
        del vars(module)[name]
    vars(module).update(attributes)


def _set_data(tensor: Tensor, data: Tensor) -> None:
    # A parameter keeps its identity: whoever shares it, hooks it or optimizes it goes on.
    tensor.grad = None
    tensor.data = data
