"""The input side of the quantized layers: a range measured on data, and the rounding to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_nn.errors import CalibrationError, OptionError
from lowrank_nn.layers._affine import Grid, affine_parameters, fake_quantize, unsigned_grid
from lowrank_nn.layers._deferred import Deferred
from lowrank_nn.layers._leaf import LeafLayer
from lowrank_nn.layers._observers import ObserverName, make_observer
from lowrank_nn.layers._qdq import PairGrid, exports_pairs


class QuantizedInputLayer(LeafLayer):
    """Base of the layers that may round their input to unsigned integers, one scale and zero point for all of it.

    Attributes:
        activation_bits: Bits per input entry, or None where the input stays as it is.
        input_scale: Scale of the input, 0-dimensional; None without ``activation_bits``.
        input_zero_point: Zero point of the input, 0-dimensional; None without ``activation_bits``.
    """

    activation_bits: int | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def calibrate(self, inputs: Tensor | Iterable[Tensor], *, observer: ObserverName = "minmax") -> None:
        """Choose the range of the quantized input from what the layer is called with on typical data.

        Args:
            inputs: A tensor, or an iterable of tensors; taken one at a time.
            observer: ``"minmax"``, ``"percentile"``, ``"mse"`` or ``"entropy"``.

        Raises:
            OptionError: There is no such observer.
            CalibrationError: There are no values, or they are not finite floats; or the layer has no
                ``activation_bits``.
        """
        _, _, grid = self._input_grid("calibrate")
        watcher = make_observer(observer, grid.high.bit_length())
        try:
            for x in (inputs,) if isinstance(inputs, Tensor) else inputs:
                watcher.observe(x)
            low, high = watcher.range()
        except CalibrationError as error:
            raise CalibrationError(f"{type(self).__name__}: {error.message}") from error
        self.set_input_range(low, high)

    @torch.no_grad()
    def set_input_range(self, low: float, high: float) -> None:
        """Set the range of the quantized input to [min(low, 0), max(high, 0)]; inputs beyond it are clipped.

        Raises:
            CalibrationError: The numbers are not finite, or ``low`` is above ``high``; or the layer has no
                ``activation_bits``.
        """
        stored_scale, stored_zero_point, grid = self._input_grid("set_input_range")
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise CalibrationError(
                f"{type(self).__name__}: the input range must be two finite numbers (min, max), got ({low}, {high})."
            )
        ends = torch.tensor([low, high], dtype=torch.float64, device="cpu")
        scale, zero_point = affine_parameters(ends[0], ends[1], grid, stored_scale.dtype)
        stored_scale.copy_(scale)
        stored_zero_point.copy_(zero_point)

    def _quantized_input(self, x: Tensor) -> Tensor:
        if self.activation_bits is None:
            return x
        scale, zero_point, grid = self._input_grid("forward")
        # QuantizeLinear clips to the whole byte.
        if self.activation_bits == 8 and exports_pairs(scale):
            pair = PairGrid(scale, zero_point.to(torch.uint8))
            return pair.decode(x.source.codes(pair) if isinstance(x, Deferred) else pair.encode(x))
        return fake_quantize(x, scale, zero_point, grid)

    def _input_grid(self, method: str) -> tuple[Tensor, Tensor, Grid]:
        """Return scale, zero point and grid of the quantized input, which ``method`` needs."""
        if self.activation_bits is None:
            raise CalibrationError(
                f"{type(self).__name__}: {method} needs a quantized input, and this layer quantizes weights only. "
                "Build it with activation_bits=8."
            )
        assert self.input_scale is not None
        assert self.input_zero_point is not None
        return self.input_scale, self.input_zero_point, unsigned_grid(self.activation_bits)


def check_range(name: str, value: Sequence[float] | None) -> tuple[float, float] | None:
    """Return ``value`` as (min, max), or None where it is None.

    Raises:
        OptionError: It is not two finite numbers in order.
    """
    if value is None:
        return None
    pair = _pair(value)
    if pair is None or not (math.isfinite(pair[0]) and math.isfinite(pair[1]) and pair[0] <= pair[1]):
        raise OptionError(f"{name} must be two finite numbers (min, max), got {value!r}. Pass None if it is not known.")
    return pair


def check_calibration(name: str, activation_bits: int | None, inputs: Any, input_range: Any) -> None:
    """Refuse a range without quantized inputs, quantized inputs without a range, and two ranges.

    Raises:
        CalibrationError: ``activation_bits`` is given, and neither ``inputs`` nor ``input_range`` is.
        OptionError: ``inputs`` or ``input_range`` is given without ``activation_bits``, or both are given; or
            ``input_range`` is not two numbers.
    """
    given = [option for option, value in (("inputs", inputs), ("input_range", input_range)) if value is not None]
    if activation_bits is None and given:
        raise OptionError(
            f"{name}: {' and '.join(given)} has no effect without activation_bits. Pass activation_bits=8 as well."
        )
    if activation_bits is not None and not given:
        raise CalibrationError(
            f"{name}: activation_bits={activation_bits} needs to know the range of the layer's input. Pass inputs=, "
            "tensors that the layer sees on typical data, or input_range=(min, max)."
        )
    if len(given) == 2:
        raise OptionError(f"{name}: inputs and input_range say the same thing twice; pass one of them.")
    if input_range is not None and _pair(input_range) is None:
        raise OptionError(f"{name}: input_range must be two numbers (min, max), got {input_range!r}.")


def _pair(value: Any) -> tuple[float, float] | None:
    try:
        low, high = (float(number) for number in value)
    except (TypeError, ValueError):
        return None
    return low, high
