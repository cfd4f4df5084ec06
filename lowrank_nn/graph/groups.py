"""Channel groups: units of a network that can be removed, each from every tensor that holds a part of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer that shrinks when units of a group are removed.

    Attributes:
        name: Qualified name of the parameter or buffer (``"layer1.0.conv1.weight"``); where it is shared, the first.
        dim: The dimension.
        positions: For each unit of the group, the positions along ``dim`` that go with it.
        role: ``"out"`` where it computes the unit (rows of a weight, its bias), ``"in"`` where it reads the unit
            (columns of a weight), ``"through"`` otherwise (statistics and affine parameters of a norm, PReLU, layer
            scale, embeddings that are added ...).
    """

    name: str
    dim: int
    positions: tuple[tuple[int, ...], ...]
    role: str


@dataclasses.dataclass(frozen=True)
class ChannelGroup:
    """Units that can be removed one by one, each from all members at once.

    Attributes:
        name: The first layer that computes the units; with ``#2``, ``#3`` ... where it has units of several groups.
        size: Number of units.
        members: What they are removed from, in the order of execution.
        frozen: Why none can be removed; empty where they can.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    frozen: str = ""

    def __str__(self) -> str:
        state = f"frozen: {self.frozen}" if self.frozen else "removable"
        width = max(len(member.name) for member in self.members)
        rows = [
            f"  {member.name:<{width}}  dim {member.dim}  {member.role:<7}  {len(member.positions[0])} per unit"
            for member in self.members
        ]
        return "\n".join([f"{self.name}: {self.size} units, {state}", *rows])


def find_groups(model: nn.Module, example_inputs: Any) -> tuple[ChannelGroup, ...]:
    """Run ``model`` once and return its channel groups, also the frozen ones, in the order of execution."""
    raise NotImplementedError
