"""Weights folded into tensors: into which modes, and which of them go together."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowrank_nn.decompose import Metric, along_modes, mode_roots
from lowrank_nn.decompose.metric import Roots
from lowrank_nn.errors import OptionError, check_whole_number

Shape = tuple[tuple[int, ...], tuple[int, ...]]

_CORES = 3
_MOST_CORES = 31  # tensors have at most 64 axes, and the weight is folded into two for each core


@dataclasses.dataclass(frozen=True)
class Folding:
    """How the dense weight of each group is folded into a tensor, and which of its modes each core holds.

    Attributes:
        groups: Number of blocked connections.
        outputs: Modes that the output channels of a group are folded into.
        inputs: Modes of its inputs (channels, rows and columns of the kernel).
        cores: For each core the modes it holds, as positions in ``(*outputs, *inputs)``.
    """

    groups: int
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    cores: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each core's mode, the product of the modes that it holds."""
        sizes = (*self.outputs, *self.inputs)
        return tuple(math.prod(sizes[mode] for mode in core) for core in self.cores)

    def fold(self, weight: Tensor) -> Tensor:
        """Return the tensors of a weight, (groups, modes in the order of the cores)."""
        order = [mode for core in self.cores for mode in core]
        tensors = weight.reshape(self.groups, *self.outputs, *self.inputs)
        return tensors.permute(0, *(1 + mode for mode in order))

    def unfold(self, tensors: Tensor) -> Tensor:
        """Return the weight (out_channels, inputs) whose tensors are these, (groups, *shape)."""
        sizes = (*self.outputs, *self.inputs)
        order = [mode for core in self.cores for mode in core]
        modes = tensors.reshape(self.groups, *(sizes[mode] for mode in order))
        places = [1 + order.index(mode) for mode in range(len(sizes))]
        return modes.permute(0, *places).reshape(self.groups * math.prod(self.outputs), math.prod(self.inputs))

    def merged(self, weight: Tensor) -> Tensor:
        """Return the tensors of a weight with one mode for each core, (groups, *shape)."""
        return self.fold(weight).reshape(self.groups, *self.shape)

    def roots(self, metric: Metric) -> Iterator[tuple[list[list[Roots]], float]]:
        """Yield for each group the roots of a product metric that stands in for ``metric``, by core, and its scale."""
        product = mode_roots(metric, self.inputs, self.outputs)
        modes = [*product.outputs, *product.inputs]
        for group, scale in enumerate(product.scale.tolist()):
            of_group = [Roots(mode.root[group], mode.inverse[group]) for mode in modes]
            yield [[of_group[mode] for mode in core] for core in self.cores], scale

    def weighted(self, weight: Tensor, metric: Metric) -> Tensor:
        """Return the tensors (groups, *shape), float32, whose Frobenius norm is the product metric of the weight's."""
        parts = []
        for tensor, (roots, scale) in zip(self.fold(weight).to(metric.mean), self.roots(metric), strict=True):
            weighted = along_modes(tensor, [root.root for of_core in roots for root in of_core])
            parts.append(weighted.reshape(self.shape) * math.sqrt(max(scale, 0.0)))
        return torch.stack(parts).float()


def conv_folding(weight_shape: Sequence[int], groups: int) -> Folding:
    """Return a core for each of input channels, rows, columns and output channels."""
    out, *inputs = weight_shape
    return Folding(groups, (out // groups,), tuple(inputs), ((1,), (2,), (3,), (0,)))


def linear_folding(shape: Shape) -> Folding:
    """Return a core for each pair of an output and an input factor."""
    cores = len(shape[0])
    return Folding(1, *shape, tuple((k, cores + k) for k in range(cores)))


def resolve_shape(weight_shape: tuple[int, int], shape: Sequence[Sequence[int]] | None, cores: int | None) -> Shape:
    """Return the factors of outputs and inputs, as asked for or as equal as they can be."""
    if cores is not None:
        check_whole_number("TTLinear: cores", cores, 2, _MOST_CORES)
    if shape is None:
        outputs, inputs = (_equal_factors(size, cores or _CORES) for size in weight_shape)
        return outputs[::-1], inputs
    found = [list(factors) for factors in shape] if _is_nested(shape) else []
    fitting = len(found) == 2 and len(found[0]) == len(found[1]) == (cores or len(found[0])) > 1
    whole = all(isinstance(f, int) and not isinstance(f, bool) and f > 0 for factors in found for f in factors)
    if not fitting or not whole or weight_shape != tuple(math.prod(factors) for factors in found):
        raise OptionError(
            "TTLinear: shape must be ((o_1, ..., o_d), (i_1, ..., i_d)), whole numbers with products "
            f"{weight_shape[0]} and {weight_shape[1]} and d = {cores or '2 or more'}, got {shape!r}. Leave it out for "
            "nearly equal factors."
        )
    return tuple(found[0]), tuple(found[1])


def _is_nested(value: object) -> bool:
    return isinstance(value, Sequence) and all(isinstance(part, Sequence) for part in value)


@functools.lru_cache(maxsize=1024)
def _equal_factors(size: int, count: int) -> tuple[int, ...]:
    """Return ``count`` factors of ``size`` in rising order with the least sum."""
    if count == 1:
        return (size,)
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    every = (tuple(sorted((d, *_equal_factors(size // d, count - 1)))) for d in divisors)
    return min(every, key=lambda factors: (sum(factors), factors))
