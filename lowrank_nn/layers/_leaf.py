"""What the layers share that hold their weight themselves, in a form of their own: no stages, and one way to price."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator, Sequence

from torch import nn

from lowrank_nn.cost import Cost
from lowrank_nn.layers._base import CompressedLayer


class LeafLayer(CompressedLayer):
    """Base of the layers that are leaves: they hold their weight in a form of their own, and compute with it.

    Attributes:
        bias: The bias, a parameter, or None.
    """

    bias: nn.Parameter | None

    @property
    @abc.abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight, output channels first."""

    @property
    @abc.abstractmethod
    def fan_in(self) -> int:
        """Inputs that one output sums over."""

    @abc.abstractmethod
    def stored_cost(self) -> Cost:
        """Return params, bytes and nonzeros of the weight as it is stored, and its MACs at one position of the output.

        The bias is not counted.
        """

    def stages(self) -> Iterator[nn.Module]:
        """Yield nothing: the layer is a leaf."""
        yield from ()

    def cost(self, input_shape: Sequence[int]) -> Cost:
        """Return params, MACs, bytes and nonzeros of one call: of the weight as :meth:`stored_cost` says, and the bias.

        Args:
            input_shape: Shape of the input, batched or not.
        """
        weight, positions = self.stored_cost(), math.prod(self.output_shape(input_shape)) // self.weight_shape[0]
        total = dataclasses.replace(weight, macs=positions * weight.macs)
        if self.bias is None:
            return total
        count = self.bias.numel()
        return total + Cost(params=count, bytes=count * self.bias.element_size(), nonzeros=count)
