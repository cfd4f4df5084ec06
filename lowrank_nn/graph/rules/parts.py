"""Operations that take or change parts of a tensor: some parts shrink together, others are read by number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_nn.graph.inputs import tensors
from lowrank_nn.graph.labels import Labels, compact, merge, mix, move, split_dim, support
from lowrank_nn.graph.rules._call import Call, Planes, aligned, normal_dims, rule_for
from lowrank_nn.graph.rules.mixing import mix_all
from lowrank_nn.graph.rules.movement import moved, on_cpu
from lowrank_nn.graph.sizes import flat_sizes

_MULTIPLES = 4
"""Up to this many parts as large as the smallest, listed sizes are taken for multiples of one width: q, (k, v)."""


@rule_for("roll")
def roll(call: Call) -> list[Planes]:
    """Moves around an edge: exact where all along that dimension stays or goes."""
    dims = call.argument(2, "dims")
    return moved(call, _read_by_number(call, call.first, normal_dims(dims, len(call.first.shape))))


@rule_for("chunk tensor_split unsafe_chunk hsplit vsplit dsplit")
def equal_parts(call: Call) -> list[Planes]:
    """Equal parts shrink together; unequal ones do not."""
    dim, sizes = _parts(call)
    _tie_parts(call, call.first, dim, sizes)
    return moved(call, call.first)


@rule_for("split split_with_sizes unsafe_split")
def split(call: Call) -> list[Planes]:
    """Parts whose sizes are all attributes of modules shrink each on its own, and these follow.

    Of other sizes in a list, multiples of the smallest shrink in proportion; else those that are equal, together.
    """
    dim, sizes = _parts(call)
    named = [value for name, value in call.kwargs.items() if name not in ("tensor", "input", "dim")]
    given = list(flat_sizes([*call.args[1:2], *named]))
    kept_by = [source for size in given if (source := call.source(size)) is not None]
    if len(given) == len(sizes) == len(kept_by):
        for parts in (torch.split_with_sizes(p, sizes, dim) for p in call.first.planes if p.shape[dim] > 1):
            for source, part in zip(kept_by, parts, strict=True):  # parts of which one number is the size lose the same
                call.units.unite(parts[kept_by.index(source)], part, f"meets what stays in {call.where}")
    elif len(given) == len(sizes) > 1:
        _tie_listed(call, call.first, dim, sizes)
    else:
        _tie_parts(call, call.first, dim, sizes)
    results = moved(call, call.first)
    for size, planes in zip(given, results, strict=False):  # a single size is that of the first part too
        for plane in planes:
            call.note_size(size, plane, dim)
    return results


def _parts(call: Call) -> tuple[int, list[int]]:
    """Return the dimension along which a tensor was split, and the sizes of the parts."""
    shapes = call.shapes
    differ = [d for d, sizes in enumerate(zip(*shapes, call.first.shape, strict=True)) if len({*sizes}) > 1]
    dim = differ[0] if differ else 0  # without, there is one part or none is smaller
    return dim, [shape[dim] for shape in shapes]


def _tie_parts(call: Call, labels: Labels, dim: int, sizes: Sequence[int]) -> None:
    for plane in labels.planes:
        if plane.shape[dim] == 1:
            continue
        if len(set(sizes)) > 1 or sum(sizes) != plane.shape[dim]:
            call.units.freeze(plane, f"split into parts of {', '.join(map(str, sizes))} by {call.where}")
        else:
            parts = split_dim(plane, dim, sizes[0])
            call.units.unite(parts, parts.narrow(dim, 0, 1), f"meets what stays in {call.where}")


def _tie_listed(call: Call, labels: Labels, dim: int, sizes: Sequence[int]) -> None:
    least, total = min(sizes), sum(sizes)
    if all(least and size % least == 0 for size in sizes) and total <= _MULTIPLES * least:
        _tie_parts(call, labels, dim, [least] * (total // least))
        return
    for parts in (torch.split_with_sizes(p, list(sizes), dim) for p in labels.planes if p.shape[dim] > 1):
        for size, part in zip(sizes, parts, strict=True):
            if sizes.count(size) > 1:
                call.units.unite(parts[sizes.index(size)], part, f"meets what stays in {call.where}")
            else:
                call.units.freeze(part, f"split into parts of {', '.join(map(str, sizes))} by {call.where}")


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


@rule_for("scatter scatter_add scatter_reduce index_add index_copy")
def scatter(call: Call) -> list[Planes]:
    """Elements go to positions along a dimension, by number; along the others they meet what stands there."""
    dim, index = call.argument(1, "dim") % len(call.first.shape), call.argument(2, "index")
    named = [value for name, value in call.kwargs.items() if name not in ("dim", "index", "input")]
    written = [call.labels(tensor) for tensor in tensors([call.args[3:], named])]
    if index.dim() == len(call.first.shape):
        written.append(call.labels(index))
    else:
        _keep_indices(call, index)
    mixed = [Labels(labels.shape, tuple(mix_all(call, labels, [dim]))) for labels in (call.first, *written)]
    return [merge(call.units, mixed, call.where)]


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
    """Tie the equal parts, or equal steps, of which a slice takes one; else all along ``dim``.

    Where a part begins or ends at an attribute of a module, that follows, and nothing has to be tied.
    """
    size = labels.shape[dim]
    start, stop, step = part.indices(size)
    if (start, stop, step) == (0, size, 1):
        return labels
    border = part.stop if start == 0 else part.start
    at_an_end = step == 1 and start < stop and 0 in (start, size - stop)
    if at_an_end and border in (start, stop) and call.source(border) is not None:  # x[: self.width]
        for plane in labels.planes:
            call.note_size(border, plane.narrow(dim, 0, border) if plane.shape[dim] > 1 else plane, dim)
        return labels
    length = stop - start
    if step == 1 and length > 1 and size % length == 0 and start % length == 0:  # the second of three: x[c : 2 * c]
        _tie_parts(call, labels, dim, [length] * (size // length))
        return labels
    if step > 1 and size % step == 0 and len(range(start, stop, step)) == size // step:  # every other one: x[1::2]
        for plane in labels.planes:
            if plane.shape[dim] > 1:
                parts = split_dim(plane, dim, step)
                call.units.unite(parts, parts.narrow(dim + 1, 0, 1), f"meets what stays in {call.where}")
        return labels
    if step > 1 or start >= stop:
        return _read_by_number(call, labels, [dim])
    return _keep_up_to(call, labels, dim, [border for border in (part.start, part.stop) if border is not None])


def _keep_up_to(call: Call, labels: Labels, dim: int, borders: Sequence[int]) -> Labels:
    """Keep all between an end of a dimension and borders that are counted from there: their numbers still hold then."""
    if any(dim in support(plane) and len(support(plane)) > 1 for plane in labels.planes):
        return _read_by_number(call, labels, [dim])
    for plane in labels.planes:
        for border in borders if dim in support(plane) else ():
            counted = torch.arange(plane.shape[dim])[: border if border >= 0 else None][min(border, 0) :]
            call.units.freeze(plane.index_select(dim, counted), f"counted by {call.where}, which reads by number")
    return labels


@rule_for("__getitem__")
def getitem(call: Call) -> list[Planes]:
    """Slices as parts, all other indices by number."""
    _keep_indices(call, call.args[1])
    labels = call.first
    for dim, index in _indices(call.args[1], len(labels.shape)):
        if isinstance(index, slice):
            labels = _slice(call, labels, dim, index)
        elif isinstance(index, int):
            labels = _keep_up_to(call, labels, dim, [index + 1 if index >= 0 else index])
        else:
            labels = _read_by_number(call, labels, [dim])
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
    (planes,) = move(call.units, target, lambda ids: [ids[on_cpu(index)]], call.where) or [[]]
    written = Labels(tuple(part.shape), tuple(planes))
    merge(call.units, [written, aligned(value, len(written.shape))], call.where)
    return [list(target.planes)]


def _indices(index: Any, dims: int) -> Iterator[tuple[int, Any]]:
    """Yield the dimensions that an index reads, each with its part of the index."""
    parts = list(index) if isinstance(index, tuple) else [index]
    ellipsis = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    first, last = ([p for p in side for _ in range(_width(p))] for side in (parts[:ellipsis], parts[ellipsis + 1 :]))
    yield from enumerate(first)
    yield from enumerate(last, dims - len(last))


def _width(part: Any) -> int:
    """Return how many dimensions a part of an index reads: a mask as many as it has, None adds one and reads none."""
    if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8):
        return part.dim()
    return 0 if part is None or isinstance(part, bool) else 1


@rule_for("pad constant_pad_nd")
def pad(call: Call) -> list[Planes]:
    """Added elements go with the channel that they belong to; those added as channels never go."""
    widths, labels = list(call.argument(1, "pad")), call.first
    count = len(labels.shape)
    pairs = {count - 1 - i: (widths[2 * i], widths[2 * i + 1]) for i in range(len(widths) // 2)}
    touched = [dim for dim, pair in pairs.items() if pair != (0, 0)]
    copies = call.function is F.pad and call.argument(2, "mode", "constant") != "constant"
    if copies or min(widths) < 0:
        return [mix_all(call, labels, touched)]
    planes = []
    for plane in labels.planes:
        own = [pairs.get(dim, (0, 0)) if plane.shape[dim] > 1 else (0, 0) for dim in reversed(range(count))]
        planes.append(F.pad(plane, [width for pair in own for width in pair]))
    return [compact(call.units, planes, call.where)]
