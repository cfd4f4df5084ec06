"""Layers whose weights share few numbers by a hash, so that no index is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lowrank_nn.errors import check_whole_number
from lowrank_nn.layers._base import register_layer
from lowrank_nn.layers._shapes import CompressedConv2d, CompressedLinear, PaddingMode, Size
from lowrank_nn.layers._shared import ComputedBuffers, SharedWeightLayer, count_or_share, look_up
from lowrank_nn.layers._source import read_layer

_LARGEST = 2**30 - 1  # the indices, signs in them, are int32
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def hash_buckets(count: int, buckets: int, seed: int) -> NDArray[np.int32]:
    """Return bucket and sign of the numbers 0 to ``count`` - 1: the bucket, plus ``buckets`` where the sign is -1.

    Numbers are dealt out to the buckets in the order of their hashes (SplitMix64), so that all are equally full: by the
    hash alone a bucket of k numbers on average would be empty, and its value wasted, with probability e^-k. The lowest
    bit of the hash is the sign. Files hold nothing of this, so it must never change.

    Args:
        count: How many numbers.
        buckets: How many buckets.
        seed: Which of many hashes, from 0.

    References:
        Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    # Arithmetic of unsigned numbers wraps around, as it is meant to.
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + _mixed(np.array([seed], np.uint64))
    hashed = _mixed(state)
    bucket = np.empty(count, np.int64)
    bucket[np.argsort(hashed, kind="stable")] = np.arange(count) % buckets
    negative = (hashed & np.uint64(1)).astype(np.int64)
    return (bucket + negative * buckets).astype(np.int32)


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, factor in _MIX:
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return state


class HashedLayer(ComputedBuffers, SharedWeightLayer):
    """Base of the hashed layers: weight i is values[bucket(i)] times sign(i), both by a hash of its place.

    Attributes:
        buckets: Number of values.
        seed: Which hash.
        values: The shared weights, a parameter, shape ``(buckets,)``.
        indices: int32 buffer of the weight's shape, computed from the seed and never saved: the bucket, plus
            ``buckets`` where the sign is -1.
    """

    main_options = ("buckets",)

    indices: Tensor

    def _set_up(self, bias: bool, buckets: int, seed: int, **factory: Any) -> None:
        """Check the options and create the tensors."""
        name = type(self).__name__
        self.buckets = check_whole_number(f"{name}: buckets", buckets, 1, _LARGEST)
        self.seed = check_whole_number(f"{name}: seed", seed, 0, _LARGEST)
        self._set_up_values((buckets,), bias, **factory)
        indices = torch.empty(self.weight_shape, dtype=torch.int32, device=self.values.device)
        self.register_buffer("indices", indices, persistent=False)
        self.fill_buffers()
        self.reset_parameters()

    def fill_buffers(self) -> None:
        """Compute indices and signs from the hash."""
        if not self.indices.is_meta:
            hashed = hash_buckets(self.indices.numel(), self.buckets, self.seed)
            self.indices.copy_(torch.from_numpy(hashed).reshape(self.indices.shape))

    @classmethod
    def from_pretrained_layer(
        cls, layer: nn.Module, *, buckets: int | None = None, share: float | None = None, seed: int = 0
    ) -> Self:
        """Build the layer from ``layer``: each value is the mean, with their signs, of the weights that share it.

        That is the least squared change of the weights, but still most of them: the layer is to be trained.

        Args:
            layer: A trained dense layer of the class replaced; not changed.
            buckets: Number of shared weights.
            share: In place of ``buckets``, their number as a share of the weights, above 0 and at most 1.
            seed: Which hash.

        Raises:
            UnsupportedLayerError: The layer cannot be carried over whole.
            OptionError: An option has a value that is not allowed, or not one of ``buckets`` and ``share`` is given.
        """
        source = read_layer(layer, cls)
        buckets = count_or_share(cls, "buckets", buckets, share, source.weight.numel())
        new = source.empty(cls, buckets=buckets, seed=seed)
        new.approximate_(source.weight)
        return source.finish(new)

    @classmethod
    def usual_options(cls, layer: nn.Module) -> dict[str, Any]:
        """Half as many values as weights."""
        return {"share": 0.5}

    @classmethod
    def lossless_options(cls, layer: nn.Module) -> dict[str, Any] | None:
        """None: weights are always changed."""
        return None

    def spread(self, values: Tensor) -> Tensor:
        """Return the weight: the value of each place's bucket times its sign; differentiable."""
        return look_up(torch.cat([values, -values]), self.indices)


@register_layer
class HashedConv2d(CompressedConv2d, HashedLayer):
    r"""``nn.Conv2d`` whose weights share ``buckets`` numbers: W_i = values[bucket(i)] sign(i).

    Bucket and sign are hashes of the weight's place, so a file holds the values and nothing else. The gradient of a
    value is the sum over the weights that share it, with their signs. ``forward`` puts the weight together and
    convolves: the layer is smaller, not faster.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Stride of the convolution.
        padding: Padding: int, pair, ``"same"`` or ``"valid"``.
        dilation: Spacing of the kernel's taps.
        groups: Number of blocked connections.
        bias: Whether to add a learnable bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        buckets: Number of shared weights.
        seed: Which hash.
        device: Device of the tensors.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``
        - Output: ``(N, out_channels, H', W')`` or ``(out_channels, H', W')``

    Raises:
        OptionError: An option has a value that is not allowed.

    References:
        Chen, Wilson, Tyree, Weinberger, Chen 2015, "Compressing Neural Networks with the Hashing Trick".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        buckets: int,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self._set_up(bias, buckets, seed, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        return self.convolve(input, self.dense_weight(), self.bias)


@register_layer
class HashedLinear(CompressedLinear, HashedLayer):
    r"""``nn.Linear`` whose weights share ``buckets`` numbers: W_i = values[bucket(i)] sign(i).

    Hash, training and storage are those of :class:`HashedConv2d`.

    Args:
        in_features: Size of each input sample.
        out_features: Size of each output sample.
        bias: Whether to add a learnable bias.
        buckets: Number of shared weights.
        seed: Which hash.
        device: Device of the tensors.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(*, in_features)``
        - Output: ``(*, out_features)``

    Raises:
        OptionError: An option has a value that is not allowed.

    References:
        Chen, Wilson, Tyree, Weinberger, Chen 2015, "Compressing Neural Networks with the Hashing Trick".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        buckets: int,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self._set_up(bias, buckets, seed, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the shared weights: ``(*, in_features)`` to ``(*, out_features)``."""
        return F.linear(input, self.dense_weight(), self.bias)
