"""Costs and output shapes of torch's own layers, by formula."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import nn

from lowrank_nn.cost._cost import Cost

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def conv_output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: str | Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Return the spatial size of a convolution's output: floor((n + 2p - d(k - 1) - 1) / s) + 1 per dim."""
    if padding == "same":
        return tuple(size)
    pads = (0,) * len(size) if isinstance(padding, str) else padding
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, pads, dilation, strict=True)
    )


def tensor_cost(layer: nn.Module) -> Cost:
    """Return the storage of the tensors that ``layer`` itself holds (not its children's); no MACs."""
    params = sum(p.numel() for p in layer.parameters(recurse=False))
    stored = itertools.chain(layer.parameters(recurse=False), layer.buffers(recurse=False))
    return Cost(params=params, bytes=sum(t.numel() * t.element_size() for t in stored), nonzeros=params)


def dense_macs(layer: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the multiply-accumulates of one call of a dense layer; 0 for layers that do not multiply.

    A convolution does N H' W' C_out (C_in / groups) kh kw of them, a transposed one N H W C_in (C_out / groups)
    kh kw, a linear layer one for each weight and leading position.

    Args:
        layer: One of torch's convolutions (transposed too) or ``nn.Linear``; any other layer gives 0.
        input_shape: Shape of its input, batched or not.
    """
    if isinstance(layer, nn.Linear):
        return math.prod(input_shape[:-1]) * layer.in_features * layer.out_features
    if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        dims = len(layer.kernel_size)
        batch, size = math.prod(input_shape[: -dims - 1]), tuple(input_shape[-dims:])
        taps = layer.in_channels * layer.out_channels // layer.groups * math.prod(layer.kernel_size)
        if isinstance(layer, CONVOLUTIONS):
            size = conv_output_size(size, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        return batch * math.prod(size) * taps
    return 0


def fourier_macs(size: int) -> int:
    """Return what the Fourier transform of ``size`` real numbers takes, or its inverse: 5/4 n log2 n, rounded up.

    That is half the 5/2 n log2 n operations which are usually counted for fast transforms of any length.

    Args:
        size: n, how many numbers.

    References:
        Frigo, Johnson 2005, "The Design and Implementation of FFTW3".
    """
    return math.ceil(5 / 4 * size * math.log2(size))


def dense_cost(layer: nn.Module, input_shape: Sequence[int]) -> Cost:
    """Return the cost of one dense layer for an input of shape ``input_shape``, from its formula."""
    return tensor_cost(layer) + Cost(macs=dense_macs(layer, input_shape))
