"""Operations that move, copy or leave out elements: the same is done with the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_nn.graph.inputs import tensors
from lowrank_nn.graph.labels import Labels, compact, concatenate, merge, mix, move, split_dim, support
from lowrank_nn.graph.rules._call import RULES, Call, Planes, aligned, normal_dims, rule_for

RESHAPES: dict[Any, Any] = {Tensor.view: Tensor.reshape, Tensor.view_as: Tensor.reshape_as}
"""Expanded labels do not have the strides that a view may ask for."""


def moved(call: Call, labels: Labels) -> list[Planes]:
    """Run the function once more, on the labels in place of the first argument."""
    function: Callable[..., Any] = RESHAPES.get(call.function, call.function)

    def operation(ids: Tensor) -> Sequence[Tensor]:
        if call.args:
            return list(tensors(function(ids, *_on_cpu(call.args[1:]), **_on_cpu(call.kwargs))))
        name, *_ = call.kwargs
        return list(tensors(function(**{**_on_cpu(call.kwargs), name: ids})))

    return move(call.units, labels, operation, call.where) or [[]]


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: _on_cpu(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value


@rule_for(
    """view reshape view_as reshape_as flatten unflatten ravel permute transpose swapaxes swapdims movedim moveaxis t T
    mT H mH adjoint squeeze unsqueeze flip fliplr flipud rot90 diagonal
    atleast_1d atleast_2d atleast_3d repeat_interleave
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle"""
)
def movement(call: Call) -> list[Planes]:
    """Move the labels along."""
    return moved(call, call.first)


RULES[Tensor.unfold] = movement


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
    return [[whole_dim(call, dim, size, len(shape)) for dim, size in enumerate(shape) if size > 1]]


@rule_for("roll")
def roll(call: Call) -> list[Planes]:
    """Moves around an edge: exact where all along that dimension stays or goes."""
    dims = call.argument(2, "dims")
    return moved(call, _read_by_number(call, call.first, normal_dims(dims, len(call.first.shape))))


@rule_for("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split hsplit vsplit dsplit")
def split(call: Call) -> list[Planes]:
    """Equal parts shrink together; unequal ones do not."""
    shapes = call.shapes
    changed = [d for d, sizes in enumerate(zip(*shapes, call.first.shape, strict=True)) if len({*sizes}) > 1]
    for dim in changed:
        _tie_parts(call, call.first, dim, [shape[dim] for shape in shapes])
    return moved(call, call.first)


def _tie_parts(call: Call, labels: Labels, dim: int, sizes: Sequence[int]) -> None:
    for plane in labels.planes:
        if plane.shape[dim] == 1:
            continue
        if len(set(sizes)) > 1 or sum(sizes) != plane.shape[dim]:
            call.units.freeze(plane, f"split into parts of {', '.join(map(str, sizes))} by {call.where}")
        else:
            parts = split_dim(plane, dim, sizes[0])
            call.units.unite(parts, parts.narrow(dim, 0, 1), f"meets what stays in {call.where}")


@rule_for("glu")
def glu(call: Call) -> list[Planes]:
    """One half times a function of the other."""
    dim = call.argument(1, "dim", -1) % len(call.first.shape)
    half = call.first.shape[dim] // 2
    _tie_parts(call, call.first, dim, [half, half])
    return move(call.units, call.first, lambda ids: [ids.narrow(dim, 0, half)], call.where) or [[]]


@rule_for("unbind")
def unbind(call: Call) -> list[Planes]:
    """Take apart what was stacked: all parts shrink together."""
    dim = call.argument(1, "dim", 0)
    return moved(call, _read_by_number(call, call.first, normal_dims(dim, len(call.first.shape))))


@rule_for("select index_select gather take_along_dim")
def select(call: Call) -> list[Planes]:
    """Positions along a dimension, by number."""
    _keep_indices(call, [call.args[1:], call.kwargs])
    dim = call.argument(2 if call.function is torch.take_along_dim else 1, "dim")
    return moved(call, _read_by_number(call, call.first, normal_dims(dim, len(call.first.shape))))


def _keep_indices(call: Call, indices: Any) -> None:
    for tensor in tensors(indices):
        call.units.freeze(call.labels(tensor).ids(), f"used as an index by {call.where}")


def _read_by_number(call: Call, labels: Labels, dims: Sequence[int]) -> Labels:
    """Unite all along ``dims``: after a removal the numbers would mean other positions."""
    planes = []
    for plane in labels.planes:
        if support(plane) & set(dims):
            kept = mix(call.units, plane, dims, f"{call.where}, which reads by number")
            # The ids stay in place: the function is to run on all of them.
            planes.extend([] if kept is None else [plane])
        else:
            planes.append(plane)
    return Labels(labels.shape, tuple(planes), labels.constant)


@rule_for("narrow")
def narrow(call: Call) -> list[Planes]:
    """A part of a dimension."""
    dim = call.argument(1, "dim") % len(call.first.shape)
    start, length = call.argument(2, "start"), call.argument(3, "length")
    if isinstance(start, Tensor):
        return moved(call, _read_by_number(call, call.first, [dim]))
    return moved(call, _slice(call, call.first, dim, slice(start, start + length)))


def _slice(call: Call, labels: Labels, dim: int, part: slice) -> Labels:
    """Tie the equal parts, or equal steps, of which a slice takes one; else all along ``dim``."""
    size = labels.shape[dim]
    start, stop, step = part.indices(size)
    if (start, stop, step) == (0, size, 1):
        return labels
    if step == 1 and stop > start and size % (stop - start) == 0 and start % (stop - start) == 0:
        _tie_parts(call, labels, dim, [stop - start] * (size // (stop - start)))
        return labels
    if step > 1 and size % step == 0 and len(range(start, stop, step)) == size // step:
        for plane in labels.planes:
            if plane.shape[dim] > 1:
                parts = split_dim(plane, dim, step)
                call.units.unite(parts, parts.narrow(dim + 1, 0, 1), f"meets what stays in {call.where}")
        return labels
    return _read_by_number(call, labels, [dim])


@rule_for("__getitem__")
def getitem(call: Call) -> list[Planes]:
    """Slices as parts, all other indices by number."""
    _keep_indices(call, call.args[1])
    labels = call.first
    for dim, index in _indices(call.args[1], len(labels.shape)):
        sliced = isinstance(index, slice)
        labels = _slice(call, labels, dim, index) if sliced else _read_by_number(call, labels, [dim])
    return moved(call, labels)


@rule_for("__setitem__")
def setitem(call: Call) -> list[Planes]:
    """Part of a tensor becomes another one: what meets goes together, and the tensor's own units stay what they are."""
    index, value = call.args[1], call.labels(call.args[2])
    _keep_indices(call, index)
    whole = slice(None)
    numbered = [dim for dim, part in _indices(index, len(call.first.shape)) if part != whole]
    target = _read_by_number(call, call.first, numbered)
    part = call.args[0][index]
    moved_planes = move(call.units, target, lambda ids: [ids[_on_cpu(index)]], call.where) or [[]]
    written = Labels(tuple(part.shape), tuple(moved_planes[0]))
    merge(call.units, [written, aligned(value, len(written.shape))], call.where)
    return [list(target.planes)]


