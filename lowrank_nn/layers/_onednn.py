"""Convolutions and matrix products of uint8 inputs with int8 weights, on the oneDNN kernels that torch comes with.

These operators (``torch.ops.onednn``) are what torch's own compiler lowers quantized models to. They are not
documented, and on CPUs without dot products of bytes they saturate; so they are used only where a trial gave exact
sums.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_nn.layers._window import Pads, pad_and_crop

Activation = tuple[str, tuple[float, ...]]
"""Name and numbers of the function that a kernel applies to its result; ``("none", ())`` for none."""

NONE: Activation = ("none", ())


class CodeGrid(NamedTuple):
    """What the bytes of a quantized tensor stand for: x = scale (code - zero_point), code from 0 to ``top``."""

    scale: float
    zero_point: int
    top: int

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes that stand for ``x``: round(x / scale) + zero_point, clipped to the grid.

        The same integers as ``quantize`` gives, several times as fast: torch's cast of floats to uint8 is not
        vectorised, that to int8 is.

        Args:
            x: float32 values on the CPU.
        """
        steps = torch.div(x, self.scale).round_()
        steps.clamp_(-self.zero_point, self.top - self.zero_point).add_(self.zero_point - 128)
        return steps.to(torch.int8).view(torch.uint8).bitwise_xor_(128)

    def decode(self, codes: Tensor) -> Tensor:
        """Return what bytes stand for, float32."""
        return codes.to(torch.float32).sub_(self.zero_point).mul_(self.scale)


class Geometry(NamedTuple):
    """Where the taps of a convolution are.

    Attributes:
        stride: Stride along rows and columns.
        pads: Columns and rows to add, (left, right, top, bottom), or where negative to cut off.
        dilation: Spacing of the taps.
        groups: Number of blocked connections.
        mode: What to add: ``"constant"`` for zeros, ``"reflect"``, ``"replicate"`` or ``"circular"``.
    """

    stride: tuple[int, int]
    pads: Pads
    dilation: tuple[int, int]
    groups: int
    mode: str = "constant"


class PackedWeight:
    """An int8 weight in the layout of the kernels, with the scales, bias and input grid that belong to it.

    Zero points of the input are not left to the kernels, which take up to three times as long with one: with the sum
    of the weights they go into the bias, and where the map is padded, it is padded before.

    Args:
        codes: int8 weight, ``(O, I / groups, kh, kw)`` or ``(O, I)``.
        scale: Its scales, ``(O,)`` or 0-dimensional.
        bias: Bias ``(O,)`` in floating point, or None.
        grid: Grid of the inputs.
        geometry: Of a convolution; None for a matrix product.
    """

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, grid: CodeGrid, geometry: Geometry | None = None
    ) -> None:
        self.grid, self.geometry = grid, geometry
        self._codes = codes.contiguous()
        self._scale = scale.to(torch.float32).expand(len(codes)).contiguous()
        self._zero = torch.zeros(len(codes), dtype=torch.int32, device="cpu")
        self._bias = _bias_with_zero_point(codes, self._scale, bias, grid)
        self._packed: Tensor | None = None
        if geometry is not None:
            left, right, top, bottom = geometry.pads
            zeros = grid.zero_point == 0 and geometry.mode == "constant" and left == right >= 0 and top == bottom >= 0
            inside = zeros or not any(geometry.pads)
            self._pads = None if inside else geometry.pads
            padding = [top, left] if inside else [0, 0]
            # The list arguments of the operators, made once.
            self._taps = (list(geometry.stride), padding, list(geometry.dilation), geometry.groups)

    def run(self, codes: Tensor, out: CodeGrid | None, activation: Activation = NONE) -> Tensor:
        """Return the activation of scale_x scale_w sum (x - z) w + bias.

        Args:
            codes: Input on this weight's grid, ``(N, I, H, W)``, or ``(*, I)`` for a matrix product.
            out: Grid of the bytes to return; None for float32.
            activation: What to apply to the sums.

        Returns:
            ``(N, O, H', W')`` in channels-last order, or ``(N, O)``.
        """
        codes = codes.reshape(-1, codes.shape[-1]) if self.geometry is None else self._padded(codes)
        name, numbers = activation
        head = (codes, self.grid.scale, 0, self._weight(codes), self._scale, self._zero, self._bias)
        tail = (*_output(out), name, list(numbers), "")
        if self.geometry is None:
            return _clipped(torch.ops.onednn.qlinear_pointwise.default(*head, *tail), out)
        return _clipped(torch.ops.onednn.qconv_pointwise.default(*head, *self._taps, *tail), out)

    def run_and_add(
        self, codes: Tensor, out: CodeGrid | None, added: Tensor, added_grid: CodeGrid, activation: Activation
    ) -> Tensor:
        """As :meth:`run` of a convolution, with another tensor added before the activation.

        Args:
            codes: Input.
            out: Grid of the bytes to return; None for float32.
            added: What to add, of the output's shape, in channels-last order: bytes if ``out`` is a grid, float32 if
                not. Overwritten.
            added_grid: What those bytes stand for.
            activation: ``("none", ())`` or ``("relu", ())``.
        """
        codes = self._padded(codes)
        head = (codes, self.grid.scale, 0, self._weight(codes), self._scale, self._zero, added, self._bias)
        accumulate: tuple[Any, ...] = (added_grid.scale, added_grid.zero_point, "sum", 1.0, activation[0], [], "")
        y = torch.ops.onednn.qconv2d_pointwise.binary(*head, *self._taps, *_output(out), *accumulate)
        return _clipped(y, out)

    def _padded(self, codes: Tensor) -> Tensor:
        assert self.geometry is not None
        if self._pads is None:
            return codes
        return pad_and_crop(codes, self._pads, self.geometry.mode, self.grid.zero_point)

    def _weight(self, codes: Tensor) -> Tensor:
        """Return the weight in the order that suits inputs like the first one."""
        if self._packed is None:
            if self.geometry is None:
                self._packed = torch.ops.onednn.qlinear_prepack(self._codes, list(codes.shape))
            else:
                shape = list(codes.shape)
                self._packed = torch.ops.onednn.qconv_prepack(
                    self._codes, self._scale, self.grid.scale, 0, *self._taps, shape
                )
        assert self._packed is not None
        return self._packed


