"""What layers have in common whose weights share a few stored numbers: how many, looking them up, fitting them."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.cost import Cost
from lowrank_nn.errors import OptionError, is_share
from lowrank_nn.layers._affine import widened
from lowrank_nn.layers._base import CompressedLayer
from lowrank_nn.layers._leaf import LeafLayer
from lowrank_nn.layers._shapes import draw_bias_


def look_up(table: Tensor, indices: Tensor, dim: int = 0) -> Tensor:
    """Return the entries of ``table`` along ``dim`` that ``indices`` name, in the place of that dim.

    The gradient of an entry is the sum over all places that show it, taken in float32 at least: in half precision it
    would stall after a few hundred terms.

    Args:
        table: Any tensor, with k entries along ``dim``.
        indices: Integers from 0 to k - 1, any shape.
        dim: Along which dim, from 0.
    """
    flat = indices.reshape(-1).to(torch.int32)
    entries = table.to(widened(table.dtype)).index_select(dim, flat)
    return entries.to(table.dtype).reshape(*table.shape[:dim], *indices.shape, *table.shape[dim + 1 :])


def count_or_share(cls: type[nn.Module], name: str, count: int | None, share: float | None, whole: int) -> int | None:
    """Return how many there are to be, as a factory was told: ``count``, or a ``share`` of ``whole``, at least one.

    Args:
        cls: The class that is asked for.
        name: Name of its option for the count.
        count: The count; not checked.
        share: In its place, a share above 0 and at most 1.
        whole: What it is a share of.

    Raises:
        OptionError: Not one of both is given, or the share is another number.
    """
    if (count is None) == (share is None):
        raise OptionError(f"{cls.__name__}: pass one of {name} and share, got {count!r} and {share!r}.")
    if share is None:
        return count
    if not is_share(share):
        raise OptionError(f"{cls.__name__}: share is above 0 and at most 1, got {share!r}.")
    return max(1, round(share * whole))


class ComputedBuffers(CompressedLayer):
    """A layer with buffers that follow from its configuration: never saved, and filled anew where memory comes late."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Take over tensors; a layer on the meta device that gets its memory with them fills these buffers too."""
        super()._load_from_state_dict(*args)
        tensors = (*self._parameters.values(), *self._buffers.values())
        device = next((t.device for t in tensors if t is not None and not t.is_meta), None)
        for name in self._non_persistent_buffers_set:
            buffer = self.get_buffer(name)
            if buffer.is_meta and device is not None:
                self._buffers[name] = torch.empty_like(buffer, device=device)
                self.fill_buffers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert or move the tensors; a layer that gets its memory only now gets what these buffers hold too."""
        buffers = [self.get_buffer(name) for name in self._non_persistent_buffers_set]
        was_meta = any(buffer.is_meta for buffer in buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta:
            self.fill_buffers()
        return self


class SharedWeightLayer(LeafLayer):
    """Base of the layers in which each weight is one of few values, up to its sign; which one is said by its place.

    So a file holds the values, and nothing of the places.

    Attributes:
        values: The shared weights, a parameter.
    """

    values: nn.Parameter

    def _set_up_values(self, shape: tuple[int, ...], bias: bool, **factory: Any) -> None:
        """Create values of ``shape``, and the bias."""
        self.values = nn.Parameter(torch.empty(shape, **factory))
        self.bias = nn.Parameter(torch.empty(self.weight_shape[0], **factory)) if bias else None

    @abc.abstractmethod
    def spread(self, values: Tensor) -> Tensor:
        """Return the dense weight made of ``values``: each of its entries is one of them, or one with its sign changed.

        Args:
            values: Of the shape of :attr:`values`, any floating dtype; differentiable.
        """

    @torch.no_grad()
    def approximate_(self, weight: Tensor) -> None:
        """Set each value to the mean of its weights, each with its sign; a value that no weight has to zero.

        No other values are nearer to ``weight`` in the Frobenius norm.
        """
        wide = widened(weight.dtype)
        # Least squares: spread is a matrix S of entries 0, 1 and -1, one per row that is not 0, so that S^T S is
        # diagonal and says how many weights a value has; the product of S^T is the derivative backward.
        ones = torch.ones(self.values.shape, dtype=wide, device=weight.device)
        spread_ones, gather = cast("tuple[Tensor, Any]", torch.func.vjp(self.spread, ones))
        (sums,), (counts,) = gather(weight.to(wide)), gather(spread_ones)
        self.values.copy_(sums / counts.clamp(min=1))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the values as torch draws dense weights, from +-1 / sqrt(fan_in)."""
        bound = self.fan_in**-0.5
        self.values.uniform_(-bound, bound)
        draw_bias_(self.bias, self.fan_in)

    def dense_weight(self) -> Tensor:
        """Return the weight, in the dense layer's shape."""
        return self.spread(self.values)

    def stored_cost(self) -> Cost:
        """Return params, bytes and nonzeros of the values, and the MACs of all weights; places cost nothing."""
        count = self.values.numel()
        size = count * self.values.element_size()
        return Cost(params=count, macs=math.prod(self.weight_shape), bytes=size, nonzeros=count)