def _indices(index: Any, dims: int) -> Iterator[tuple[int, Any]]:
    """Yield the dimensions that an index reads, each with its part of the index."""
    parts = list(index) if isinstance(index, tuple) else [index]
    ellipsis = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    last = [part for part in parts[ellipsis + 1 :] if part is not None]
    dim = 0
    for part in parts[:ellipsis]:
        if part is not None:
            for _ in range(_width(part)):
                yield dim, part
                dim += 1
    dim = dims - sum(_width(part) for part in last)
    for part in last:
        for _ in range(_width(part)):
            yield dim, part
            dim += 1


def _width(part: Any) -> int:
    """Return how many dimensions a part of an index reads: a mask as many as it has."""
    if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8):
        return part.dim()
    return 0 if isinstance(part, bool) else 1


@rule_for("cat concat concatenate hstack vstack dstack")
def cat(call: Call) -> list[Planes]:
    """Units of the parts stay apart."""
    parts = [labels for labels in call.operands() if labels.shape != (0,)]
    (shape,) = call.shapes
    default = next((d for d, sizes in enumerate(zip(*(p.shape for p in parts), shape)) if len({*sizes}) > 1), 0)  # noqa: B905
    dim = default if "stack" in call.where else call.argument(1, "dim", call.kwargs.get("axis", 0))
    return [concatenate(call.units, parts, dim % len(shape), call.where)]


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


@rule_for("pad constant_pad_nd")
def pad(call: Call) -> list[Planes]:
    """Added elements go with the channel that they belong to; those added as channels never go."""
    widths, labels = list(call.argument(1, "pad")), call.first
    count = len(labels.shape)
    pairs = {count - 1 - i: (widths[2 * i], widths[2 * i + 1]) for i in range(len(widths) // 2)}
    touched = [dim for dim, widths in pairs.items() if widths != (0, 0)]
    mode = call.argument(2, "mode", "constant")
    shrinks = any(min(pairs[dim]) < 0 for dim in touched)
    if shrinks or (isinstance(mode, str) and mode != "constant"):
        labels = _read_by_number(call, labels, touched)
    planes = []
    for plane in labels.planes:
        own = [pairs[d] if d in pairs and plane.shape[d] > 1 else (0, 0) for d in reversed(range(count))]
        same = not shrinks and (not isinstance(mode, str) or mode == "constant")
        ids = F.pad(plane, [width for pair in own for width in pair]) if same else plane[_firsts(plane, touched)]
        kept = compact(call.units, ids, call.where)
        planes.extend([] if kept is None else [kept])
    return [planes]


def _firsts(plane: Tensor, dims: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(plane.dim()))


def unfold(call: Call) -> list[Planes]:
    """Patches as columns (im2col): each channel becomes one row for every tap."""
    planes = _over_space(call)
    taps = call.shapes[0][-2] // call.first.shape[-3]
    return [[plane.repeat_interleave(taps, dim=-2) if plane.shape[-2] > 1 else plane for plane in planes]]


def _over_space(call: Call) -> Planes:
    """Return the planes with space as one dimension, mixed."""
    mixed = [
        mix(call.units, plane, [plane.dim() - 2, plane.dim() - 1], call.where)
        if support(plane) & {plane.dim() - 2, plane.dim() - 1}
        else plane
        for plane in call.first.planes
    ]
    return [plane[..., 0] for plane in mixed if plane is not None]


def fold(call: Call) -> list[Planes]:
    """The inverse of ``unfold``: the taps of a channel are summed."""
    taps = call.first.shape[-2] // call.shapes[0][-3]
    planes = []
    for plane in call.first.planes:
        split = split_dim(plane, plane.dim() - 2, taps) if plane.shape[-2] > 1 else plane.unsqueeze(-2)
        dims = [split.dim() - 2, split.dim() - 1]
        kept = mix(call.units, split, dims, call.where) if support(split) & {*dims} else split
        planes.extend([] if kept is None else [kept])
    return [planes]


RULES[F.unfold] = unfold
RULES[F.fold] = fold
