"""Layers whose weight is a sum of Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.layers._base import register_layer
from lowrank_nn.layers._kronecker import KroneckerLayer
from lowrank_nn.layers._kronecker_ranks import Shape
from lowrank_nn.layers._packed import is_channels_last
from lowrank_nn.layers._shapes import CompressedConv2d, CompressedLinear, PaddingMode, Size, draw_factors_


@register_layer
class KroneckerConv2d(KroneckerLayer, CompressedConv2d):
    r"""``nn.Conv2d`` whose kernel is a sum of Kronecker products with 1 x 1 kernels, W = sum_r A_r (x) B_r.

    W[o1 O2 + o2, i1 I2 + i2, h, w] = sum_r A_r[o1, i1] B_r[o2, i2, h, w], with rank (O1 I1 + O2 I2 K^2) parameters: the
    best A and B are the truncated SVD of the matrix of (o1, i1) x (o2, i2, h, w). Each of I1 slices of the input goes
    through the same k x k convolution, then a 1 x 1 mixes the slices. With A a column (I1 = 1, O2 = 1) this is
    ``SVDConv2d``. Grouped convolutions are factorised group by group, ``rank`` products in each.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Stride, on the k x k convolution.
        padding: Padding (int, pair, ``"same"`` or ``"valid"``), on the k x k convolution.
        dilation: Spacing of the kernel's taps.
        groups: Number of blocked connections.
        bias: Whether to add a learnable bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        rank: Number of products per group, up to ``min(O1 I1, O2 I2 K^2)``.
        shape: (O1, I1), the shape of A, which divide out and in channels per group; if left out that at which A and B
            are about equally large, of several that with the fewest operations.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``
        - Output: ``(N, out_channels, H', W')`` or ``(out_channels, H', W')``

    Attributes:
        inner: k x k convolution from I2 to ``rank * O2`` channels (per group), applied to each slice: B.
        outer: 1 x 1 convolution from ``rank * I1`` to O1 channels (per group): A.

    Raises:
        RankError: ``rank`` is out of range.
        OptionError: ``shape`` does not divide the channels, or ``groups`` does not.

    References:
        Hameed et al. 2022, "Convolutional Neural Network Compression through Generalized Kronecker Product
        Decomposition"; Van Loan, Pitsianis 1993, "Approximation with Kronecker Products" (the closed form).
    """

    inner: nn.Conv2d
    outer: nn.Conv2d

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
        rank: int,
        shape: Shape | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self._set_up(self.weight_shape, groups, rank, shape)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        (out, slices), (inner_out, inner_in) = self.shape, self._rest
        self.inner = self.make_spatial(groups * inner_in, groups * self.rank * inner_out, bias=False, **factory)
        self.outer = self.make_pointwise(groups * self.rank * slices, groups * out, bias=False, **factory)
        self.hold_bias(bias, out_channels, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw factors at which the kernel has the variance of ``nn.Conv2d``'s default weight."""
        draw_factors_(self, terms=self.rank)

    def forward(self, input: Tensor) -> Tensor:
        """Apply both factors: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        batch, groups = input.shape[0] if input.dim() == 4 else 1, self.groups
        (out, slices), (inner_out, inner_in) = self.shape, self._rest
        # Axes are (batch, groups, I1, I2), (batch, I1, groups and R, O2), (batch, O2, groups, O1).
        x = input.reshape(batch, groups, slices, inner_in, *input.shape[-2:]).transpose(1, 2)
        x = self.inner(x.reshape(batch * slices, groups * inner_in, *x.shape[-2:]))
        channels_last = is_channels_last(input) or is_channels_last(x)
        x = x.reshape(batch, slices, groups * self.rank, inner_out, *x.shape[-2:]).transpose(1, 3)
        x = self.outer(x.reshape(batch * inner_out, groups * self.rank * slices, *x.shape[-2:]))
        x = x.reshape(batch, inner_out, groups, out, *x.shape[-2:]).permute(0, 2, 3, 1, 4, 5)
        y: Tensor = x.reshape(*input.shape[:-3], self.out_channels, *x.shape[-2:])
        if channels_last and y.dim() == 4:
            y = y.contiguous(memory_format=torch.channels_last)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    def stage_calls(self, input_shape: Sequence[int]) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
        """Yield ``inner`` with the slices of the input as its batch, and ``outer`` with those of the output."""
        batch, size = math.prod(input_shape[:-3]), tuple(self.output_shape(input_shape)[-2:])
        slices, (inner_out, inner_in) = self.shape[1], self._rest
        yield self.inner, (batch * slices, self.groups * inner_in, *input_shape[-2:])
        yield self.outer, (batch * inner_out, self.groups * self.rank * slices, *size)


@register_layer
class KroneckerLinear(KroneckerLayer, CompressedLinear):
    r"""``nn.Linear`` whose weight is a sum of Kronecker products: y = sum_r (A_r (x) B_r) x + b.

    W[o1 O2 + o2, i1 I2 + i2] = sum_r A_r[o1, i1] B_r[o2, i2], with rank (O1 I1 + O2 I2) parameters: the best A and B
    are the truncated SVD of the matrix of (o1, i1) x (o2, i2). A single product may have the full matrix rank. With A
    a column (I1 = 1, O2 = 1) this is ``SVDLinear``. A prime number of features has no factors but itself and 1.

    Args:
        in_features: Size of each input sample.
        out_features: Size of each output sample.
        bias: Whether to add a learnable bias.
        rank: Number of products, up to ``min(O1 I1, O2 I2)``.
        shape: (O1, I1), the shape of A, which divide ``out_features`` and ``in_features``; if left out that at which A
            and B are about equally large, of several that at which A (x) B may have the largest rank.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(*, in_features)``
        - Output: ``(*, out_features)``

    Attributes:
        inner: ``nn.Linear`` from I2 to ``rank * O2``, applied to each of I1 slices of the input: B.
        outer: ``nn.Linear`` from ``rank * I1`` to O1, applied to each of O2 slices: A.

    Raises:
        RankError: ``rank`` is out of range.
        OptionError: ``shape`` does not divide the features.

    References:
        Zhou, Wu 2015, "Compression of Fully-Connected Layer in Neural Network by Kronecker Product"; Van Loan,
        Pitsianis 1993, "Approximation with Kronecker Products" (the closed form).
    """

    inner: nn.Linear
    outer: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        shape: Shape | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self._set_up(self.weight_shape, 1, rank, shape)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        (out, slices), (inner_out, inner_in) = self.shape, self._rest
        self.inner = nn.Linear(inner_in, self.rank * inner_out, bias=False, **factory)
        self.outer = nn.Linear(self.rank * slices, out, bias=False, **factory)
        self.hold_bias(bias, out_features, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw factors at which the weight has the variance of ``nn.Linear``'s default."""
        draw_factors_(self, terms=self.rank)

    def forward(self, input: Tensor) -> Tensor:
        """Apply both factors: ``(*, in_features)`` to ``(*, out_features)``."""
        leading, (inner_out, inner_in) = input.shape[:-1], self._rest
        x = self.inner(input.reshape(*leading, self.shape[1], inner_in))
        x = x.reshape(*leading, self.shape[1], self.rank, inner_out).transpose(-1, -3)
        x = self.outer(x.reshape(*leading, inner_out, self.rank * self.shape[1]))
        y: Tensor = x.transpose(-1, -2).reshape(*leading, self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def stage_calls(self, input_shape: Sequence[int]) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
        """Yield ``inner`` with the slices of the input, and ``outer`` with those of the output."""
        leading, slices = tuple(input_shape[:-1]), self.shape[1]
        yield self.inner, (*leading, slices, self._rest[1])
        yield self.outer, (*leading, self._rest[0], self.rank * slices)
