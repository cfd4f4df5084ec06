"""What layers have in common whose weights share a few stored numbers: looking them up."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.layers._affine import widened
from lowrank_nn.layers._leaf import LeafLayer


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


class SharedWeightLayer(LeafLayer):
    """Base of the layers whose weights share numbers: every weight has an index, and equal indices mean one number.

    Attributes:
        indices: Integer buffer of the stored kernel's shape, output channels first.
    """

    indices: Tensor

    @abc.abstractmethod
    def stored_weight(self) -> Tensor:
        """Return the weight of the stored kernel's shape; differentiable."""

    @classmethod
    def lossless_options(cls, layer: nn.Module) -> dict[str, Any] | None:
        """None: weights are always changed."""
        return None
