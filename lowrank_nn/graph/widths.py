"""Attention heads that fill the width of what they read, and are to go on doing so when channels are removed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from lowrank_nn.graph.groups import ChannelGroup, Member


@dataclasses.dataclass(frozen=True)
class SharedWidth:
    """Groups with the same number of channels: streams of features, and the heads that read and write them.

    Most attention modules compute the width of a head as ``channels // num_heads``. Their own forward goes on if heads
    and channels go together.

    Attributes:
        channels: Number of channels of each of the groups.
        per_unit: By name of the group, the channels of one of its units.
    """

    channels: int
    per_unit: Mapping[str, int]


def shared_widths(groups: Sequence[ChannelGroup], tensors: Mapping[str, Tensor]) -> list[SharedWidth]:
    """Return which of the groups share a width.

    Args:
        groups: Groups of one model.
        tensors: The tensors of the model by name.
    """
    matrices = {name for name, tensor in tensors.items() if tensor.dim() == 2}
    streams = {
        m.name: (group.name, _wide(m), group.size * _wide(m)) for group, m in _members(groups, matrices, "in", 1)
    }
    widths: list[SharedWidth] = []
    for group in groups:
        head = min((_wide(m) for _, m in _members([group], matrices, "in", 1)), default=0)
        projections = [m for _, m in _members([group], matrices, "out", 0)]
        if head < 2 or sum(map(_wide, projections)) < 3 * head:  # queries, keys and values
            continue
        read = {streams[m.name] for m in projections if m.name in streams}
        for name, wide, channels in sorted(read):
            if channels == group.size * head and name != group.name:
                widths = _joined([*widths, SharedWidth(channels, {name: wide, group.name: head})])
    return widths


def _members(
    groups: Iterable[ChannelGroup], matrices: Iterable[str], role: str, dim: int
) -> Iterator[tuple[ChannelGroup, Member]]:
    for group in groups:
        for member in group.members:
            if (member.role, member.dim) == (role, dim) and member.name in matrices:
                yield group, member


def _wide(member: Member) -> int:
    return len(member.positions[0])


def _joined(widths: Sequence[SharedWidth]) -> list[SharedWidth]:
    """Return the same with the last one joined to those that have a group in common with it."""
    *others, last = widths
    meets = [bool(width.per_unit.keys() & last.per_unit.keys()) for width in others]
    per_unit = dict(last.per_unit)
    for width in itertools.compress(others, meets):
        per_unit |= width.per_unit
    apart = [width for width, meeting in zip(others, meets, strict=True) if not meeting]
    return [*apart, SharedWidth(last.channels, per_unit)]
