"""Affine quantization as pure functions: grids, scales, rounding, straight-through gradients, integer algebra.

A number x is stored as an integer q on a grid of 2^bits (or 2^bits - 1) levels: q = round(x / s) + z, clipped to the
grid, and read back as s (q - z). s is the scale; z, the zero point, is the integer that stands for 0, so that 0 is
always exact.

References:
    Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
    Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons" (straight-through).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FAR = 2.0**20
SMALLEST = 2.0**-12


class Grid(NamedTuple):
    """The integers from ``low`` to ``high``."""

    low: int
    high: int


def symmetric_grid(bits: int) -> Grid:
    """Return -(2^(bits-1) - 1) .. 2^(bits-1) - 1: as many levels below zero as above."""
    return Grid(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def signed_grid(bits: int) -> Grid:
    """Return -2^(bits-1) .. 2^(bits-1) - 1: the unsigned grid shifted into the range of signed integers."""
    return Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def unsigned_grid(bits: int) -> Grid:
    """Return 0 .. 2^bits - 1."""
    return Grid(0, 2**bits - 1)


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: ``dtype``, but at least float32."""
    return torch.promote_types(dtype, torch.float32)


def symmetric_scale(weight: Tensor, bits: int) -> Tensor:
    """Return the scale of each output channel, max |w| / (2^(bits-1) - 1), shape ``(weight.shape[0],)``.

    Channels that are smaller than the largest by more than 2^12 count as that large: engines that hold the bias as a
    32-bit multiple of the scale would overflow, and nothing is seen of the difference. A weight of zeros gets the
    scale 1.

    Args:
        weight: Weight with the output channels first.
        bits: Bits per weight, at least 2.
    """
    peaks = weight.detach().flatten(1).abs().amax(1).to(widened(weight.dtype))
    peaks = peaks.clamp(min=SMALLEST * peaks.amax(0))
    return _storable(peaks / symmetric_grid(bits).high, weight.dtype)


def affine_parameters(low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scale (max - min) / levels and the zero point of a range, which is widened to include 0.

    With them q = round((p - min) * levels / (max - min)) as in the literature, after min is moved by less than half
    a step onto a multiple of the scale, so that 0 falls on the grid.

    Args:
        low: Smallest value, 0-dimensional.
        high: Largest value, 0-dimensional.
        grid: Integers to map the range to.
        dtype: Dtype of the scale.

    Returns:
        The scale, of type ``dtype``, and the zero point that goes with it, int32; both 0-dimensional. A range without
        width gets the scale 1.
    """
    wide = widened(low.dtype)
    bottom, top = low.detach().to(wide).clamp(max=0), high.detach().to(wide).clamp(min=0)
    scale = _storable((top - bottom) / (grid.high - grid.low), dtype)
    zero_point = grid.low - torch.round(bottom / scale.to(wide))
    return scale, zero_point.clamp(*grid).to(torch.int32)


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    # Scales so small that float16 has few or no digits left for them are rounded up: a step too long costs a little
    # accuracy, one too short cuts off the largest values.
    info = torch.finfo(dtype)
    rounded = (scale + info.smallest_normal * info.eps / 2).to(dtype)
    return torch.where(scale > 0, rounded, torch.ones_like(rounded))


def round_through(x: Tensor) -> Tensor:
    """Round to the nearest integer, halves to even; the gradient passes as if nothing was rounded."""
    # Exact: round(x) - x is a float without rounding error, and so is the sum.
    return x + (torch.round(x) - x).detach()


def to_grid(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Return round(x / scale) + zero_point clipped to ``grid``, as floats of the widened dtype.

    The gradient is the straight-through one: 1 / scale where the rounded value lies on the grid, 0 where it was
    clipped.

    Args:
        x: Values of any shape.
        scale: Scale, of a shape that broadcasts to ``x``.
        zero_point: Zero point, likewise.
        grid: Integers to clip to.
    """
    wide = widened(x.dtype)
    # The first clipping, far off every grid, only keeps infinities out of the rounding.
    steps = (x.to(wide) / scale.to(wide)).clamp(-FAR, FAR)
    return (round_through(steps) + zero_point).clamp(*grid)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Return the integers that stand for ``x``, of the integer type ``dtype``; arguments as for :func:`to_grid`."""
    return to_grid(x.detach(), scale, zero_point, grid).to(dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return scale (codes - zero_point), of the dtype of ``scale``, computed in float32 or wider."""
    wide = widened(scale.dtype)
    return ((codes.to(wide) - zero_point) * scale.to(wide)).to(scale.dtype)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Return the nearest number to each entry of ``x`` that the grid holds, of the dtype of ``x``.

    The gradient is the straight-through one: 1 where the value lies on the grid, 0 where it was clipped.
    """
    wide = widened(x.dtype)
    return ((to_grid(x, scale, zero_point, grid) - zero_point) * scale.to(wide)).to(x.dtype)


def accumulator_dtype(terms: int, x_grid: Grid, w_grid: Grid) -> torch.dtype:
    """Return int32 where a sum of ``terms`` products cannot overflow it, else int64."""
    largest = terms * (x_grid.high - x_grid.low) * (w_grid.high - w_grid.low)
    return torch.int32 if largest < 2**31 else torch.int64


def integer_product(x: Tensor, w: Tensor, x_zero: Tensor, w_zero: Tensor, dtype: torch.dtype) -> Tensor:
    r"""Return sum_k (x_k - x_zero) (w_k - w_zero) from the integers as they are stored.

    Written out, as integer hardware does it: sum x w - w_zero sum x - x_zero sum w + K x_zero w_zero. Partial sums
    may wrap around in int32; the total is exact wherever it fits. Where torch has no integer matrix product (all
    devices but the CPU) the products are summed in float64, which is exact below 2^53.

    Args:
        x: Integers, ``(groups, positions, K)``.
        w: Integers, ``(groups, K, channels)``.
        x_zero: Zero point of ``x``, 0-dimensional.
        w_zero: Zero point of ``w``, 0-dimensional.
        dtype: Integer type to accumulate in, from :func:`accumulator_dtype`.

    Returns:
        ``(groups, positions, channels)`` of type ``dtype``.
    """
    working = dtype if x.device.type == "cpu" else torch.float64
    x, w, x_zero, w_zero = (t.to(working) for t in (x, w, x_zero, w_zero))
    products = torch.bmm(x, w)
    x_sums = x.sum(2, keepdim=True, dtype=working)
    w_sums = w.sum(1, keepdim=True, dtype=working)
    return (products - w_zero * x_sums - x_zero * w_sums + x.shape[2] * x_zero * w_zero).to(dtype)
