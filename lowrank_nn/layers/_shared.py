"""What layers have in common whose weights share a few stored numbers: looking them up, and what they cost."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.cost import Cost
from lowrank_nn.layers._affine import widened
from lowrank_nn.layers._base import CompressedLayer


def look_up(table: Tensor, indices: Tensor) -> Tensor:
    """Return ``table[indices]``; the gradient of an entry of the table is the sum over all places that show it.

    That sum is taken in float32 at least: in half precision it would stall after a few hundred terms.

    Args:
        table: Shape ``(k,)``.
        indices: Integers from 0 to k - 1, any shape.
    """
    flat = indices.reshape(-1).to(torch.int32)
    entries = table.to(widened(table.dtype)).index_select(0, flat)
    return entries.to(table.dtype).reshape(indices.shape)


class SharedWeightLayer(CompressedLayer):
    """Base of the layers whose weights share numbers: every weight has an index, and equal indices mean one number.

    Attributes:
        indices: Integer buffer of the stored kernel's shape, output channels first.
    """

    indices: Tensor
    bias: nn.Parameter | None

    @property
    @abc.abstractmethod
    def fan_in(self) -> int:
        """Inputs that one output sums over."""

    @abc.abstractmethod
    def stored_weight(self) -> Tensor:
        """Return the weight of the stored kernel's shape; differentiable."""

    @abc.abstractmethod
    def stored_cost(self) -> Cost:
        """Return params, bytes and nonzeros of what is stored, without the bias."""

    @classmethod
    def lossless_options(cls, layer: nn.Module) -> dict[str, Any] | None:
        """None: weights are always changed."""
        return None

    def stages(self) -> Iterator[nn.Module]:
        """Yield nothing: the layer is a leaf."""
        yield from ()

    def cost(self, input_shape: Sequence[int]) -> Cost:
        """Return params, MACs, bytes and nonzeros of one call.

        The MACs are those of the stored kernel, which is put together anew in each forward.

        Args:
            input_shape: Shape of the input, batched or not.
        """
        total, biases = self.stored_cost(), self.bias
        if biases is not None:
            total += Cost(biases.numel(), bytes=biases.numel() * biases.element_size(), nonzeros=biases.numel())
        positions = math.prod(self.output_shape(input_shape)) // self.indices.shape[0]
        return total + Cost(macs=positions * self.indices.numel())
