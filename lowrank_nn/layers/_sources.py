"""How a tensor that is not computed yet comes about: what kernels compute, add, activate, pool, join and move."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_nn.layers._onednn import NONE, Activation, CodeGrid, Geometry
from lowrank_nn.layers._qdq import PairGrid

RELU: Activation = ("relu", ())
RELU6: Activation = ("hardtanh", (0.0, 6.0))
HARDSWISH: Activation = ("hardswish", ())
SILU: Activation = ("swish", ())

_MONOTONE = (RELU, RELU6)  # these commute with the maximum
_UNIT = CodeGrid(1.0, 0, 255)


class Grid(Protocol):
    """What bytes stand for: a ``CodeGrid``, or a ``PairGrid`` in a graph that is exported."""

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes that stand for ``x``."""

    def decode(self, codes: Tensor) -> Tensor:
        """Return what bytes stand for."""


class Weight(Protocol):
    """What computes a layer: a ``PackedWeight``, or a ``PairedLayer`` in a graph that is exported."""

    geometry: Geometry | None

    def run(self, codes: Tensor, out: Any, activation: Activation) -> Tensor:
        """Return the activation of the layer's result."""

    def run_and_add(self, codes: Tensor, out: Any, added: Tensor, added_grid: Any, activation: Activation) -> Tensor:
        """Return the activation of the sum of the layer's result and ``added``."""


class Source(abc.ABC):
    """How a tensor comes about, and its bytes once somebody asked for them.

    Attributes:
        shape: Shape of the tensor.
        channels_last: Memory format in which its floats are wanted.
        makers: Weights of the layers whose output this is, activated, pooled, joined or moved.
    """

    def __init__(self, shape: tuple[int, ...], channels_last: bool, makers: tuple[Weight, ...]) -> None:
        self.shape, self.channels_last, self.makers = shape, channels_last, makers
        self._grid: Grid | None = None
        self._codes: Tensor | None = None

    @property
    def grid(self) -> Grid | None:
        """What the bytes stand for; None as long as there are none."""
        return self._grid

    def codes(self, grid: Grid) -> Tensor:
        """Return the tensor as bytes on ``grid``; not to be changed in place."""
        if self._codes is None:
            self._codes, self._grid = self.compute(grid), grid
            self.release()
        if grid == self._grid:
            return self._codes
        return grid.encode(self.values())

    def values(self) -> Tensor:
        """Return the tensor as new floats. Where there are bytes, what they stand for."""
        if self._codes is None:
            return self.compute(None)
        assert self._grid is not None
        return self._grid.decode(self._codes)

    @abc.abstractmethod
    def compute(self, grid: Grid | None) -> Tensor:
        """Compute the bytes on ``grid``, or, without one, the floats."""

    @abc.abstractmethod
    def release(self) -> None:
        """Let go of what was needed to compute: the bytes are there."""

    def as_now(self) -> Source:
        """Return what stays as it is now, for what is computed of it later."""
        return self

    def activated(self, activation: Activation) -> Source | None:
        """Return this tensor with ``activation`` applied, or None where no kernel does it."""
        return None

    def plus(self, other: Source) -> Source | None:
        """Return the sum of this tensor and another one of its shape, or None where no kernel does it."""
        return None


class Product(Source):
    """A convolution or a matrix product, what is added to it, and the activation of that."""

    def __init__(
        self,
        weight: Weight,
        codes: Tensor,
        shape: tuple[int, ...],
        channels_last: bool,
        added: Source | None = None,
        activation: Activation = NONE,
    ) -> None:
        super().__init__(shape, channels_last, (weight,))
        self._weight, self._input = weight, codes
        self._added, self._activation = added, activation

    def compute(self, grid: Grid | None) -> Tensor:
        """Run the kernel."""
        if self._added is None:
            y = self._weight.run(self._input, grid, self._activation)
            # A view of a batch of one would not count as channels-last any more.
            return y if y.shape == self.shape else y.view(self.shape)
        if grid is not None and self._added.grid is not None:
            added = self._added.codes(self._added.grid).clone(memory_format=torch.channels_last)
            return self._weight.run_and_add(self._input, grid, added, self._added.grid, self._activation)
        added = self._added.values().contiguous(memory_format=torch.channels_last)
        y = self._weight.run_and_add(self._input, None, added, _UNIT, self._activation)
        return y if grid is None else grid.encode(y)

    def release(self) -> None:
        """Let go of the input and the tensor added."""
        del self._input, self._added

    def activated(self, activation: Activation) -> Source | None:
        """Have the kernel apply it, if it has none to apply yet."""
        if self.grid is not None or self._activation != NONE or (self._added is not None and activation != RELU):
            return None
        return Product(self._weight, self._input, self.shape, self.channels_last, self._added, activation)

    def plus(self, other: Source) -> Source | None:
        """Have the kernel add it, if it is a convolution that does nothing else yet."""
        if self.grid is not None or self._activation != NONE or self._added is not None:
            return None
        if self._weight.geometry is None:
            return None
        return Product(self._weight, self._input, self.shape, self.channels_last, other)


