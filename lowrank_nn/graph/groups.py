"""Channel groups: units of a network that can be removed, each from every tensor that holds a part of it."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from torch import nn

from lowrank_nn.graph.follow import follow
from lowrank_nn.graph.sizes import Attribute
from lowrank_nn.graph.units import IN, OUT, THROUGH, Units, distinct

ROLES = {THROUGH: "through", IN: "in", OUT: "out"}


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
        sizes: Numbers that modules keep and the forward reads, each with what it loses with every unit.
        means: Means and variances over the units by which the forward itself normalises them: each as the number of
            such calls ahead of it, and the dim.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    frozen: str = ""
    sizes: tuple[tuple[Attribute, int], ...] = ()
    means: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        state = f"frozen: {self.frozen}" if self.frozen else "removable"
        width = max(len(name) for name in [*(m.name for m in self.members), *(str(source) for source, _ in self.sizes)])
        rows = [
            f"  {member.name:<{width}}  dim {member.dim}  {member.role:<7}  {len(member.positions[0])} per unit"
            for member in self.members
        ]
        rows += [f"  {source!s:<{width}}  attribute       {count} per unit" for source, count in self.sizes]
        return "\n".join([f"{self.name}: {self.size} units, {state}", *rows])


def find_groups(model: nn.Module, example_inputs: Any) -> tuple[ChannelGroup, ...]:
    """Run ``model`` and return its channel groups, also the frozen ones, in the order of execution.

    Units are followed through the model's own forward, function by function: control flow may depend on data, layers
    may be shared, parameters used directly. What stands at the same place of an element-wise operation is removed
    together, so a group reaches through residual sums, concatenations, splits, shuffles and attention heads. Units
    that the model returns, that an operation mixes (a softmax its channels), or that go into a function without a
    rule (see :func:`lowrank_nn.register_rule`) are frozen. A second forward has twice the batch size, if the model
    takes that. The model and the process are left as they were; no other thread may run the model meanwhile.

    Args:
        model: Any module whose forward runs.
        example_inputs: What it is called with; see :func:`lowrank_nn.graph.call_model`.

    Raises:
        UnsupportedLayerError: The model is compiled or scripted, or holds layers that have no weights yet.
        PlanError: The forward failed; the error it raised is chained.
    """
    units = follow(model, example_inputs)
    alike: dict[tuple[Any, ...], list[_Unit]] = {}
    for unit in _computed_units(units):
        alike.setdefault(unit.kind(), []).append(unit)
    names: collections.Counter[str] = collections.Counter()
    return tuple(_group(several, names) for several in alike.values())


@dataclasses.dataclass
class _Unit:
    """One unit: for each dimension of a tensor that it takes part of, the positions and the role."""

    frozen: str
    sizes: dict[Attribute, int]
    means: frozenset[tuple[int, int]]
    positions: dict[tuple[str, int], list[int]] = dataclasses.field(default_factory=dict)
    roles: dict[tuple[str, int], int] = dataclasses.field(default_factory=dict)

    def kind(self) -> tuple[Any, ...]:
        """Return what units of one group have in common."""
        counts = ((member, self.roles[member], len(own)) for member, own in self.positions.items())
        return (self.frozen, frozenset(self.sizes.items()), self.means, *counts)


def _computed_units(units: Units) -> list[_Unit]:
    """Return the units that something computes: not the taps of a kernel, or the rows of a table."""
    roots, kinds, reasons = units.all_roots(), units.kinds(), units.reasons()
    sizes_of, means_of = units.lowered_sizes(), units.means()
    computed = distinct(roots[kinds == OUT]).tolist()
    found = {
        root: _Unit(reasons.get(root, ""), sizes_of.get(root, {}), means_of.get(root, frozenset())) for root in computed
    }
    for source in units.sources:
        key = (source.name, source.dim)
        ids = slice(source.first, source.first + source.size)
        for position, (root, kind) in enumerate(zip(roots[ids].tolist(), kinds[ids].tolist(), strict=True)):
            if root in found:
                unit = found[root]
                unit.positions.setdefault(key, []).append(position)
                unit.roles[key] = max(unit.roles.get(key, THROUGH), kind)
    sizes = {(source.name, source.dim): source.size for source in units.sources}
    for unit in found.values():
        whole = [key for key, own in unit.positions.items() if len(own) == sizes[key]]
        if whole and not unit.frozen:
            unit.frozen = "nothing would be left of {} along dim {}".format(*whole[0])
    return list(found.values())


def _group(units: list[_Unit], names: collections.Counter[str]) -> ChannelGroup:
    first = units[0]
    members = tuple(
        Member(name, dim, tuple(tuple(unit.positions[name, dim]) for unit in units), ROLES[role])
        for (name, dim), role in first.roles.items()
    )
    producer = next(member.name for member in members if member.role == "out")
    path = producer.removesuffix(".weight").removesuffix(".bias")
    names[path] += 1
    name = path if names[path] == 1 else f"{path}#{names[path]}"
    return ChannelGroup(name, len(units), members, first.frozen, tuple(first.sizes.items()), tuple(sorted(first.means)))
