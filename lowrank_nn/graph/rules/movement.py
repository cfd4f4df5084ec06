"""Operations that move, copy or leave out elements: the same is done with the labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_nn.graph.inputs import tensors
from lowrank_nn.graph.labels import Labels, concatenate, in_groups, move
from lowrank_nn.graph.rules._call import RULES, Call, Planes, rule_for
from lowrank_nn.graph.rules.mixing import mix_all
from lowrank_nn.graph.sizes import flat_sizes

RESHAPES: dict[Any, Any] = {Tensor.view: Tensor.reshape, Tensor.view_as: Tensor.reshape_as}
"""Expanded labels do not have the strides that a view may ask for."""


def moved(call: Call, labels: Labels) -> list[Planes]:
    """Run the function once more, on the labels in place of the first argument."""
    function: Callable[..., Any] = RESHAPES.get(call.function, call.function)

    def operation(ids: Tensor) -> Sequence[Tensor]:
        if call.args:
            return list(tensors(function(ids, *on_cpu(call.args[1:]), **on_cpu(call.kwargs))))
        name, *_ = call.kwargs
        return list(tensors(function(**{**on_cpu(call.kwargs), name: ids})))

    return move(call.units, labels, operation, call.where) or [[]]


def on_cpu(value: Any) -> Any:
    """Return arguments with their tensors on the CPU, where labels are."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: on_cpu(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(on_cpu(item) for item in value)
    return value


@rule_for(
    """view_as reshape_as flatten ravel permute transpose swapaxes swapdims movedim moveaxis t T
    mT H mH adjoint squeeze unsqueeze flip fliplr flipud rot90 diagonal
    atleast_1d atleast_2d atleast_3d repeat_interleave
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle"""
)
def movement(call: Call) -> list[Planes]:
    """Move the labels along."""
    return moved(call, call.first)


RULES[Tensor.unfold] = movement


@rule_for("view reshape")
def reshape(call: Call) -> list[Planes]:
    """Move the labels along; sizes that are attributes of modules follow the units along their dim."""
    results = moved(call, call.first)
    shape = [*call.args[1:], *(value for name, value in call.kwargs.items() if name != "input")]
    return _sized(call, results, list(flat_sizes(shape)), 0)


@rule_for("unflatten")
def unflatten(call: Call) -> list[Planes]:
    """One dim as several, as :func:`reshape`."""
    dim = call.argument(1, "dim") % len(call.first.shape)
    return _sized(call, moved(call, call.first), list(flat_sizes([call.argument(2, "sizes")])), dim)


def _sized(call: Call, results: list[Planes], sizes: Sequence[int], first: int) -> list[Planes]:
    """Note the sizes that the forward gives to the dims from ``first`` on."""
    for plane, (dim, size) in itertools.product(results[0], enumerate(sizes, first)):
        call.note_size(size, plane, dim)
    return results


@rule_for("expand expand_as broadcast_to repeat tile")
def expansion(call: Call) -> list[Planes]:
    """Move the labels along; copies made of single elements go with whatever they meet."""
    planes = moved(call, call.first)[0]
    (shape,) = call.shapes
    front = len(shape) - len(call.first.shape)
    for dim, size in enumerate(shape):
        if size > 1 and (dim < front or call.first.shape[dim - front] == 1):
            planes.append(whole_dim(call, dim, size, len(shape)))
    return [planes]


def whole_dim(call: Call, dim: int, size: int, dims: int) -> Tensor:
    """Return a plane of new units along a dimension that has the size that the forward asks for."""
    return call.units.fresh(size)[(*(None,) * dim, slice(None), *(None,) * (dims - 1 - dim))]


@rule_for("zeros ones full empty new_zeros new_ones new_full new_empty")
def filled(call: Call) -> list[Planes]:
    """Equal elements: how many is for the forward to say."""
    (shape,) = call.shapes
    planes = [whole_dim(call, dim, size, len(shape)) for dim, size in enumerate(shape) if size > 1]
    return _sized(call, [planes], list(flat_sizes([*call.args, call.kwargs.get("size", ())]))[: len(shape)], 0)


@rule_for("cat concat concatenate")
def cat(call: Call) -> list[Planes]:
    """Units of the parts stay apart."""
    return [_cat(call, call.argument(1, "dim", call.kwargs.get("axis", 0)))]


STACKED_ALONG = {torch.vstack: 0, torch.hstack: 1, torch.dstack: 2}


@rule_for("vstack hstack dstack")
def cat_along(call: Call) -> list[Planes] | None:
    """Concatenation along a certain dimension; None for tensors to which this adds dimensions."""
    if any(len(labels.shape) != len(call.shapes[0]) for labels in call.operands()):
        return None
    return [_cat(call, min(STACKED_ALONG[call.function], len(call.shapes[0]) - 1))]


def _cat(call: Call, dim: int) -> Planes:
    parts = [labels for labels in call.operands() if labels.shape != (0,)]
    return concatenate(call.units, parts, dim % len(call.shapes[0]), call.where)


@rule_for("stack")
def stack(call: Call) -> list[Planes]:
    """As concatenation, along a new dimension."""
    (shape,) = call.shapes
    dim = call.argument(1, "dim", 0) % len(shape)
    index = (*(slice(None),) * dim, None)
    parts = [
        Labels((*p.shape[:dim], 1, *p.shape[dim:]), tuple(plane[index] for plane in p.planes)) for p in call.operands()
    ]
    return [concatenate(call.units, parts, dim, call.where)]


def unfold(call: Call) -> list[Planes]:
    """Patches as columns (im2col): each channel becomes one row for every tap."""
    count = len(call.first.shape)
    planes = [plane[..., 0] for plane in mix_all(call, call.first, [count - 2, count - 1])]
    taps = call.shapes[0][-2] // call.first.shape[-3]
    return [[plane.repeat_interleave(taps, dim=-2) if plane.shape[-2] > 1 else plane for plane in planes]]


def fold(call: Call) -> list[Planes]:
    """The inverse of ``unfold``: the taps of a channel are summed."""
    rows = len(call.first.shape) - 2
    return [mix_all(call, in_groups(call.first, rows, call.shapes[0][-3]), [rows + 1, rows + 2])]


RULES[F.unfold] = unfold
RULES[F.fold] = fold
