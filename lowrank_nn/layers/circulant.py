"""Layers whose weights are blocks of circulant matrices: one value for each wrapped diagonal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lowrank_nn.cost import Cost, fourier_macs
from lowrank_nn.errors import check_whole_number
from lowrank_nn.layers._base import register_layer
from lowrank_nn.layers._packed import Derived, may_use_kernel
from lowrank_nn.layers._shapes import CompressedConv2d, CompressedLinear, PaddingMode, Size
from lowrank_nn.layers._shared import SharedWeightLayer, look_up
from lowrank_nn.layers._source import read_layer


class CirculantLayer(SharedWeightLayer):
    """Base of the circulant layers: channels are cut into blocks of b, and W[o, i] = values[block, (o - i) mod b].

    Every kernel position and every group has blocks of its own. Where b does not divide the channels the last blocks
    are cropped; values that no weight shows then have no effect.

    Attributes:
        block_size: b, output and input channels of a block.
        values: A parameter, shape ``(groups * P, b, Q * kh * kw)``, for linear layers ``(P, b, Q)``, with P = ceil(O/g
            / b) blocks of output and Q = ceil(I/g / b) blocks of input channels: ``values[p, :, q]`` is the first
            column of block (p, q).
    """

    main_options = ("block_size",)

    _groups = 1

    def _set_up(self, bias: bool, block_size: int, **factory: Any) -> None:
        """Check the options and create the tensors."""
        rows, columns, *taps = self.weight_shape
        rows //= self._groups
        what = f"{type(self).__name__}: block_size"
        self.block_size = check_whole_number(what, block_size, 1, min(rows, columns))
        blocks = -(-rows // block_size), -(-columns // block_size)
        shape = (self._groups * blocks[0], block_size, blocks[1] * math.prod(taps))
        self._set_up_values(shape, bias, **factory)
        self.reset_parameters()

    @classmethod
    def from_pretrained_layer(cls, layer: nn.Module, *, block_size: int) -> Self:
        """Build the layer from ``layer``: each value is the mean of the weights on its wrapped diagonal.

        That is the least squared change of the weights, but still most of them: the layer is to be trained.

        Args:
            layer: A trained dense layer of the class replaced; not changed.
            block_size: Output and input channels of a block; where a group has fewer of either, so many.

        Raises:
            UnsupportedLayerError: The layer cannot be carried over whole.
            OptionError: ``block_size`` is no whole number above 0.
        """
        source = read_layer(layer, cls)
        check_whole_number(f"{cls.__name__}: block_size", block_size, 1)
        rows = source.weight.shape[0] // source.arguments.get("groups", 1)
        new = source.empty(cls, block_size=min(block_size, rows, source.weight.shape[1]))
        new.approximate_(source.weight)
        return source.finish(new)

    @classmethod
    def usual_options(cls, layer: nn.Module) -> dict[str, Any]:
        """Blocks of 4: about a quarter of the weights."""
        return {"block_size": 4}

    @classmethod
    def lossless_options(cls, layer: nn.Module) -> dict[str, Any] | None:
        """Blocks of one weight."""
        return {"block_size": 1}

    def spread(self, values: Tensor) -> Tensor:
        """Return the weight, values[block, (o - i) mod b]; differentiable."""
        size = self.block_size
        out, columns, *taps = self.weight_shape
        places = torch.arange(size, device=values.device)
        blocks = look_up(values, (places[:, None] - places) % size, dim=1)
        blocks = blocks.reshape(self._groups, -1, size, size, -(-columns // size), *taps)  # (g, P, o, i, Q, kh, kw)
        weight = blocks.transpose(3, 4).flatten(3, 4).flatten(1, 2)
        # Blocks are cropped where a group ends.
        return weight[:, : out // self._groups, :columns].flatten(0, 1)


@register_layer
class CirculantConv2d(CompressedConv2d, CirculantLayer):
    r"""``nn.Conv2d`` of circulant blocks: W[o, i, h, w] = values[block, (o - i) mod b, h, w].

    It has about 1 / b of the parameters. ``forward`` puts the weight together and convolves: the layer is smaller, not
    faster.

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
        block_size: Output and input channels of a block, at most those of a group.
        device: Device of the tensors.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``
        - Output: ``(N, out_channels, H', W')`` or ``(out_channels, H', W')``

    Raises:
        OptionError: An option has a value that is not allowed.

    References:
        Cheng, Yu, Feris, Kumar, Choudhary, Chang 2015, "An Exploration of Parameter Redundancy in Deep Networks with
        Circulant Projections".
        Ding et al. 2017, "CirCNN: Accelerating and Compressing Deep Neural Networks Using Block-Circulant Weight
        Matrices".
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
        block_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self._groups = groups
        self._set_up(bias, block_size, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        return self.convolve(input, self.dense_weight(), self.bias)


@register_layer
class CirculantLinear(CompressedLinear, CirculantLayer):
    r"""``nn.Linear`` of circulant blocks: W[o, i] = values[block, (o - i) mod b].

    It has about 1 / b of the parameters, and multiplies through the Fourier transform, which makes products of circular
    convolutions: y_p = F^-1 sum_q F(values[p, q]) F(x_q), with O I / b + (O + I) log b operations in place of O I. It
    does so, also in training, for float32 and float64 where that takes fewer multiply-accumulates, from blocks of about
    8 on. Where no gradient is wanted in eval mode the transform of the values is kept from call to call. In half
    precision, under autocast, in compilers and exporters it puts the weight together and multiplies with that; the
    results are equal up to rounding.

    Args:
        in_features: Size of each input sample.
        out_features: Size of each output sample.
        bias: Whether to add a learnable bias.
        block_size: Outputs and inputs of a block, at most those of the layer.
        device: Device of the tensors.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(*, in_features)``
        - Output: ``(*, out_features)``

    Raises:
        OptionError: An option has a value that is not allowed.

    References:
        Cheng, Yu, Feris, Kumar, Choudhary, Chang 2015, "An Exploration of Parameter Redundancy in Deep Networks with
        Circulant Projections".
        Ding et al. 2017, "CirCNN: Accelerating and Compressing Deep Neural Networks Using Block-Circulant Weight
        Matrices".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self._set_up(bias, block_size, device=device, dtype=dtype)

    def train(self, mode: bool = True) -> Self:
        """Set train or eval mode; training may change the values through their ``.data``, which nothing shows."""
        if mode:
            RESPONSES.forget(self)
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the blocks: ``(*, in_features)`` to ``(*, out_features)``."""
        transforms = self._transforms and input.dtype == self.values.dtype
        # Of an empty batch oneMKL has no transform.
        if not transforms or _somebody_changes_or_records(self.values) or input.numel() == 0:
            return F.linear(input, self.dense_weight(), self.bias)
        size, blocks = self.block_size, self.values.shape[2]
        x = F.pad(input, (0, blocks * size - self.in_features)).reshape(*input.shape[:-1], blocks, size)
        response = RESPONSES.of(self) if may_use_kernel(self, input) else _response(self)
        product = torch.einsum("...qf,fqp->...pf", torch.fft.rfft(x), response)
        y: Tensor = torch.fft.irfft(product, n=size).flatten(-2)[..., : self.out_features]
        return y.contiguous() if self.bias is None else y + self.bias

    def cost(self, input_shape: Sequence[int]) -> Cost:
        """Return params, MACs, bytes and nonzeros of one call.

        Where the layer multiplies through the Fourier transform the MACs are those of the products, four for each of
        complex numbers, and of all transforms (:func:`lowrank_nn.cost.fourier_macs`). That of the values is counted,
        although in eval mode, where no gradient is wanted, it is kept from call to call.

        Args:
            input_shape: Shape of the input, batched or not.
        """
        cost = super().cost(input_shape)
        return dataclasses.replace(cost, macs=self._macs(math.prod(input_shape[:-1]))) if self._transforms else cost

    @property
    def _transforms(self) -> bool:
        """Whether multiplying through the Fourier transform is possible, and takes less, already of a single sample."""
        dense = self.in_features * self.out_features
        return self.values.dtype in (torch.float32, torch.float64) and self._macs(1) < dense

    def _macs(self, samples: int) -> int:
        """Multiply-accumulates through the Fourier transform."""
        rows, size, columns = self.values.shape
        frequencies = size // 2 + 1
        transforms = rows * columns + samples * (rows + columns)
        return 4 * samples * frequencies * rows * columns + transforms * fourier_macs(size)


def _response(layer: CirculantLinear) -> Tensor:
    """Return the Fourier transform of the values, shape (b // 2 + 1, Q, P)."""
    response: Tensor = torch.fft.rfft(layer.values, dim=1).permute(1, 2, 0)
    return response.contiguous()


RESPONSES: Derived[Tensor] = Derived(_response)
"""The Fourier transforms of values."""


def _somebody_changes_or_records(tensor: Tensor) -> bool:
    """Whether an autocast wants another dtype, or a compiler or exporter records what is computed."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
