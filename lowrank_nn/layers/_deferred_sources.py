"""How a tensor that is not computed yet comes about: what kernels compute, add and activate."""

from __future__ import annotations

import abc
import copy
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lowrank_nn.layers._onednn import NONE, Activation, CodeGrid, Geometry

RELU: Activation = ("relu", ())
RELU6: Activation = ("hardtanh", (0.0, 6.0))
HARDSWISH: Activation = ("hardswish", ())
SILU: Activation = ("swish", ())

_UNIT = CodeGrid(1.0, 0, 255)
_DEEPEST = 64  # tensors that may wait for each other: computing them takes two frames of Python's stack for each


class Grid(Protocol):
    """What bytes stand for: a ``CodeGrid``, or a ``PairGrid`` in a graph that is exported."""

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes that stand for ``x``."""

    def decode(self, codes: Tensor) -> Tensor:
        """Return what bytes stand for."""


class Weight(Protocol):
    """What computes a layer: a ``PackedWeight``, or a ``PairedLayer`` in a graph that is exported."""

    geometry: Geometry | None
    grid: Any

    def run(self, codes: Tensor, out: Any, activation: Activation) -> Tensor:
        """Return the activation of the layer's result."""

    def run_and_add(self, codes: Tensor, out: Any, added: Tensor, added_grid: Any, activation: Activation) -> Tensor:
        """Return the activation of the sum of the layer's result and ``added``."""


class Bytes(Protocol):
    """What a layer takes: a :class:`Source`, or bytes that are :class:`Given`."""

    shape: tuple[int, ...]
    channels_last: bool
    depth: int

    def codes(self, grid: Any) -> Tensor:
        """Return the bytes, on the layer's grid."""


class Given:
    """Bytes of an ordinary tensor (in a graph that is exported, what stands for them).

    Args:
        tensor: The bytes.
        channels_last: Memory format in which the floats of what is computed of them are wanted.
    """

    depth = 0

    def __init__(self, tensor: Tensor, channels_last: bool) -> None:
        self.shape, self.channels_last = tuple(tensor.shape), channels_last
        self._tensor = tensor

    def codes(self, grid: Any) -> Tensor:
        """Return the bytes."""
        return self._tensor


class Source(abc.ABC):
    """How a tensor comes about, and its bytes once somebody asked for them.

    Attributes:
        shape: Shape of the tensor.
        channels_last: Memory format in which its floats are wanted.
        makers: Weights of the layers whose output this is, activated, pooled, joined or moved.
        depth: How many tensors wait for each other to be computed, this one included.

    Threads may ask at once, and compute the same then: what is needed is looked up before the question whether it has
    been let go. Locks would cost more time.
    """

    def __init__(
        self, shape: tuple[int, ...], channels_last: bool, makers: tuple[Weight, ...], depth: int, inputs: Any
    ) -> None:
        self.shape, self.channels_last, self.makers, self.depth = shape, channels_last, makers, depth
        self._inputs = inputs  # what is needed to compute it; None when the bytes are there
        self._grid: Grid | None = None
        self._bytes: tuple[Tensor, Grid] | None = None

    @property
    def grid(self) -> Grid | None:
        """What the bytes stand for; None as long as nobody asked for them."""
        return self._grid

    def promised(self, grid: Grid) -> Bytes:
        """Return what gives the bytes on ``grid`` of the tensor as it is now, whenever they are asked for.

        So layers are computed one right after the other, where the last of them is: the user's forward is faster in
        one piece than between kernels that push it out of the processor's caches.
        """
        self.settle(grid)
        if self.depth > _DEEPEST:
            self.codes(grid)
        return self

    def settle(self, grid: Grid) -> None:
        """Say that the bytes on ``grid`` are wanted; who says so first decides what the bytes stand for."""
        if self._grid is None:
            self._grid = grid

    def codes(self, grid: Grid) -> Tensor:
        """Return the tensor as bytes on ``grid``; not to be changed in place."""
        self.settle(grid)
        inputs, settled = self._inputs, self._grid
        if inputs is not None:
            assert settled is not None
            self._bytes, self.depth = (self.compute(inputs, settled), settled), 0
            self._inputs = None
        assert self._bytes is not None
        codes, settled = self._bytes
        return codes if grid == settled else grid.encode(settled.decode(codes))

    def values(self) -> Tensor:
        """Return the tensor as new floats. Where bytes were asked for, what they stand for."""
        inputs, grid = self._inputs, self._grid
        return self.compute(inputs, None) if grid is None else grid.decode(self.codes(grid))

    @abc.abstractmethod
    def compute(self, inputs: Any, grid: Grid | None) -> Tensor:
        """Compute the bytes on ``grid``, or, without one, the floats."""

    def as_now(self) -> Source:
        """Return what stays as it is now, for what is computed of it later."""
        return self

    def activated(self, activation: Activation) -> Source | None:
        """Return this tensor with ``activation`` applied, or None where no kernel does it."""
        return None

    def plus(self, other: Source) -> Source | None:
        """Return the sum of this tensor and another one of its shape, or None where no kernel does it."""
        return None


