"""When a quantized layer runs on integer kernels, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank_nn.layers._affine import Grid, unsigned_grid
from lowrank_nn.layers._deferred import Deferred
from lowrank_nn.layers._deferred_sources import Bytes, Given, Product, computed
from lowrank_nn.layers._onednn import CodeGrid, PackedWeight, is_exact, sums_fit
from lowrank_nn.layers._packed import Derived, is_channels_last, may_use_kernel, own_tensors, takes

if TYPE_CHECKING:
    from lowrank_nn.layers._integer import IntegerLayer

_MANY = 8  # channels from which on the kernels reorder bytes more slowly than torch does


class Kernel:
    """A layer's weight, packed.

    Args:
        layer: The layer; :func:`obstacle` has nothing to say of it.

    Attributes:
        grid: Grid of the inputs.
        weight: The packed weight.
    """

    def __init__(self, layer: IntegerLayer) -> None:
        scale, zero_point, grid = layer._input_grid("forward")
        codes, weight_scale, _ = layer.integer_weight()
        self.grid = CodeGrid(float(scale), int(zero_point), grid.high)
        self._geometry = layer.geometry()
        self._channels_last = is_channels_last(codes)
        self._shapes: tuple[tuple[int, ...], tuple[int, ...] | None] | None = None
        self.weight = PackedWeight(codes.detach(), weight_scale.detach(), layer.bias, self.grid, self._geometry)

    def __call__(self, layer: IntegerLayer, x: Tensor) -> Tensor:
        """Compute ``layer`` on ``x``, or return a tensor that can be computed, where the layer is ``chained``."""
        if self._geometry is not None and len(known_shape(x)) == 3:
            return self(layer, x.unsqueeze(0)).squeeze(0)
        if self.output_shape(layer, known_shape(x)) is None:
            return layer.simulate(x)  # which says what is wrong
        return self.output(layer, self.input_of(x))

    def input_of(self, x: Tensor) -> Bytes:
        """Return the bytes of a batched input."""
        if isinstance(x, Deferred):
            return x.source.promised(self.grid)
        codes, channels_last = self.grid.encode(x), is_channels_last(x)
        if self._geometry is not None and codes.shape[1] >= _MANY and not channels_last:
            codes = codes.contiguous(memory_format=torch.channels_last)
        return Given(codes, channels_last)

    def output_shape(self, layer: IntegerLayer, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape of the output; None where the layer does not take inputs of this shape."""
        known = self._shapes  # both shapes in one: other threads call with others
        if known is None or known[0] != shape:
            known = self._shapes = (shape, layer.output_shape(shape) if takes(layer, shape) else None)
        return known[1]

    def product(self, layer: IntegerLayer, input: Bytes) -> Product:
        """Return what ``layer`` makes of the bytes of an input."""
        shape = self.output_shape(layer, input.shape)
        assert shape is not None
        return Product(self.weight, input, shape, input.channels_last or self._channels_last)

    def output(self, layer: IntegerLayer, input: Bytes) -> Tensor:
        """Return the output of ``layer`` for the bytes of an input."""
        product = self.product(layer, input)
        # Who looks at function calls expects to see the layer's result.
        if layer.chained and not torch._C._len_torch_function_stack():
            return Deferred(product)
        return computed(product)


def known_shape(x: Tensor) -> tuple[int, ...]:
    """Return the shape of an input; a deferred one is asked without going through torch."""
    return x.source.shape if type(x) is Deferred else x.shape


def kernel_for(layer: IntegerLayer, x: Tensor) -> Kernel | None:
    """Return the kernel to compute ``layer`` on ``x`` with, or None where the layer has to be simulated.

    That is in train mode, where gradients are wanted, where somebody records or transforms what is computed (compilers,
    exporters, dispatch modes), in other dtypes than float32, on other devices than the CPU, and where :func:`obstacle`
    says why.
    """
    if layer.activation_bits is None or not may_use_kernel(layer, x):
        return None
    return KERNELS.of(layer)


def packed_weight(layer: IntegerLayer) -> PackedWeight | None:
    """Return the packed weight of a layer that can run on integer kernels."""
    kernel = KERNELS.of(layer)
    return None if kernel is None else kernel.weight


def obstacle(layer: IntegerLayer) -> str:
    """Return why the layer cannot run on integer kernels whatever its input is; empty if it can."""
    grid = layer._weight_grid
    if layer.activation_bits is None:
        return "inputs are not quantized"
    if grid != Grid(-grid.high, grid.high):
        return "the kernels have no zero point for weights (scheme='affine')"
    tensors = own_tensors(layer)
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "integer kernels are for the CPU"
    if any(tensor.is_floating_point() and tensor.dtype is not torch.float32 for tensor in tensors):
        return "integer kernels are for layers in float32"
    if any(tensor.is_inference() for tensor in tensors):
        return "tensors made in inference mode do not show their changes"
    top = unsigned_grid(layer.activation_bits).high
    if not is_exact(top, grid.high):
        return "this machine has no exact integer kernels"
    if not sums_fit(layer.integer_weight()[0], top):
        return "sums could overflow 32 bits"
    return ""


def _kernel(layer: IntegerLayer) -> Kernel | None:
    return None if obstacle(layer) else Kernel(layer)


KERNELS: Derived[Kernel | None] = Derived(_kernel)
"""The kernels of layers, None where there is an obstacle."""
