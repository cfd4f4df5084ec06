"""Quantized layers in integers: on fast kernels where they can, and the reference that these must meet."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_nn.layers._affine import Grid, accumulator_dtype, integer_product, quantize, widened
from lowrank_nn.layers._deferred import Deferred
from lowrank_nn.layers._deferred_sources import Given, Product
from lowrank_nn.layers._kernel import KERNELS, kernel_for
from lowrank_nn.layers._onednn import Geometry
from lowrank_nn.layers._qdq import PairedLayer, exports_pairs
from lowrank_nn.layers._quant_input import QuantizedInputLayer


class IntegerLayer(QuantizedInputLayer):
    """Base of the layers that can compute in integers: y = s_x s_w sum (q_x - z_x) (q_w - z_w) + b.

    Attributes:
        chained: Whether the output may stay uncomputed on its way to other quantized layers, which then take it over as
            integers. Set where the model was seen to use the output for nothing else.
        output_range: (min, max) of the output on typical data, for exported graphs; None if it is not known.
    """

    chained: bool
    output_range: tuple[float, float] | None

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer: on integer kernels where that can be done, else by :meth:`simulate`.

        Args:
            input: Of the shape that the replaced layer takes.
        """
        kernel = kernel_for(self, input)
        if kernel is not None:
            return kernel(self, input)
        y = self.simulate(input)
        return self._chained_export(y) if self.chained and torch.onnx.is_in_onnx_export() else y

    @abc.abstractmethod
    def simulate(self, x: Tensor) -> Tensor:
        """Compute the layer in floating point with the rounded numbers; differentiable, in any dtype, anywhere."""

    @abc.abstractmethod
    def geometry(self) -> Geometry | None:
        """Return where the taps of the convolution are; None for a linear layer."""

    def _chained_export(self, y: Tensor) -> Tensor:
        """Return the output in a graph that is exported to ONNX: what follows decides where it is rounded."""
        if self.activation_bits != 8 or not exports_pairs(self._input_grid("forward")[0]) or y.device.type != "cpu":
            return y
        return Deferred(Product(PairedLayer(self.geometry(), self.output_range), Given(y, True), tuple(y.shape), True))

    def train(self, mode: bool = True) -> Self:
        """Set train or eval mode; training may change the bias through its ``.data``, which nothing shows."""
        if mode:
            KERNELS.forget(self)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        KERNELS.forget(self)  # the tensors are about to be moved or cast
        result: Any = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return result  # type: ignore[no-any-return]

    def integer_forward(self, x: Tensor) -> Tensor:
        """Compute the layer in integers: uint8 inputs, int8 weights, int32 sums; scale and bias come last.

        Bit for bit what integer hardware computes, and up to float rounding what ``forward`` does: the reference for
        fast kernels (:meth:`forward` in eval mode), not fast itself. The bias is added in floating point. No gradients.

        Args:
            x: Input of the same shape as for ``forward``.

        Raises:
            CalibrationError: The layer has no ``activation_bits``.
        """
        input_scale, _, _ = self._input_grid("integer_forward")
        sums, wide = self.integer_accumulators(x), widened(x.dtype)
        per_channel = (-1, *(1,) * (len(self.weight_shape) - 2))
        scale = input_scale.to(wide) * self.integer_weight()[1].to(wide)
        y = sums.to(wide) * scale.reshape(per_channel)
        if self.bias is not None:
            y = y + self.bias.detach().to(wide).reshape(per_channel)
        return y.to(x.dtype)

    @torch.no_grad()
    def integer_accumulators(self, x: Tensor) -> Tensor:
        """Return sum (q_x - z_x) (q_w - z_w) per output, of the output's shape, in the zero-point algebra.

        int32; int64 where so many products are summed that int32 could overflow (over 33,025 at 8 and 8 bits).

        Raises:
            CalibrationError: The layer has no ``activation_bits``.
        """
        scale, x_zero, grid = self._input_grid("integer_accumulators")
        codes, _, w_zero = self.integer_weight()
        patches = self._patches(quantize(x, scale, x_zero, grid, torch.uint8), x_zero)
        weights = codes.reshape(patches.shape[0], -1, patches.shape[2]).transpose(1, 2)
        dtype = accumulator_dtype(patches.shape[2], grid, self._weight_grid)
        sums = integer_product(patches, weights, x_zero, w_zero, dtype)
        return self._fold(sums, self.output_shape(x.shape))

    @abc.abstractmethod
    def integer_weight(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight's codes, scale and zero point: weight = scale (codes - zero_point)."""

    @property
    @abc.abstractmethod
    def _weight_grid(self) -> Grid:
        """The integers that a weight may be."""

    @abc.abstractmethod
    def _patches(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        """Return what each output multiplies, ``(groups, positions, K)``, of the input's integers ``codes``."""

    @abc.abstractmethod
    def _fold(self, sums: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return sums ``(groups, positions, channels)`` in the output's ``shape``."""