class Pooled(Source):
    """The largest of each window of a tensor (max-pooling)."""

    def __init__(
        self,
        source: Source,
        shape: tuple[int, ...],
        size: tuple[int, int],
        stride: tuple[int, int],
        pad: tuple[int, int],
    ) -> None:
        super().__init__(shape, source.channels_last, source.makers)
        self._source, self._window = source, (size, stride, pad)

    def compute(self, grid: Grid | None) -> Tensor:
        """Take the maxima: of bytes, their order is that of the numbers."""
        if grid is None:
            return F.max_pool2d(self._source.values(), *self._window)
        codes = self._source.codes(grid)
        if isinstance(grid, PairGrid):
            return grid.encode(F.max_pool2d(grid.decode(codes), *self._window))
        return _largest(codes, *self._window)

    def release(self) -> None:
        """Let go of what was pooled."""
        del self._source

    def activated(self, activation: Activation) -> Source | None:
        """Apply an increasing function before the maximum, which gives the same."""
        if self.grid is not None or activation not in _MONOTONE:
            return None
        inner = self._source.activated(activation)
        return None if inner is None else Pooled(inner, self.shape, *self._window)


def _largest(codes: Tensor, size: tuple[int, int], stride: tuple[int, int], pad: tuple[int, int]) -> Tensor:
    """Max-pool bytes: torch's own kernel refuses bytes on maps of more than 255 entries."""
    if any(pad):
        codes = F.pad(codes, (pad[1], pad[1], pad[0], pad[0]))  # no byte is below 0
    for dim in (3, 2):
        length, step = size[dim - 2], stride[dim - 2]
        count = (codes.shape[dim] - length) // step + 1
        shifted = [codes.narrow(dim, first, (count - 1) * step + 1) for first in range(length)]
        taps = [part[..., ::step] if dim == 3 else part[..., ::step, :] for part in shifted]
        codes = taps[0]
        for tap in taps[1:]:
            codes = torch.maximum(codes, tap)
    return codes


class Joined(Source):
    """Tensors one after the other along the channels (concatenation)."""

    def __init__(self, sources: Sequence[Source], shape: tuple[int, ...]) -> None:
        super().__init__(shape, sources[0].channels_last, tuple(maker for s in sources for maker in s.makers))
        self._sources = tuple(sources)

    def compute(self, grid: Grid | None) -> Tensor:
        """Join the bytes, or the floats."""
        return torch.cat([s.values() if grid is None else s.codes(grid) for s in self._sources], 1)

    def release(self) -> None:
        """Let go of the parts."""
        del self._sources


class Moved(Source):
    """Some entries of a tensor, with zeros among them (strided slices, zero padding).

    Args:
        source: The tensor.
        shape: Shape afterwards.
        move: Does it to floats or bytes, and fills up with the number given.
    """

    def __init__(self, source: Source, shape: tuple[int, ...], move: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__(shape, source.channels_last, source.makers)
        self._source, self._move = source, move

    @property
    def grid(self) -> Grid | None:
        """That of the whole tensor: its bytes are there to be moved."""
        return self._source.grid if self._codes is None else self._grid

    def compute(self, grid: Grid | None) -> Tensor:
        """Move the bytes, or the floats."""
        if grid is None:
            return self._move(self._source.values(), 0)
        codes = self._source.codes(grid)
        if isinstance(grid, PairGrid):
            return grid.encode(self._move(grid.decode(codes), 0))
        assert isinstance(grid, CodeGrid)
        return self._move(codes, grid.zero_point).contiguous(memory_format=torch.channels_last)

    def release(self) -> None:
        """Let go of the whole tensor."""
        del self._source

    def as_now(self) -> Source:
        """Move what stays as it is now."""
        return self if self._codes is not None else Moved(self._source.as_now(), self.shape, self._move)

    def activated(self, activation: Activation) -> Source | None:
        """Apply it before, which gives the same: all of them leave 0 as it is."""
        inner = None if self.grid is not None else self._source.activated(activation)
        return None if inner is None else Moved(inner, self.shape, self._move)


class Floats(Source):
    """An ordinary tensor: one that somebody asked for the floats of, and may have changed since."""

    def __init__(self, tensor: Tensor, makers: tuple[Weight, ...]) -> None:
        super().__init__(tuple(tensor.shape), False, makers)
        self.tensor = tensor

    def codes(self, grid: Grid) -> Tensor:
        """Round the floats as they are now."""
        return grid.encode(self.tensor)

    def values(self) -> Tensor:
        """Return a copy."""
        return self.tensor.clone()

    def as_now(self) -> Source:
        """Return a copy."""
        return Floats(self.values(), self.makers)

    def compute(self, grid: Grid | None) -> Tensor:
        """As :meth:`codes` or :meth:`values`."""
        return self.values() if grid is None else self.codes(grid)

    def release(self) -> None:
        """Nothing: the floats may change, so bytes of them are not kept."""


def computed(source: Source) -> Tensor:
    """Return the floats in the memory format in which the simulated layer returns them: user code may call view()."""
    y = source.values()
    return y if source.channels_last or y.dim() != 4 else y.contiguous()
