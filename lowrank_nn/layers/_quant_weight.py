"""The weight side of the quantized layers: integers that are frozen, or floats that train on a grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.cost import Cost
from lowrank_nn.layers._affine import (
    Grid,
    affine_parameters,
    dequantize,
    fake_quantize,
    quantize,
    signed_grid,
    symmetric_grid,
    symmetric_scale,
    widened,
)
from lowrank_nn.layers._base import Packing
from lowrank_nn.layers._integer import IntegerLayer
from lowrank_nn.layers._qdq import dequantize_bias, dequantize_weight, exports_pairs
from lowrank_nn.layers._window import Window

Scheme = Literal["symmetric", "affine"]

BUFFERS = ("weight_int", "weight_scale", "weight_zero_point", "mask", "input_scale", "input_zero_point")
LARGEST_BIAS = 2.0**30  # in steps of the sums, which are added to it in 32 bits


class QuantizedWeightLayer(IntegerLayer):
    """Base of the layers whose weight lies on a grid of integers, in one of two states.

    Frozen, it is int8 integers and their scale; nothing of it trains. Not frozen, it is a float parameter that is
    rounded to the grid in every forward, in train and eval mode alike, with straight-through gradients
    (quantization-aware training); its scale follows it from step to step.

    Attributes:
        bits: Bits per weight.
        scheme: ``"symmetric"`` or ``"affine"``.
        frozen: Which of the two states the weight is in.
        window: Place of the stored kernel in the dense weight, or None where it is all of it.
        nonzeros: Entries of the stored kernel that the mask keeps, or None where there is no mask.
        latent: The float weight, a parameter; None when frozen.
        weight_int: The integers, int8, of the stored kernel's shape; None when not frozen.
        weight_scale: The scale, ``(O,)`` (symmetric) or 0-dimensional (affine); None when not frozen.
        weight_zero_point: The integer that stands for 0, 0-dimensional; None when not frozen or symmetric.
        mask: Bool buffer of the stored kernel's shape: which entries are not held at zero; or None.
    """

    bits: int
    scheme: Scheme
    frozen: bool
    nonzeros: int | None
    latent: nn.Parameter | None
    weight_int: Tensor | None
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    mask: Tensor | None
    window: Window | None = None

    def freeze(self) -> Self:
        """Turn the float weight into integers, in place; the layer computes the same as before.

        The parameter ``latent`` is gone afterwards: take it out of the optimizer too.

        Returns:
            The layer itself.
        """
        if not self.frozen:
            assert self.latent is not None
            codes, scale, zero_point = self._rounded(self.latent)
            kept = zero_point if self.scheme == "affine" else None
            self._set_buffers(weight_int=codes, weight_scale=scale, weight_zero_point=kept)
            self.latent, self.frozen = None, True
        return self

    def unfreeze(self) -> Self:
        """Turn the integers into a float parameter that trains, in place; the layer computes the same as before.

        Returns:
            The layer itself.
        """
        if self.frozen:
            self.latent = nn.Parameter(self.stored_weight())
            self._set_buffers(weight_int=None, weight_scale=None, weight_zero_point=None)
            self.frozen = False
        return self

    def stored_weight(self) -> Tensor:
        """Return the weight of the stored kernel's shape: numbers on the grid; straight-through gradients."""
        if self.frozen:
            codes, scale, zero_point = self.integer_weight()
            if exports_pairs(scale):
                return dequantize_weight(codes, scale, zero_point)
            return dequantize(codes, self._per_channel(scale), zero_point)
        assert self.latent is not None
        kernel = self._masked(self.latent)
        scale, zero_point = self._grid_of(kernel)
        return fake_quantize(kernel, self._per_channel(scale), zero_point, self._weight_grid)

    def _stored_bias(self) -> Tensor | None:
        """Return the bias; in an exported graph as integers in steps of the sums, which engines run in integers."""
        if self.bias is None or self.input_scale is None or not self.frozen or not exports_pairs(self.input_scale):
            return self.bias
        return dequantize_bias(self.bias, self.input_scale * self.integer_weight()[1])

    def integer_weight(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight as integers: weight = scale (codes - zero_point).

        Returns:
            Codes, int8, of the stored kernel's shape, the zero point where the mask holds the weight at zero; the
            scale, ``(O,)`` or 0-dimensional; the zero point, int32, 0-dimensional, 0 in the symmetric scheme.
        """
        if self.frozen:
            assert self.weight_int is not None
            assert self.weight_scale is not None
            codes, scale, zero_point = self.weight_int, self.weight_scale, self.weight_zero_point
            if zero_point is None:
                zero_point = torch.zeros((), dtype=torch.int32, device=codes.device)
        else:
            assert self.latent is not None
            codes, scale, zero_point = self._rounded(self.latent)
        if self.mask is not None:
            codes = torch.where(self.mask, codes, zero_point.to(torch.int8))
        return codes, scale, zero_point

    def packing(self) -> Mapping[str, Packing]:
        """Store integers in the bits they need, and nothing of what a mask drops."""
        mask = None if self.mask is None else "mask"
        if self.frozen:
            return {"weight_int": Packing(self.bits, mask)}
        return {} if mask is None else {"latent": Packing(mask=mask)}

    def stored_cost(self) -> Cost:
        """Return params, bytes and nonzeros of the weight, and its MACs at one position of the output.

        ``params`` counts the stored weights, whatever their bits, and not the scales. ``bytes`` is what a file takes:
        ceil(n bits / 8) for n weights (floats when not frozen), with a mask the kept weights and ceil(n / 8) for the
        mask, and scales and zero points, those of the input too, as they are.
        """
        kernel = cast(Tensor, self.weight_int if self.frozen else self.latent)
        stored = kernel.numel()
        kept = stored if self.nonzeros is None else self.nonzeros
        width = self.bits if self.frozen else 8 * kernel.element_size()
        beside = (self.weight_scale, self.weight_zero_point, self.input_scale, self.input_zero_point)
        size = -(-kept * width // 8) + (0 if self.mask is None else -(-stored // 8))
        size += sum(t.numel() * t.element_size() for t in beside if t is not None)
        return Cost(params=stored, macs=stored, bytes=size, nonzeros=kept)

    def _set_buffers(self, **changes: Tensor | None) -> None:
        """Change buffers, and keep their order. Those that are None are plain attributes.

        torch.export (2.13) gives tensors to the wrong names where a registered buffer is None.
        """
        tensors = {name: getattr(self, name) for name in BUFFERS} | changes
        for name in BUFFERS:
            delattr(self, name)
        for name, tensor in tensors.items():
            if tensor is None:
                setattr(self, name, None)
            else:
                self.register_buffer(name, tensor)

    @property
    def _weight_grid(self) -> Grid:
        return symmetric_grid(self.bits) if self.scheme == "symmetric" else signed_grid(self.bits)

    def _grid_of(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and zero point that fit ``kernel``."""
        if self.scheme == "affine":
            return affine_parameters(kernel.amin(), kernel.amax(), self._weight_grid, kernel.dtype)
        scale = symmetric_scale(kernel, self.bits)
        if self.bias is not None and self.input_scale is not None:
            # A channel that is little beside its bias gets longer steps: engines count the bias in them, in 32 bits.
            wide = widened(scale.dtype)
            least = self.bias.detach().to(wide).abs() / (LARGEST_BIAS * self.input_scale.to(wide))
            scale = torch.maximum(scale, least.to(scale.dtype))
        return scale, torch.zeros((), dtype=torch.int32, device=kernel.device)

    def _rounded(self, kernel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes (0 where masked), scale and zero point of ``kernel``."""
        if kernel.is_meta:  # there is nothing to round, and a plan of many layers would wait for torch's meta kernels
            scale = kernel.new_empty(kernel.shape[0] if self.scheme == "symmetric" else ())
            return torch.empty_like(kernel, dtype=torch.int8), scale, scale.new_empty((), dtype=torch.int32)
        kernel = self._masked(kernel.detach())
        scale, zero_point = self._grid_of(kernel)
        codes = quantize(kernel, self._per_channel(scale), zero_point, self._weight_grid, torch.int8)
        return self._masked(codes), scale, zero_point

    def _store_(self, kernel: Tensor) -> None:
        if not self.frozen:
            assert self.latent is not None
            self.latent.copy_(self._masked(kernel))
            return
        assert self.weight_scale is not None
        self._fill_(*self._rounded(kernel.to(self.weight_scale.dtype)))

    def _fill_(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Set the tensors of the frozen weight."""
        assert self.weight_int is not None
        assert self.weight_scale is not None
        self.weight_int.copy_(codes)
        self.weight_scale.copy_(scale)
        if self.weight_zero_point is not None:
            self.weight_zero_point.copy_(zero_point)

    def _masked(self, kernel: Tensor) -> Tensor:
        return kernel if self.mask is None else torch.where(self.mask, kernel, 0)

    def _per_channel(self, scale: Tensor) -> Tensor:
        """Return ``scale`` in a shape that broadcasts to the stored kernel."""
        return scale.reshape(-1, *(1,) * (len(self.weight_shape) - 1))
