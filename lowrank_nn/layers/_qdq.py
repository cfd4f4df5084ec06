"""Quantization in ONNX: pairs of QuantizeLinear and DequantizeLinear, which engines turn into integer kernels.

An engine runs a layer in integers where its inputs come from such pairs and its output goes into one. Between chained
layers they stand where the kernels of this library would pass bytes on: the same deferred tensors note what the forward
does, with a :class:`PairGrid` for the grid and a :class:`PairedLayer` for the packed weight.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_nn.layers._affine import affine_parameters, unsigned_grid
from lowrank_nn.layers._onednn import Activation, CodeGrid, Geometry

_OPSET = 13  # the first with a scale per channel
_LARGEST_BIAS = 2.0**31 - 2.0**28  # leaves room for the sums that engines add to it in 32 bits
_CLIPS = ("none", "relu", "hardtanh")  # what quantizing the result does along the way
_FUNCTIONS = {"relu": F.relu, "hardtanh": F.relu6, "hardswish": F.hardswish, "swish": F.silu}


def exports_pairs(scale: Tensor) -> bool:
    """Whether a model is being exported to ONNX in a way that takes these operators, and the layer is in float32."""
    return torch.onnx.is_in_onnx_export() and not torch._C._is_tracing() and scale.dtype is torch.float32


@dataclasses.dataclass(frozen=True, eq=False)
class PairGrid:
    """What the bytes of a tensor of an exported graph stand for: x = scale (code - zero_point).

    Attributes:
        scale: Scale, 0-dimensional.
        zero_point: Zero point from 0 to 255, uint8, 0-dimensional.
    """

    scale: Tensor
    zero_point: Tensor

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes that stand for ``x``, as one operator of ONNX."""
        return torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, self.scale, self.zero_point), dtype=torch.uint8, shape=x.shape, version=_OPSET
        )

    def decode(self, codes: Tensor) -> Tensor:
        """Return what bytes stand for, as one operator of ONNX."""
        return _dequantize(codes, self.scale, self.zero_point)


class PairedLayer:
    """What stands in an exported graph for the packed weight of a chained layer: its floats are there already.

    Args:
        geometry: Of a convolution; None for a linear layer.
        output_range: Range of the layer's output, which lets engines compute it in integers where something else than
            the next quantized layer reads it; None where it is not known.
    """

    grid = None

    def __init__(self, geometry: Geometry | None, output_range: tuple[float, float] | None) -> None:
        self.geometry, self._output_range = geometry, output_range

    def run(self, y: Tensor, out: PairGrid | None, activation: Activation) -> Tensor:
        """Return the activation of the layer's floats ``y``, as bytes or, without ``out``, as floats."""
        if out is None or activation[0] not in _CLIPS:
            y = self._rounded(y)
        y = _activated(y, activation)
        return y if out is None else out.encode(y)

    def run_and_add(
        self, y: Tensor, out: PairGrid | None, added: Tensor, added_grid: PairGrid | CodeGrid, activation: Activation
    ) -> Tensor:
        """As :meth:`run`, with another tensor added before the activation: bytes of ``added_grid``, or floats."""
        if isinstance(added_grid, PairGrid):
            added = added_grid.decode(added)
        y = _activated(self._rounded(y) + added, activation)
        return y if out is None else out.encode(y)

    def _rounded(self, y: Tensor) -> Tensor:
        if self._output_range is None:
            return y
        low, high = torch.tensor(self._output_range, dtype=torch.float64, device="cpu")
        scale, zero_point = affine_parameters(low, high, unsigned_grid(8), torch.float32)
        grid = PairGrid(scale, zero_point.to(torch.uint8))
        return grid.decode(grid.encode(y))


def dequantize_weight(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return a weight from its integers, as one operator of ONNX, so that the file holds the integers.

    Args:
        codes: int8 weight, output channels first.
        scale: Its scales, ``(O,)`` or 0-dimensional.
        zero_point: Zero point from -128 to 127, 0-dimensional.
    """
    return _dequantize(codes, scale, zero_point.to(torch.int8).expand_as(scale))


def dequantize_bias(bias: Tensor, step: Tensor) -> Tensor:
    """Return a bias rounded to int32 multiples of ``step``, the scale of the input times that of the weight.

    Scales are chosen so that it fits; one that was changed since is clipped.

    Args:
        bias: Bias, ``(O,)``.
        step: Scale of the sums that it is added to, ``(O,)`` or 0-dimensional.
    """
    codes = torch.round(bias / step).clamp(-_LARGEST_BIAS, _LARGEST_BIAS).to(torch.int32)
    return _dequantize(codes, step, torch.zeros_like(step, dtype=torch.int32))


def _activated(y: Tensor, activation: Activation) -> Tensor:
    return y if activation[0] == "none" else _FUNCTIONS[activation[0]](y)


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, scale, zero_point),
        {"axis": 0} if scale.dim() else None,
        dtype=torch.float32,
        shape=codes.shape,
        version=_OPSET,
    )
