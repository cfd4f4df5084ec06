"""Which units of channel groups go: those that matter least, within what each group must keep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lowrank_nn.errors import OptionError, check_whole_number
from lowrank_nn.graph.widths import SharedWidth

Scope = Literal["layer", "global"]


@dataclasses.dataclass(frozen=True)
class KeepRule:
    """How many units of a group may go.

    Args:
        scope: ``"layer"``: the same share of every group; ``"global"``: the least important units of all groups.
        round_to: What the number of units that stay is a multiple of; smaller groups stay whole.
        min_keep: Share of a group's units that stays at least; one unit always does.

    Raises:
        OptionError: There is no such scope, ``round_to`` is no whole number from 1, or ``min_keep`` no share below 1.
    """

    scope: Scope = "layer"
    round_to: int = 1
    min_keep: float = 0.1

    def __post_init__(self) -> None:
        if self.scope not in ("layer", "global"):
            raise OptionError(f"Prune: scope must be 'layer' or 'global', got {self.scope!r}.")
        check_whole_number("Prune: round_to", self.round_to, 1)
        if not 0 <= self.min_keep < 1:
            raise OptionError(f"Prune: min_keep is a share from 0 to below 1, got {self.min_keep!r}.")

    def kept(self, size: int, wanted: int) -> int:
        """Return how many of ``size`` units stay where ``wanted`` would: rounded up, as many as must at least."""
        least = max(1, math.ceil(self.min_keep * size - 1e-9), wanted)
        return min(size, -(-least // self.round_to) * self.round_to)

    def choose(
        self, scores: Mapping[str, Tensor], share: float, widths: Sequence[SharedWidth] = ()
    ) -> dict[str, tuple[int, ...]]:
        """Return, by group, the units that go.

        Args:
            scores: Importance of each unit by group. Of equal ones the last go first.
            share: Share of the units to remove, of every group or of all together. Where groups must keep more than
                their importance says, with ``scope="global"`` others lose more.
            widths: Groups that lose the same number of channels; those of which a group has no scores do not count.
        """
        if self.scope == "global":
            kept = self._kept_globally(scores, share)
        else:
            kept = {name: self.kept(len(s), len(s) - round(share * len(s))) for name, s in scores.items()}
        for width in widths:
            if width.names <= scores.keys():
                kept |= self._filled(width, kept, {name: len(scores[name]) for name in width.names})
        return {name: least_important(s, len(s) - kept[name]) for name, s in scores.items()}

    def _filled(self, width: SharedWidth, kept: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, int]:
        """Return how many units of groups that share a width stay: of as many channels, near the mean of ``kept``."""
        units = {name: wide for side in width.sides for name, wide in side.items()}
        wanted = sum(kept[name] * wide for name, wide in units.items()) / len(width.sides)
        step = math.lcm(*units.values())
        possible = {}
        for channels in range(step, width.channels + 1, step):
            left: dict[str, int] = {}
            for side in width.sides:
                left |= _divided(channels // next(iter(side.values())), {name: sizes[name] for name in side})
            if all(self.kept(sizes[name], count) == count for name, count in left.items()):
                possible[channels] = left
        if not possible:
            return dict(sizes)
        return possible[min(possible, key=lambda channels: abs(channels - wanted))]

    def _kept_globally(self, scores: Mapping[str, Tensor], share: float) -> dict[str, int]:
        """Return how many units of each group stay when the least important ones of all groups go."""
        room = {name: len(s) - self.kept(len(s), 0) for name, s in scores.items()}
        ranked = sorted(
            (float(score), name, index)
            for name, s in scores.items()
            for index, score in enumerate(s.sort().values[: room[name]])
        )
        goes = round(share * sum(map(len, scores.values())))
        lost = dict.fromkeys(scores, 0)
        for _, name, _ in ranked[:goes]:
            lost[name] += 1
        return {name: self.kept(len(s), len(s) - lost[name]) for name, s in scores.items()}


def _divided(count: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return how many of ``count`` units each group has: in proportion to their sizes, rounded to that sum."""
    total = sum(sizes.values())
    parts = {name: count * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: -(count * sizes[name] % total))
    for name in by_remainder[: count - sum(parts.values())]:
        parts[name] += 1
    return parts


def least_important(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the numbers of the ``count`` units of the smallest scores, ascending; of equal ones the last."""
    order: Sequence[int] = torch.argsort(scores, descending=True, stable=True).tolist()
    return tuple(sorted(order[len(order) - count :]))
