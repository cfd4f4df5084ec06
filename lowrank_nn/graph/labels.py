"""Labels: for every element of a tensor, the unit that it goes with.

The output ``(N, C, H, W)`` of a convolution has one plane, ``(1, C, 1, 1)``: the id of the unit of each filter.
Flattened from dim 1 on it has one of shape ``(1, C * H * W)``, each id H * W times in a row; concatenated with the
output of another convolution along dim 1, one of shape ``(1, C + C', 1, 1)``, with the ids of both.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lowrank_nn.graph.units import IN, OUT, Mean, Units, broadcast


@dataclasses.dataclass(frozen=True)
class Labels:
    """The units that the elements of a tensor go with.

    Attributes:
        shape: Shape of the tensor.
        planes: Ids, each of the tensor's number of dimensions and of size 1 along those on which it does not vary, on
            one at least. An element goes when the unit of any plane does. A parameter has a plane for each of its
            dimensions, what a layer returns usually one, for its channels.
        constant: 0 for what depends on the inputs; else 1 for what comes from buffers alone, 2 from parameters too.
        means: Means over units that the tensor was computed of, and that have not met these units again.
    """

    shape: tuple[int, ...]
    planes: tuple[Tensor, ...] = ()
    constant: int = 0
    means: tuple[Mean, ...] = ()

    def ids(self) -> Tensor:
        """Return all ids."""
        nothing = torch.zeros(1, dtype=torch.int64, device="cpu")
        return torch.cat([nothing, *(plane.reshape(-1) for plane in self.planes), *(mean.ids for mean in self.means)])


def support(plane: Tensor) -> frozenset[int]:
    """Return the dimensions along which a plane varies."""
    return frozenset(dim for dim, size in enumerate(plane.shape) if size > 1)


def compact(units: Units, planes: Iterable[Tensor | None], where: str) -> list[Tensor]:
    """Return the planes, each with size 1 along all dimensions on which it does not vary; without those of zeros.

    A tensor that would go as a whole cannot go: its unit is frozen.
    """
    return [kept for plane in planes if (kept := _compact(units, plane, where)) is not None]


def _compact(units: Units, plane: Tensor | None, where: str) -> Tensor | None:
    if plane is None or not plane.any():
        return None
    for dim in support(plane):
        first = plane.narrow(dim, 0, 1)
        if plane.stride(dim) == 0 or torch.equal(units.roots(plane), units.roots(first).expand_as(plane)):
            plane = first
    if support(plane):
        return plane
    units.freeze(plane, f"its channels can only go all at once: {where}")
    return None


def split_dim(plane: Tensor, dim: int, size: int) -> Tensor:
    """Return ``plane`` with a dimension as two, the inner one of this ``size``; both of size 1 where it was."""
    inner = min(size, plane.shape[dim])
    return plane.reshape(*plane.shape[:dim], -1, inner, *plane.shape[dim + 1 :])


def join_dims(plane: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Undo :func:`split_dim`: the dimension and the one behind it, of a tensor with these ``sizes``, as one."""
    if plane.shape[dim] == plane.shape[dim + 1] == 1:
        return plane.squeeze(dim)
    return plane.expand(*plane.shape[:dim], *sizes, *plane.shape[dim + 2 :]).flatten(dim, dim + 1)


def in_groups(labels: Labels, dim: int, groups: int) -> Labels:
    """Return ``labels`` with a dimension as two: the groups, and what is in each."""
    size = labels.shape[dim] // groups
    shape = (*labels.shape[:dim], groups, size, *labels.shape[dim + 1 :])
    planes = tuple(split_dim(plane, dim, size) for plane in labels.planes)
    return dataclasses.replace(labels, shape=shape, planes=planes)


def mix(units: Units, plane: Tensor, dims: Iterable[int], where: str) -> Tensor | None:
    """Unite what an operation mixes along ``dims``; None if that is all of the plane, whose units are then frozen."""
    dims = support(plane) & set(dims)
    if not dims:
        return plane
    if dims == support(plane):
        units.freeze(plane, f"mixed by {where}")
        return None
    first = plane
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    units.unite(plane, first, f"mixed by {where}")
    return first if first.any() else None