def _bias_with_zero_point(codes: Tensor, scale: Tensor, bias: Tensor | None, grid: CodeGrid) -> Tensor | None:
    """Return bias - scale_x scale_w z sum w."""
    if grid.zero_point == 0:
        return None if bias is None else bias.detach().to(torch.float32)
    sums = codes.flatten(1).sum(1, dtype=torch.int64).double()
    shift = -grid.scale * grid.zero_point * scale.double() * sums
    return (shift if bias is None else bias.detach().double() + shift).to(torch.float32)


def _output(out: CodeGrid | None) -> tuple[float, int, torch.dtype]:
    return (1.0, 0, torch.float32) if out is None else (out.scale, out.zero_point, torch.uint8)


def _clipped(y: Tensor, out: CodeGrid | None) -> Tensor:
    """Clip to a grid of fewer than eight bits: the kernels saturate at 255 only."""
    return y if out is None or out.top == 255 else y.clamp_(max=out.top)


def sums_fit(codes: Tensor, top: int) -> bool:
    """Whether no sum of a weight's ``codes`` times bytes up to ``top`` can overflow int32."""
    return int(codes.abs().flatten(1).sum(1, dtype=torch.int64).max()) * top < 2**31


@functools.cache
def is_exact(input_top: int, weight_top: int) -> bool:
    """Whether the kernels are there and exact for bytes up to ``input_top`` and weights up to +-``weight_top``.

    Found out by a trial with the largest numbers. Where bytes are multiplied without VNNI or AMX, pairs of products
    saturate at 16 bits, and inputs of eight bits fail where those of seven pass.
    """
    with torch.inference_mode(False), torch.no_grad():
        try:
            return all(_try_convolution(input_top, weight_top, groups) for groups in (1, 16)) and _try_linear(
                input_top, weight_top
            )
        except (AttributeError, RuntimeError, NotImplementedError):
            return False


_TRIAL = CodeGrid(1.0, 3, 255)


def _try_convolution(input_top: int, weight_top: int, groups: int) -> bool:
    shape = (16, 16 // groups, 3, 3)
    weight, x = _extremes(shape, -weight_top, weight_top), _extremes((1, 16, 6, 6), 0, input_top)
    geometry = Geometry((1, 1), (1, 1, 1, 1), (1, 1), groups)
    found = PackedWeight(weight.to(torch.int8), weight.new_ones(()), None, _TRIAL, geometry).run(
        x.to(torch.uint8), None
    )
    return torch.equal(found.double(), torch.conv2d((x - 3).double(), weight.double(), None, 1, 1, 1, groups))


def _try_linear(input_top: int, weight_top: int) -> bool:
    weight, x = _extremes((16, 64), -weight_top, weight_top), _extremes((4, 64), 0, input_top)
    found = PackedWeight(weight.to(torch.int8), weight.new_ones(()), None, _TRIAL).run(x.to(torch.uint8), None)
    return torch.equal(found.double(), (x - 3).double() @ weight.double().T)


def _extremes(shape: Sequence[int], low: int, high: int) -> Tensor:
    """Return runs of ``high`` with a ``low`` now and then: neighbouring products are large and of one sign."""
    values = torch.full(tuple(shape), high, device="cpu")
    values.view(-1)[::7] = low
    return values
