"""Layers whose weights, and inputs where asked for, are integers of 2 to 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_nn.layers._base import register_layer
from lowrank_nn.layers._onednn import Geometry
from lowrank_nn.layers._quant_input import check_range
from lowrank_nn.layers._quant_weight import Scheme
from lowrank_nn.layers._quantized import QuantLayer
from lowrank_nn.layers._shapes import CompressedConv2d, CompressedLinear, PaddingMode, Size
from lowrank_nn.layers._window import check_window, embed_window, pad_and_crop, window_padding
from lowrank_nn.layers.pruned import PrunedConv2d, PrunedLinear


@register_layer
class QuantConv2d(CompressedConv2d, QuantLayer):
    r"""``nn.Conv2d`` with a weight of integers: W = s (q - z).

    - ``scheme="symmetric"``: q = round(W / s), z = 0, a scale per output channel, s = max \|W_o\| / (2^(bits-1) - 1).
    - ``scheme="affine"``: q = round((W - min) (2^bits - 1) / (max - min)), one scale and zero point for the whole
      weight; the range includes 0, and min is moved by less than half a step so that 0 falls on the grid. Stored less
      2^(bits-1), to fit int8.

    With ``activation_bits`` the input is rounded to the unsigned affine grid of a fixed range, found by calibration;
    inputs beyond it are clipped. In eval mode, on float32 inputs on the CPU and where no gradient is wanted,
    ``forward`` then runs on integer kernels if there are exact ones (symmetric scheme only); else it computes in
    floating point with the rounded numbers, the same up to float rounding. Gradients are straight-through: rounding
    counts as the identity, clipping stops them.

    Built by its constructor the layer trains from scratch (not frozen, and until ``calibrate`` with the input range
    [-4, 4]).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Stride of the convolution.
        padding: Padding: int, pair, ``"same"`` or ``"valid"``.
        dilation: Spacing of the kernel's taps.
        groups: Number of blocked connections.
        bias: Whether to add a learnable bias; it stays in floating point.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        bits: Bits per weight, 2 to 8.
        scheme: ``"symmetric"`` or ``"affine"``.
        activation_bits: Bits per entry of the input, 2 to 8; None leaves the input as it is.
        frozen: Whether the weight is stored as integers; else it is a float parameter that is rounded in each forward.
        window: (top, left, height, width) of the rectangle of the kernel that is stored, the rest being zero.
        nonzeros: Entries of the stored kernel that a mask keeps; None for no mask.
        chained: Whether the output may stay uncomputed on its way to other quantized layers, in eval mode.
        output_range: (min, max) of the output on typical data. Exported to ONNX, a chained layer rounds its output to
            bytes of that range where something else than a quantized layer reads it; None if it is not known.
        device: Device of the tensors.
        dtype: Dtype of parameters and scales.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``
        - Output: ``(N, out_channels, H', W')`` or ``(out_channels, H', W')``

    Raises:
        OptionError: An option has a value that is not allowed.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference".
    """

    stacks_on = (PrunedConv2d,)

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
        bits: int = 8,
        scheme: Scheme = "symmetric",
        activation_bits: int | None = None,
        frozen: bool = False,
        window: Sequence[int] | None = None,
        nonzeros: int | None = None,
        chained: bool = False,
        output_range: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self.window = check_window(type(self).__name__, window, self.kernel_size)
        size = self.kernel_size if self.window is None else self.window[2:]
        shape = (*self.weight_shape[:2], *size)
        self._set_up(shape, bias, bits, scheme, activation_bits, frozen, nonzeros, device, dtype)
        self.chained, self.output_range = chained, check_range(f"{type(self).__name__}: output_range", output_range)

    def simulate(self, x: Tensor) -> Tensor:
        """Convolve with the rounded weight: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        return self.convolve(self._quantized_input(x), self.stored_weight(), self._stored_bias(), self.window)

    def geometry(self) -> Geometry:
        """Return where the stored kernel's taps are."""
        window = self.window or (0, 0, *self.kernel_size)
        pads = window_padding(window, self.kernel_size, self.padding, self.dilation)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return Geometry(self.stride, pads, self.dilation, self.groups, mode)

    def dense_weight(self) -> Tensor:
        """Return s (q - z), shape ``(out_channels, in_channels / groups, kh, kw)``."""
        return embed_window(self.stored_weight(), self.window, self.kernel_size)

    def _patches(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        # Zeros are padded as the integer that stands for them. float32 holds these integers exactly, and pads them in
        # every mode.
        geometry, size = self.geometry(), self.kernel_size if self.window is None else self.window[2:]
        centred = (codes.to(torch.float32) - zero_point).reshape(-1, *codes.shape[-3:])
        padded = (pad_and_crop(centred, geometry.pads, geometry.mode) + zero_point).to(codes.dtype)
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, size, strict=True)]
        taps = padded.unfold(2, reach[0], self.stride[0]).unfold(3, reach[1], self.stride[1])
        taps = taps[..., :: self.dilation[0], :: self.dilation[1]]
        taps = taps.reshape(taps.shape[0], self.groups, -1, *taps.shape[2:])
        return taps.permute(1, 0, 3, 4, 2, 5, 6).flatten(4).flatten(1, 3)  # n g c y x h w -> g (n y x) (c h w)

    def _fold(self, sums: Tensor, shape: tuple[int, ...]) -> Tensor:
        sums = sums.reshape(self.groups, -1, *shape[-2:], sums.shape[2])
        return sums.permute(1, 0, 4, 2, 3).reshape(shape)


