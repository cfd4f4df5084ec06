"""What all compressed layers of one dense kind share: the dense layer's arguments, shapes and bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lowrank_nn.cost import conv_output_size
from lowrank_nn.errors import OptionError, check_whole_number
from lowrank_nn.layers._base import CompressedLayer
from lowrank_nn.layers._window import Window, windowed_conv2d

Size = int | Sequence[int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def pair(value: Size) -> tuple[int, int]:
    """Return ``value`` as (height, width): an int counts for both."""
    if isinstance(value, int):
        return (value, value)
    height, width = value
    return (int(height), int(width))


def draw_bias_(bias: Tensor | None, fan_in: int) -> None:
    """Fill ``bias`` as torch does: uniform within +-1 / sqrt(fan_in)."""
    if bias is not None:
        bound = 1 / math.sqrt(max(1, fan_in))
        with torch.no_grad():
            bias.uniform_(-bound, bound)


class CompressedConv2d(CompressedLayer):
    """Base of the layers that replace ``nn.Conv2d``; holds its geometry under the same attribute names."""

    replaces = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        padding: str | Size,
        dilation: Size,
        groups: int,
        padding_mode: PaddingMode,
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels) < 1:
            raise OptionError(
                f"{type(self).__name__}: in_channels and out_channels must be at least 1, got {in_channels} and "
                f"{out_channels}."
            )
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise OptionError(
                f"{type(self).__name__}: groups must divide in_channels and out_channels, got groups={groups} for "
                f"in_channels={in_channels} and out_channels={out_channels}."
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = pair(kernel_size), pair(stride), pair(dilation)
        self.padding = padding if isinstance(padding, str) else pair(padding)
        self.padding_mode: PaddingMode = padding_mode
        self._check_geometry()

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the dense weight, ``(out_channels, in_channels / groups, kh, kw)``."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _check_geometry(self) -> None:
        """Refuse what ``nn.Conv2d`` refuses, there or when it is called: not all layers have one inside."""
        name, padding = type(self).__name__, self.padding
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise OptionError(f"{name}: padding must be 'same', 'valid' or numbers, got {padding!r}.")
        if padding == "same" and self.stride != (1, 1):
            raise OptionError(f"{name}: padding='same' is for stride 1, got stride={self.stride}. Pass numbers.")
        if self.padding_mode not in get_args(PaddingMode):
            modes = ", ".join(map(repr, get_args(PaddingMode)))
            raise OptionError(f"{name}: padding_mode must be one of {modes}, got {self.padding_mode!r}.")
        numbers = {"kernel_size": self.kernel_size, "stride": self.stride, "dilation": self.dilation}
        for what, values in numbers.items():
            for value in values:
                check_whole_number(f"{name}: {what}", value, 1)
        for value in () if isinstance(padding, str) else padding:
            check_whole_number(f"{name}: padding", value, 0)

    @property
    def fan_in(self) -> int:
        """Inputs that one output sums over, ``in_channels / groups * kh * kw``."""
        return math.prod(self.weight_shape[1:])

    def convolve(self, input: Tensor, kernel: Tensor, bias: Tensor | None, window: Window | None = None) -> Tensor:
        """Convolve with ``kernel`` as this layer's geometry says.

        Args:
            input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``.
            kernel: The dense kernel, or the part of it that lies in ``window``.
            bias: ``(out_channels,)`` or None.
            window: Place of ``kernel`` in the dense one; None where it is all of it.
        """
        return windowed_conv2d(
            input,
            kernel,
            bias,
            window=window,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
        )

    def make_pointwise(self, in_channels: int, out_channels: int, *, bias: bool, **factory: Any) -> nn.Conv2d:
        """Build a 1 x 1 convolution in this layer's groups; ``factory`` is device and dtype."""
        return nn.Conv2d(in_channels, out_channels, 1, groups=self.groups, bias=bias, **factory)

    def make_spatial(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bias: bool,
        rows: bool = True,
        columns: bool = True,
        groups: int | None = None,
        **factory: Any,
    ) -> nn.Conv2d:
        """Build a convolution with this layer's geometry along rows, columns or both.

        One along rows and one along columns after it pad as both at once: every padding mode fills rows and columns
        independently.

        Args:
            in_channels: Channels of the input.
            out_channels: Channels of the output.
            bias: Whether to add a learnable bias.
            rows: Whether the kernel extends over rows; otherwise its height is 1.
            columns: Whether the kernel extends over columns; otherwise its width is 1.
            groups: Number of blocked connections; this layer's if left out.
            **factory: Device and dtype.
        """

        def along(value: tuple[int, int], other: int) -> tuple[int, int]:
            return (value[0] if rows else other, value[1] if columns else other)

        return nn.Conv2d(
            in_channels,
            out_channels,
            along(self.kernel_size, 1),
            stride=along(self.stride, 1),
            padding=self.padding if isinstance(self.padding, str) else along(self.padding, 0),
            dilation=along(self.dilation, 1),
            groups=self.groups if groups is None else groups,
            bias=bias,
            padding_mode=self.padding_mode,
            **factory,
        )

    def resize_to_stages_(self) -> None:
        """Read channels and groups back from the first and the last stage."""
        first, *_, last = self.stages()
        assert isinstance(first, (nn.Conv2d, CompressedConv2d))
        assert isinstance(last, (nn.Conv2d, CompressedConv2d))
        self.in_channels, self.out_channels, self.groups = first.in_channels, last.out_channels, first.groups

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the output, ``(*, out_channels, H', W')`` for an input ``(*, in_channels, H, W)``."""
        size = conv_output_size(input_shape[-2:], self.kernel_size, self.stride, self.padding, self.dilation)
        return (*input_shape[:-3], self.out_channels, *size)

    def dense_arguments(self) -> dict[str, Any]:
        """Return the arguments of the ``nn.Conv2d`` of the same shape."""
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        arguments = {name: getattr(self, name) for name in names}
        return arguments | {"padding_mode": self.padding_mode, "bias": self.bias is not None}


class CompressedLinear(CompressedLayer):
    """Base of the layers that replace ``nn.Linear``."""

    replaces = nn.Linear

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        if min(in_features, out_features) < 1:
            raise OptionError(
                f"{type(self).__name__}: in_features and out_features must be at least 1, got {in_features} and "
                f"{out_features}."
            )
        self.in_features, self.out_features = in_features, out_features

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the dense weight, ``(out_features, in_features)``."""
        return (self.out_features, self.in_features)

    @property
    def fan_in(self) -> int:
        """Inputs that one output sums over, ``in_features``."""
        return self.in_features

    def resize_to_stages_(self) -> None:
        """Read the numbers of features back from the first and the last stage."""
        first, *_, last = self.stages()
        assert isinstance(first, (nn.Linear, CompressedLinear))
        assert isinstance(last, (nn.Linear, CompressedLinear))
        self.in_features, self.out_features = first.in_features, last.out_features

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the output, ``(*, out_features)``."""
        return (*input_shape[:-1], self.out_features)

    def dense_arguments(self) -> dict[str, Any]:
        """Return the arguments of the ``nn.Linear`` of the same shape."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
        }


@torch.no_grad()
def draw_factors_(layer: CompressedConv2d | CompressedLinear, terms: int) -> None:
    """Fill the stages of a low-rank layer so that its dense weight has the variance of torch's default, and the bias.

    torch draws dense weights from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), of variance 1 / (3 fan_in). A sum of
    ``terms`` products of n independent entries of standard deviation s has variance terms * s^(2 n).

    Args:
        layer: The layer; each entry of its dense weight is a sum of products of one entry of each stage.
        terms: Number of products in that sum.
    """
    stages = list(layer.stages())
    std = (1 / (3 * layer.fan_in * terms)) ** (1 / (2 * len(stages)))
    for stage in stages:
        weight = stage.weight  # of a pruned or quantized stage a copy: that stage draws its own numbers
        assert isinstance(weight, Tensor)
        weight.normal_(0, std)
    draw_bias_(layer.bias if isinstance(layer.bias, Tensor) else None, layer.fan_in)