class _Operands(NamedTuple):
    """What a product is computed of.

    Attributes:
        input: What the layer takes.
        added: What is added to its result, if anything.
        added_grid: What bytes of ``added`` stand for; None where its floats are added.
    """

    input: Bytes
    added: Source | None
    added_grid: Grid | None = None


class Product(Source):
    """A convolution or a matrix product, what is added to it, and the activation of that."""

    def __init__(
        self,
        weight: Weight,
        input: Bytes,
        shape: tuple[int, ...],
        channels_last: bool,
        added: Source | None = None,
        activation: Activation = NONE,
    ) -> None:
        depth = 1 + max(input.depth, 0 if added is None else added.depth)
        super().__init__(shape, channels_last, (weight,), depth, _Operands(input, added))
        self._weight, self._activation = weight, activation

    def settle(self, grid: Grid) -> None:
        """Settle also whether bytes or floats are added: bytes, if somebody asked for those of the tensor added."""
        inputs = self._inputs
        if self._grid is None and inputs.added is not None:
            added, added_grid = inputs.added, inputs.added.grid
            if added_grid is None:
                added = copy.copy(added)  # whose floats stay, whatever bytes somebody asks for later
            self._inputs = _Operands(inputs.input, added, added_grid)
        super().settle(grid)

    def compute(self, inputs: _Operands, grid: Grid | None) -> Tensor:
        """Run the kernel."""
        input, added, added_grid = inputs
        codes = input.codes(self._weight.grid)
        if added is None:
            y = self._weight.run(codes, grid, self._activation)
            # A view of a batch of one would not count as channels-last any more.
            return y if y.shape == self.shape else y.view(self.shape)
        if grid is not None and added_grid is not None:
            addend = added.codes(added_grid).clone(memory_format=torch.channels_last)
            return self._weight.run_and_add(codes, grid, addend, added_grid, self._activation)
        addend = added.values().contiguous(memory_format=torch.channels_last)
        y = self._weight.run_and_add(codes, None, addend, _UNIT, self._activation)
        return y if grid is None else grid.encode(y)

    def activated(self, activation: Activation) -> Source | None:
        """Have the kernel apply it, if it has none to apply yet."""
        inputs = self._inputs
        if self._grid is not None or self._activation != NONE or (inputs.added is not None and activation != RELU):
            return None
        return Product(self._weight, inputs.input, self.shape, self.channels_last, inputs.added, activation)

    def plus(self, other: Source) -> Source | None:
        """Have the kernel add it, if it is a convolution that does nothing else yet."""
        inputs = self._inputs
        busy = self._grid is not None or self._activation != NONE or inputs.added is not None
        if busy or self._weight.geometry is None:
            return None
        return Product(self._weight, inputs.input, self.shape, self.channels_last, other)


class Floats(Source):
    """An ordinary tensor: one that somebody asked for the floats of, and may have changed since."""

    def __init__(self, tensor: Tensor, makers: tuple[Weight, ...]) -> None:
        super().__init__(tuple(tensor.shape), False, makers, _DEEPEST, None)  # what is made of them does not wait
        self.tensor = tensor

    def promised(self, grid: Grid) -> Bytes:
        """Round the floats as they are now."""
        return Given(self.codes(grid), self.channels_last)

    def codes(self, grid: Grid) -> Tensor:
        """Round the floats as they are now."""
        return grid.encode(self.tensor)

    def values(self) -> Tensor:
        """Return a copy."""
        return self.tensor.clone()

    def as_now(self) -> Source:
        """Return a copy."""
        return Floats(self.values(), self.makers)

    def compute(self, inputs: Any, grid: Grid | None) -> Tensor:
        """As :meth:`codes` or :meth:`values`."""
        return self.values() if grid is None else self.codes(grid)


def computed(source: Source) -> Tensor:
    """Return the floats in the memory format in which the simulated layer returns them: user code may call view()."""
    y = source.values()
    return y if source.channels_last or y.dim() != 4 else y.contiguous()
