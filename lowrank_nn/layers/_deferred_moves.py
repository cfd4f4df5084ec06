"""Tensors that are not computed yet, pooled, joined and moved: their bytes are those of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_nn.layers._deferred_sources import RELU, RELU6, Grid, Source
from lowrank_nn.layers._onednn import Activation, CodeGrid
from lowrank_nn.layers._qdq import PairGrid

_MONOTONE = (RELU, RELU6)  # these commute with the maximum


class Rearranged(Source):
    """A tensor whose bytes are those of others, in other places.

    Args:
        parts: The others.
        shape: Shape afterwards.
    """

    def __init__(self, parts: Sequence[Source], shape: tuple[int, ...]) -> None:
        makers = tuple(maker for part in parts for maker in part.makers)
        super().__init__(shape, parts[0].channels_last, makers, 1 + max(part.depth for part in parts), tuple(parts))

    def settle(self, grid: Grid) -> None:
        """Settle the bytes of the others, too."""
        parts = self._inputs
        if self._grid is None:
            for part in parts:
                part.settle(grid)
        super().settle(grid)


class Pooled(Rearranged):
    """The largest of each window of a tensor (max-pooling)."""

    def __init__(
        self,
        source: Source,
        shape: tuple[int, ...],
        size: tuple[int, int],
        stride: tuple[int, int],
        pad: tuple[int, int],
    ) -> None:
        super().__init__((source,), shape)
        self._window = (size, stride, pad)

    def compute(self, inputs: tuple[Source], grid: Grid | None) -> Tensor:
        """Take the maxima: of bytes, their order is that of the numbers."""
        if grid is None:
            return F.max_pool2d(inputs[0].values(), *self._window)
        codes = inputs[0].codes(grid)
        if isinstance(grid, PairGrid):
            return grid.encode(F.max_pool2d(grid.decode(codes), *self._window))
        # F.max_pool2d refuses bytes on maps of more than 255 entries; that for quantized tensors takes bytes, too.
        largest: Tensor = torch.ops.quantized.max_pool2d(codes, *self._window, (1, 1), False)
        return largest

    def activated(self, activation: Activation) -> Source | None:
        """Apply an increasing function before the maximum, which gives the same."""
        inputs = self._inputs
        if self._grid is not None or activation not in _MONOTONE:
            return None
        inner = inputs[0].activated(activation)
        return None if inner is None else Pooled(inner, self.shape, *self._window)


class Joined(Rearranged):
    """Tensors one after the other along the channels (concatenation)."""

    def compute(self, inputs: tuple[Source, ...], grid: Grid | None) -> Tensor:
        """Join the bytes, or the floats."""
        return torch.cat([s.values() if grid is None else s.codes(grid) for s in inputs], 1)


class Moved(Rearranged):
    """Some entries of a tensor, with zeros among them (strided slices, zero padding).

    Args:
        source: The tensor.
        shape: Shape afterwards.
        move: Does it to floats or bytes, and fills up with the number given.
    """

    def __init__(self, source: Source, shape: tuple[int, ...], move: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__((source,), shape)
        self._move = move

    @property
    def grid(self) -> Grid | None:
        """That of the whole tensor: its bytes can be moved."""
        inputs = self._inputs
        return inputs[0].grid if self._grid is None else self._grid

    def compute(self, inputs: tuple[Source], grid: Grid | None) -> Tensor:
        """Move the bytes, or the floats."""
        if grid is None:
            return self._move(inputs[0].values(), 0)
        codes = inputs[0].codes(grid)
        if isinstance(grid, PairGrid):
            return grid.encode(self._move(grid.decode(codes), 0))
        assert isinstance(grid, CodeGrid)
        return self._move(codes, grid.zero_point).contiguous(memory_format=torch.channels_last)

    def as_now(self) -> Source:
        """Move what stays as it is now."""
        inputs = self._inputs
        return self if self._grid is not None else Moved(inputs[0].as_now(), self.shape, self._move)

    def activated(self, activation: Activation) -> Source | None:
        """Apply it before, which gives the same: all of them leave 0 as it is."""
        inputs = self._inputs
        inner = None if self.grid is not None else inputs[0].activated(activation)
        return None if inner is None else Moved(inner, self.shape, self._move)
