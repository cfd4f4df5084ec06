"""Units: what is removed from a network as one, and which of them turn out to be the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from lowrank_nn.graph.sizes import Attribute

VIRTUAL, THROUGH, IN, OUT = range(4)
"""What a unit's id stands for: no position of a parameter, or one that carries, reads or computes the unit."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One dimension of a parameter or buffer; its positions have the ids from ``first`` on."""

    name: str
    dim: int
    first: int
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class Mean:
    """A mean or variance over units that a forward computes by a function of its own, as norms do inside.

    Attributes:
        call: Which of all such calls of the forward, from 0.
        dims: Along which dimensions of its argument the units stand.
        ids: The units.
        where: Its name and place, for reasons.
    """

    call: int
    dims: tuple[int, ...]
    ids: Tensor
    where: str


class Units:
    """Ids of units, which of them are one (a union-find), and which must stay.

    Id 0 stands for what is never removed. All arguments are int64 tensors of ids on the CPU.
    """

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self.frozen: list[tuple[Tensor, str]] = []
        self._count = 1
        self._parent = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._kind = torch.zeros(1, dtype=torch.int8, device="cpu")
        self._boxes: dict[tuple[tuple[int, ...], bytes], Tensor] = {}
        self._sizes: list[tuple[Attribute, Tensor]] = []
        self._means: list[Mean] = []

    def fresh(self, size: int, source: tuple[str, int] | None = None) -> Tensor:
        """Return new ids, for the positions along a dimension (``source``: name, dim) or of no tensor of the model."""
        first, self._count = self._count, self._count + size
        if self._count > self._parent.numel():
            longer = 2 * self._count - self._parent.numel()
            self._parent = torch.cat([self._parent, torch.arange(longer, device="cpu") + self._parent.numel()])
            self._kind = torch.cat([self._kind, torch.zeros(longer, dtype=torch.int8, device="cpu")])
        if source is not None:
            self.sources.append(Source(*source, first, size))
            self._kind[first : first + size] = THROUGH
        return torch.arange(first, first + size, device="cpu")

    def mark(self, ids: Tensor, kind: int) -> None:
        """Note that ``ids`` compute (OUT) or read (IN) their units; the former counts where both hold."""
        known = self._kind[ids]
        self._kind[ids] = torch.where(known == VIRTUAL, known, known.clamp(min=kind))

    def kinds(self) -> Tensor:
        """Return the kind of every id."""
        return self._kind[: self._count]

    def virtual(self, ids: Tensor) -> bool:
        """Whether no id stands for a position of a parameter or buffer."""
        return bool((self._kind[ids] == VIRTUAL).all())

    def roots(self, ids: Tensor) -> Tensor:
        """Return for each id the one that stands for all that are one with it: the smallest."""
        roots = self._parent[ids]
        while not torch.equal(roots, further := self._parent[roots]):
            roots = further
        self._parent[ids] = roots
        return roots

    def all_roots(self) -> Tensor:
        """Return the root of every id."""
        return self.roots(torch.arange(self._count, device="cpu"))

    def unite(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Make ids at the same place (after broadcasting) one; what meets a 0 is frozen for ``reason``."""
        first, second = (ids.reshape(-1) for ids in broadcast(first, second))
        alone = (first == 0) != (second == 0)
        if alone.any():
            self.freeze((first + second)[alone], reason)
        both = (first != 0) & (second != 0)
        first, second = first[both], second[both]
        while True:
            first, second = self.roots(first), self.roots(second)
            differ = first != second
            if not differ.any():
                return
            first, second = first[differ], second[differ]
            # A root with several partners keeps one of them; the others come back in the next round.
            self._parent[torch.maximum(first, second)] = torch.minimum(first, second)

    def freeze(self, ids: Tensor, reason: str) -> None:
        """Keep the units of ``ids``: they can not be removed, for ``reason``."""
        ids = distinct(ids[ids != 0])
        if ids.numel():
            self.frozen.append((ids, reason))

    def stay(self, ids: Tensor) -> bool:
        """Whether all of ``ids`` are frozen."""
        return bool(torch.isin(self.roots(ids), self._frozen_roots()).all())

    def same(self, first: Tensor, second: Tensor) -> bool:
        """Whether ids at the same place are one."""
        return torch.equal(self.roots(first), self.roots(second))

    def alike(self, first: Tensor, second: Tensor) -> bool:
        """Whether ids (after broadcasting) are one at the same places."""
        pairs = torch.stack([ids.reshape(-1) for ids in broadcast(self.roots(first), self.roots(second))])
        counts = {torch.unique(ids, dim=-1).shape[-1] for ids in (pairs, *pairs)}
        return len(counts) == 1

    def _frozen_roots(self) -> Tensor:
        return self.roots(
            torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), *(ids for ids, _ in self.frozen)])
        )

    def reasons(self) -> dict[int, str]:
        """Return by root the first reason why it is frozen."""
        reasons: dict[int, str] = {}
        for ids, reason in self.frozen:
            for root in distinct(self.roots(ids)).tolist():
                reasons.setdefault(root, reason)
        return reasons

    def note_box(self, ids: Tensor) -> None:
        """Note ids of a tensor that vary along several dimensions: what is removed must leave it a box."""
        box = ids.squeeze()
        self._boxes.setdefault((tuple(box.shape), box.numpy().tobytes()), box.clone())

    def note_size(self, source: Attribute, rows: Tensor) -> None:
        """Note that a module keeps the number of ``rows``: the ids at each position along a dim."""
        self._sizes.append((source, rows))

    def lowered_sizes(self) -> dict[int, dict[Attribute, int]]:
        """Return by root what the sizes that modules keep lose with the unit: positions that go as a whole."""
        lowered: dict[int, dict[Attribute, int]] = {}
        for source, rows in self._sizes:
            roots = self.roots(rows)
            whole = roots[(roots == roots[:, :1]).all(1), 0]
            for root, count in zip(*(x.tolist() for x in torch.unique(whole, return_counts=True)), strict=True):
                own = lowered.setdefault(root, {})
                own[source] = max(count, own.get(source, 0))
        return lowered

    def freeze_means(self, means: Iterable[Mean]) -> None:
        """Keep the units of means that are used for anything but to normalise them."""
        for mean in means:
            self.freeze(mean.ids, f"mixed by {mean.where}")

    def note_mean(self, mean: Mean) -> None:
        """Note that units are normalised by a mean over them: it is to be one over those that stay."""
        self._means.append(mean)

    def means(self) -> dict[int, frozenset[tuple[int, int]]]:
        """Return by root the calls of means over it, each with a dimension."""
        found: dict[int, frozenset[tuple[int, int]]] = {}
        for mean in self._means:
            for root in distinct(self.roots(mean.ids)).tolist():
                found[root] = found.get(root, frozenset()) | {(mean.call, dim) for dim in mean.dims}
        return found

    def settle(self) -> None:
        """Unite units until all that shrinks with them does so by whole slices, and by as much as numbers that tell."""
        self._settle_boxes()
        self._settle_sizes()
        self._settle_boxes()

    def _settle_sizes(self) -> None:
        """Unite units of which a module keeps the number once: they can only go together."""
        first: dict[Attribute, Tensor] = {}
        for source, rows in self._sizes:
            known, roots = self.roots(first.setdefault(source, rows)), self.roots(rows)
            whole = all((ids == ids[:, :1]).all() for ids in (known, roots))
            if whole and not torch.equal(known[:, 0].sort()[0], roots[:, 0].sort()[0]):
                self.unite(known[:, :1], roots[:, :1], f"as many as {source} says")

    def _settle_boxes(self) -> None:
        """Unite units until each takes whole slices, along one dimension, of every tensor that it is a part of.

        Where the forward has not said along which dimension (a channel shuffle), the one with the most units left.
        """
        changed = True
        while changed:
            changed = False
            for box in self._boxes.values():
                if not self._is_sliced(box):
                    self._slice(box)
                    changed = True

    def _is_sliced(self, box: Tensor) -> bool:
        """Whether every unit that can go takes whole slices of ``box``."""
        roots = self.roots(box)
        goes = ~torch.isin(roots, self._frozen_roots())
        units, inverse = torch.unique(torch.where(goes, roots, 0), return_inverse=True)
        counts = torch.bincount(inverse.reshape(-1))
        whole = units == 0
        for dim, size in enumerate(box.shape):
            rows = inverse.movedim(dim, 0).reshape(size, -1)
            pairs = distinct(rows * size + torch.arange(size, device="cpu")[:, None])
            slices = torch.bincount(pairs // size, minlength=len(units))
            whole |= counts == slices * rows.shape[1]
        return bool(whole.all())

    def _slice(self, box: Tensor) -> None:
        """Unite all ids that share a position along the dimension that leaves the most units."""
        rows = [box.movedim(dim, 0).reshape(size, -1) for dim, size in enumerate(box.shape)]
        chosen = max(rows, key=self._units_left)  # the first of several: of heads x channels, whole heads
        self.unite(chosen, chosen[:, :1], "the forward does not say how the parts of a split shrink")

    def _units_left(self, rows: Tensor) -> int:
        """Count the units if those in each row became one."""
        parent, frozen = self._parent.clone(), len(self.frozen)
        self.unite(rows, rows[:, :1], "")
        left = distinct(self.roots(rows[:, 0])).numel()
        self._parent = parent
        del self.frozen[frozen:]
        return left


def broadcast(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tensors expanded to their common shape."""
    first, second = torch.broadcast_tensors(first, second)  # type: ignore[no-untyped-call]
    return first, second


def distinct(ids: Tensor) -> Tensor:
    """Return the ids that occur, sorted, as one row."""
    unique: Tensor = torch.unique(ids)
    return unique
