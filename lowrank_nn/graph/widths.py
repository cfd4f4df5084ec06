"""Attention heads that fill the width of what they read, and are to go on doing so when channels are removed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from lowrank_nn.graph.groups import ChannelGroup, Member


@dataclasses.dataclass(frozen=True)
class SharedWidth:
    """Groups with the same number of channels: streams of features, and the heads that read and write them.

    Most attention modules compute the width of a head as ``channels // num_heads``. Their own forward goes on if heads
    and channels go together.

    Attributes:
        channels: Number of channels; of several widths that follow from each other, the least common multiple.
        sides: Each is made of that many: one group, or the groups that the heads of one attention are in. By name of
            the group, the channels of one of its units, the same for all of a side.
    """

    channels: int
    sides: tuple[Mapping[str, int], ...]

    @property
    def names(self) -> frozenset[str]:
        """Names of all groups."""
        return frozenset().union(*self.sides)


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
    for (projections, head), several in _heads(groups, matrices).items():
        names = [group.name for group in several]
        filled = head * sum(group.size for group in several)
        read = {streams[projection] for projection in projections if projection in streams}
        for name, wide, channels in sorted(read):
            if channels == filled and name not in names:
                widths = _joined([*widths, SharedWidth(channels, ({name: wide}, dict.fromkeys(names, head)))])
    return widths


def _heads(groups: Sequence[ChannelGroup], matrices: set[str]) -> dict[tuple[frozenset[str], int], list[ChannelGroup]]:
    """Return the groups that hold heads, by the projections that compute these and the width of one.

    They are several where the heads of one attention do not all go the same way: some through one convolution, some
    through another.
    """
    found: dict[tuple[frozenset[str], int], list[ChannelGroup]] = {}
    for group in groups:
        head = min((_wide(m) for _, m in _members([group], matrices, "in", 1)), default=0)
        projections = [m for _, m in _members([group], matrices, "out", 0)]
        if head >= 2 and sum(map(_wide, projections)) >= 3 * head:  # queries, keys and values
            found.setdefault((frozenset(m.name for m in projections), head), []).append(group)
    return found


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
    """Return the same with the last one joined to those that have a group in common with it.

    A group may stand for several widths (each stage of a pyramid repeats the channels of the one before): all are
    counted in channels of their least common multiple.
    """
    *others, last = widths
    meeting = [width for width in others if width.names & last.names]
    channels = math.lcm(*(width.channels for width in (*meeting, last)))
    sides: list[dict[str, int]] = []
    for width in (*meeting, last):
        times = channels // width.channels
        scaled = [{name: wide * times for name, wide in side.items()} for side in width.sides]
        sides += [side for side in scaled if side not in sides]
    return [*(width for width in others if width not in meeting), SharedWidth(channels, tuple(sides))]