def merge(units: Units, operands: Sequence[Labels], where: str) -> list[Tensor]:
    """Return the planes of what an element-wise operation makes of operands with equally many dimensions.

    Ids at the same place of several operands are united. An operand of size 1 along the dimensions on which a plane
    varies says nothing about it; one that has all those elements, and no units for them, freezes the plane.
    """
    planes = [(index, plane) for index, labels in enumerate(operands) for plane in _that_go(units, labels.planes)]
    planes = _one_of_each(units, _choose_dims(units, planes, where), where)
    merged: list[tuple[Tensor, set[int]]] = []  # and which operands each plane is of
    for index, plane in planes:
        combined, members, apart = plane, {index}, []
        for known, others in merged:
            if support(known) & support(plane) and others != {index}:
                units.unite(known, combined, f"meets what stays in {where}")
                combined, members = _first_ids(known, combined), members | others
            else:
                apart.append((known, others))
        merged = [*apart, (combined, members)]

    def meet_the_rest(plane: Tensor, members: set[int]) -> Tensor | None:
        shapes = [labels.shape for index, labels in enumerate(operands) if index not in members]
        return _meet_constants(units, plane, shapes, where)

    return compact(units, itertools.starmap(meet_the_rest, merged), where)


def _that_go(units: Units, planes: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the planes but for those that stay in any case where two of them vary along the same dimension."""
    if sum(map(len, map(support, planes))) == len(frozenset().union(*map(support, planes))):
        return planes
    return [plane for plane in planes if not units.stay(plane)]


def _choose_dims(units: Units, planes: list[tuple[int, Tensor]], where: str) -> list[tuple[int, Tensor]]:
    """Settle planes over several dimensions of which another operand has one but not the first.

    Heads x channels times one factor per channel: removed are whole heads, not the same channel of every head.
    """
    chosen = []
    for index, plane in planes:
        dims = support(plane)
        inner = [support(p) for i, p in planes if i != index and support(p) < dims and min(dims) not in support(p)]
        kept = mix(units, plane, frozenset().union(*inner), where) if inner else plane
        if kept is not None:
            chosen.append((index, kept))
    return chosen


def _one_of_each(units: Units, planes: list[tuple[int, Tensor]], where: str) -> list[tuple[int, Tensor]]:
    """Settle which of several planes of one operand along a dimension the others meet: one that is divided alike.

    Channels x positions, flattened, against a tensor that has such blocks of channels; others of them stay.
    """
    chosen = []
    for index, plane in planes:
        own = [p for i, p in planes if i == index and support(p) & support(plane)]
        others = [p for i, p in planes if i != index and support(p) & support(plane)]
        if len(own) > 1 and others:
            alike = [p for p in own if any(units.alike(p, other) for other in others)]
            best = [*alike, *(p for p in own if not units.virtual(p)), *own][0]
            if not units.alike(plane, best):
                units.freeze(plane, f"meets a tensor that has no such channels in {where}")
                continue
        chosen.append((index, plane))
    return chosen


def _first_ids(first: Tensor, second: Tensor) -> Tensor:
    first, second = broadcast(first, second)
    return torch.where(first != 0, first, second)


def _meet_constants(units: Units, plane: Tensor, shapes: Sequence[tuple[int, ...]], where: str) -> Tensor | None:
    """Return ``plane`` after meeting tensors without units for it; None where all of it is frozen."""
    kept: Tensor | None = plane
    for shape in shapes:
        if kept is None:
            return None
        dims = support(kept)
        full = {dim for dim in dims if shape[dim] > 1}
        if full == dims:
            units.freeze(kept, f"meets a tensor that has no such channels in {where}")
            kept = None if units.virtual(kept) else kept
        elif full:
            kept = mix(units, kept, full, where)
    return kept


def contract(
    units: Units, operands: Sequence[tuple[Labels, str]], out: str, where: str, weight: int | None = None
) -> list[Tensor]:
    """Return the planes of a sum of products, as ``torch.einsum`` would write it.

    Args:
        units: The units.
        operands: Labels, with one letter per dimension.
        out: Letters of the result.
        where: What does it, for reasons.
        weight: Which operand is a layer's weight: it computes the units along ``out``, and reads the others.
    """
    sizes = [dict(zip(letters, labels.shape, strict=True)) for labels, letters in operands]
    letters = out + "".join(dict.fromkeys(x for _, own in operands for x in own if x not in out))
    aligned = []
    for index, (labels, own) in enumerate(operands):
        others = [size for i, size in enumerate(sizes) if i != index]
        shared = {x for x in own if any(size.get(x, 1) > 1 for size in others)}
        planes = [_separate(units, plane, own, out, shared, where) for plane in labels.planes]
        shape = tuple(sizes[index].get(x, 1) for x in letters)
        spread = [_spread(plane, own, letters) for plane in planes if plane is not None]
        if index == weight:
            for plane in spread:
                units.mark(plane.reshape(-1), OUT if max(support(plane)) < len(out) else IN)
        aligned.append(Labels(shape, tuple(spread), labels.constant))
    kept = []
    for plane in merge(units, aligned, where):
        dims = support(plane)
        if max(dims) < len(out):
            kept.append(plane.reshape(plane.shape[: len(out)]))
        elif min(dims) < len(out):
            units.freeze(plane, f"mixed by {where}")
    return kept


def _separate(units: Units, plane: Tensor, own: str, out: str, shared: set[str], where: str) -> Tensor | None:
    """Have a plane vary along letters that are summed over, or along letters of the result, not both.

    Where the operands share one of the latter (heads), whole heads are units: the inner size goes into the scale of
    attention. Else the sum is the same for all positions (tokens before a linear layer).
    """
    summed = {dim for dim in support(plane) if own[dim] not in out}
    kept = support(plane) - summed
    if not summed or not kept:
        return plane
    return mix(units, plane, summed if {own[dim] for dim in kept} & shared else kept, where)


def _spread(plane: Tensor, own: str, letters: str) -> Tensor:
    """Return a plane with its dimensions in the order of ``letters``, and size 1 for those that it has not."""
    order = [own.index(letter) for letter in letters if letter in own]
    shape = [plane.shape[own.index(letter)] if letter in own else 1 for letter in letters]
    return plane.permute(order).reshape(shape)


def move(
    units: Units, labels: Labels, operation: Callable[[Tensor], Sequence[Tensor]], where: str
) -> list[list[Tensor]]:
    """Return the planes of each result of an ``operation`` that only moves, copies or leaves out elements."""
    results: list[list[Tensor]] = []
    for plane in labels.planes:
        moved = operation(plane.expand(labels.shape))
        results = results or [[] for _ in moved]
        for planes, ids in zip(results, moved, strict=True):
            planes += compact(units, [ids], where)
    return results


def concatenate(units: Units, parts: Sequence[Labels], dim: int, where: str) -> list[Tensor]:
    """Return the planes of tensors put after each other along ``dim``.

    Units along ``dim`` stay apart. Those along other dimensions are united over the parts, and frozen where a part
    has none.
    """
    merged: list[list[tuple[int, Tensor]]] = []
    for index, labels in enumerate(parts):
        for plane in labels.planes:
            across = support(plane) - {dim}
            meeting = [_matches(known, across, dim) for known in merged]
            entry = [pair for known in itertools.compress(merged, meeting) for pair in known]
            merged = [known for known, meets in zip(merged, meeting, strict=True) if not meets]
            merged.append([*entry, (index, plane)])
    return compact(units, (_join(units, entry, parts, dim, where) for entry in merged), where)


def _matches(entry: list[tuple[int, Tensor]], across: frozenset[int], dim: int) -> bool:
    known = frozenset().union(*(support(plane) for _, plane in entry)) - {dim}
    return bool(known & across) or not (known or across)


def _join(
    units: Units, entry: list[tuple[int, Tensor]], parts: Sequence[Labels], dim: int, where: str
) -> Tensor | None:
    """Return one plane over all parts."""
    planes = [plane for _, plane in entry]
    if all(dim not in support(plane) for plane in planes):
        for plane in planes[1:]:
            units.unite(planes[0], plane, f"meets what stays in {where}")
        if len({index for index, _ in entry}) < len(parts):
            units.freeze(planes[0], f"meets a tensor that has no such channels in {where}")
            return None if units.virtual(planes[0]) else planes[0]
        return planes[0]
    shape = [max(sizes) for sizes in zip(*(plane.shape for plane in planes), strict=True)]
    columns = []
    for index, labels in enumerate(parts):
        size = [*shape[:dim], labels.shape[dim], *shape[dim + 1 :]]
        own = [plane for i, plane in entry if i == index]
        for plane in own[1:]:
            units.unite(own[0], plane, f"meets what stays in {where}")
        columns.append(own[0].expand(size) if own else torch.zeros(size, dtype=torch.int64, device="cpu"))
    return torch.cat(columns, dim)