@register_layer
class QuantLinear(CompressedLinear, QuantLayer):
    r"""``nn.Linear`` with a weight of integers: y = s (q - z) x + b.

    Schemes, states and quantized inputs are those of :class:`QuantConv2d`.

    Args:
        in_features: Size of each input sample.
        out_features: Size of each output sample.
        bias: Whether to add a learnable bias; it stays in floating point.
        bits: Bits per weight, 2 to 8.
        scheme: ``"symmetric"`` or ``"affine"``.
        activation_bits: Bits per entry of the input, 2 to 8; None leaves the input as it is.
        frozen: Whether the weight is stored as integers; else it is a float parameter that is rounded in each forward.
        nonzeros: Entries of the weight that a mask keeps; None for no mask.
        chained: Whether the output may stay uncomputed on its way to other quantized layers, in eval mode.
        output_range: (min, max) of the output on typical data. Exported to ONNX, a chained layer rounds its output to
            bytes of that range where something else than a quantized layer reads it; None if it is not known.
        device: Device of the tensors.
        dtype: Dtype of parameters and scales.

    Shape:
        - Input: ``(*, in_features)``
        - Output: ``(*, out_features)``

    Raises:
        OptionError: An option has a value that is not allowed.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference".
    """

    stacks_on = (PrunedLinear,)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 8,
        scheme: Scheme = "symmetric",
        activation_bits: int | None = None,
        frozen: bool = False,
        nonzeros: int | None = None,
        chained: bool = False,
        output_range: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self._set_up(self.weight_shape, bias, bits, scheme, activation_bits, frozen, nonzeros, device, dtype)
        self.chained, self.output_range = chained, check_range(f"{type(self).__name__}: output_range", output_range)

    def simulate(self, x: Tensor) -> Tensor:
        """Apply the rounded weight: ``(*, in_features)`` to ``(*, out_features)``."""
        return F.linear(self._quantized_input(x), self.stored_weight(), self._stored_bias())

    def geometry(self) -> None:
        """Return None: there are no taps."""

    def dense_weight(self) -> Tensor:
        """Return s (q - z), shape ``(out_features, in_features)``."""
        return self.stored_weight()

    def _patches(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        return codes.reshape(1, -1, self.in_features)

    def _fold(self, sums: Tensor, shape: tuple[int, ...]) -> Tensor:
        return sums.reshape(shape)
