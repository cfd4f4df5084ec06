"""What a format tells of one weight: the limits of its ranks, what they cost, and what they lose."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lowrank_nn.decompose import Metric
from lowrank_nn.layers._source import Source

IntArray = NDArray[np.int64]

_FRONT_SIZE = 200


class Positions(NamedTuple):
    """How often a convolution's kernel is applied, in one forward.

    Attributes:
        batch: Number of images (or of leading positions of a linear layer).
        height_in: Rows of the input map.
        width_in: Columns of the input map.
        height_out: Rows of the output map.
        width_out: Columns of the output map.
    """

    batch: int = 1
    height_in: int = 1
    width_in: int = 1
    height_out: int = 1
    width_out: int = 1

    @property
    def inputs(self) -> int:
        """Number of input positions, batch * height_in * width_in."""
        return self.batch * self.height_in * self.width_in

    @property
    def outputs(self) -> int:
        """Number of output positions, batch * height_out * width_out."""
        return self.batch * self.height_out * self.width_out

    @property
    def between(self) -> int:
        """Number of positions after a kh x 1 convolution, which sees the rows of the output but all input columns."""
        return self.batch * self.height_out * self.width_in

    @classmethod
    def of(cls, input_shape: Sequence[int], output_shape: Sequence[int]) -> Positions:
        """Read the positions of an ``nn.Conv2d`` call off its input and output shapes."""
        return cls(math.prod(input_shape[:-3]), *input_shape[-2:], *output_shape[-2:])


class RankTable(NamedTuple):
    """Candidate ranks of one weight in one format, with their errors.

    Attributes:
        ranks: Candidates, shape ``(n, modes)``.
        errors: Squared Frobenius norm of the weight's change at each candidate (or its error under the metric), shape
            ``(n,)``, float64.
    """

    ranks: IntArray
    errors: NDArray[np.float64]

    @classmethod
    def empty(cls, modes: int = 1) -> RankTable:
        """Return a table without candidates."""
        return cls(np.empty((0, modes), dtype=np.int64), np.empty(0))


class RankProblem(abc.ABC):
    """What a rank rule or the planner may ask about one dense weight in one low-rank format.

    A linear layer is a convolution of one tap, in one group, on a map of one pixel.

    Args:
        name: Name of the compressed class.
        source: The trained layer.

    Attributes:
        name: As given, for messages.
        weight: The dense weight.
        groups: Number of blocked connections.
        stride: Stride along rows and columns.
        taps: Positions of the kernel, kh * kw.
        limits: Largest useful rank of each mode; at the limits nothing is lost.
        multiple: Channels that the processor computes together. A planner that is after speed sets it, and ``table``
            then lists aligned ranks where it would list a choice of all; see :func:`aligned`.
    """

    limits: tuple[int, ...]
    multiple: int = 1

    def __init__(self, name: str, source: Source) -> None:
        self.name = name
        self.weight = source.weight
        self.groups: int = source.arguments.get("groups", 1)
        self.stride: tuple[int, int] = source.arguments.get("stride", (1, 1))
        self.taps = math.prod(source.weight.shape[2:])

    @abc.abstractmethod
    def params(self, *ranks: IntArray | int) -> IntArray:
        """Return the scalars in all factors (no bias) at the given ranks, elementwise over arrays."""

    @abc.abstractmethod
    def macs(self, positions: Positions, *ranks: IntArray | int) -> IntArray:
        """Return the multiply-accumulates of one forward at the given ranks, elementwise over arrays."""

    @abc.abstractmethod
    def unfoldings(self) -> tuple[Tensor, ...]:
        """Return, for each mode, the matrices ``(groups, m, n)`` whose rank that mode limits.

        Raises:
            RankError: The format's rank is not the rank of a matrix.
        """

    @abc.abstractmethod
    def table(self, metric: Metric | None = None) -> RankTable:
        """Return the candidates that a planner chooses from, each with its squared error.

        Args:
            metric: What the errors measure; None for the squared Frobenius norm.
        """

    def dense(self, positions: Positions) -> tuple[int, int]:
        """Return params (no bias) and MACs of the dense layer."""
        params = self.weight.numel()
        return params, params * positions.outputs

    def typical_positions(self) -> Positions:
        """Return the positions per output position on a map large enough for borders not to count."""
        return Positions(1, *self.stride, 1, 1)


def aligned(ranks: IntArray, limit: int, multiple: int) -> NDArray[np.bool_]:
    """Return which ranks fill whole vectors: the multiples, their half and their quarter, and the full rank.

    Args:
        ranks: Ranks of one mode.
        limit: Its full rank.
        multiple: Channels that are computed together; with 1 all ranks are aligned.
    """
    parts = [part for part in (multiple // 4, multiple // 2) if part]
    mask: NDArray[np.bool_] = (ranks % multiple == 0) | np.isin(ranks, parts) | (ranks == limit)
    return mask


def spread_ranks(limit: int, multiple: int) -> IntArray:
    """Return ranks up to ``limit``: all to 16, then in steps of 2, 4, 8 ... that grow with the rank; and the limit.

    With a ``multiple``, only the aligned ones.
    """
    ranks = list(range(1, min(limit, 16) + 1))
    step = 2
    while ranks[-1] + step <= limit:
        ranks.append(ranks[-1] + step)
        step = min(16, max(2, 2 ** (ranks[-1].bit_length() - 4)))
    grid = np.unique([*ranks, limit])
    return grid[aligned(grid, limit, multiple)]


def cheapest_front(costs: IntArray, errors: NDArray[np.float64], among: NDArray[np.bool_]) -> IntArray:
    """Return the indices of at most 200 candidates, each with less error than all that cost no more."""
    order = np.lexsort((errors, costs))
    order = order[among[order]]
    lowest = np.minimum.accumulate(errors[order])
    front = order[np.diff(lowest, prepend=np.inf) < 0]
    return front[np.unique(np.linspace(0, front.size - 1, min(front.size, _FRONT_SIZE)).astype(np.int64))]
