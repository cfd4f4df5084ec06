"""Quantization in ONNX: pairs of QuantizeLinear and DequantizeLinear, which engines turn into integer kernels."""

from __future__ import annotations

import torch
from torch import Tensor

_OPSET = 13  # the first with a scale per channel


def exports_pairs(scale: Tensor) -> bool:
    """Whether a model is being exported to ONNX in a way that takes these operators, and the layer is in float32."""
    return torch.onnx.is_in_onnx_export() and not torch._C._is_tracing() and scale.dtype is torch.float32


def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return ``x`` rounded to bytes and back, as two operators of ONNX.

    Args:
        x: float32 values.
        scale: Scale, 0-dimensional.
        zero_point: Zero point from 0 to 255, 0-dimensional.
    """
    zero = zero_point.to(torch.uint8)
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear", (x, scale, zero), dtype=torch.uint8, shape=x.shape, version=_OPSET
    )
    return _dequantize(codes, scale, zero)


def dequantize_weight(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return a weight from its integers, as one operator of ONNX, so that the file holds the integers.

    Args:
        codes: int8 weight, output channels first.
        scale: Its scales, ``(O,)`` or 0-dimensional.
        zero_point: Zero point from -128 to 127, 0-dimensional.
    """
    return _dequantize(codes, scale, zero_point.to(torch.int8).expand_as(scale))


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, scale, zero_point),
        {"axis": 0} if scale.dim() else None,
        dtype=torch.float32,
        shape=codes.shape,
        version=_OPSET,
    )
