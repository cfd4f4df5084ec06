"""Convolutions whose filters are transforms of few base filters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.cost import Cost
from lowrank_nn.decompose import tap_orders, transferred_filters, transferred_kernel
from lowrank_nn.decompose.transferred import Transforms
from lowrank_nn.errors import OptionError, check_whole_number
from lowrank_nn.layers._affine import widened
from lowrank_nn.layers._base import Packing, register_layer
from lowrank_nn.layers._leaf import LeafLayer
from lowrank_nn.layers._shapes import CompressedConv2d, PaddingMode, Size, draw_bias_
from lowrank_nn.layers._shared import ComputedBuffers, count_or_share
from lowrank_nn.layers._source import read_layer


@register_layer
class TransferredConv2d(ComputedBuffers, CompressedConv2d, LeafLayer):
    r"""``nn.Conv2d`` whose filters are transforms of few base filters: W_o = scale_o T_t(o) bases_b(o).

    The transforms reflect and turn the kernel plane, the same for all input channels; the sign of the scale negates.
    The bases are shared by all groups. Bases and scales train, the choice of base and transform stays. ``forward`` puts
    the weight together and convolves: the layer is smaller, not faster.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Stride of the convolution.
        padding: Padding: int, pair, ``"same"`` or ``"valid"``.
        dilation: Spacing of the kernel's taps.
        groups: Number of blocked connections.
        bias: Whether to add a learnable bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        base_filters: B, the number of base filters, from 1 to ``out_channels``.
        transforms: ``"dihedral"``, the eight turns and reflections of a square kernel (of others the flips),
            ``"flips"``, the reflections in both axes and both at once, or ``"none"``.
        device: Device of the tensors.
        dtype: Dtype of the parameters.

    Attributes:
        bases: The base filters, a parameter, shape ``(B, in_channels / groups, kh, kw)``.
        scale: Factor of each filter, a parameter, shape ``(out_channels,)``.
        indices: int32 buffer, shape ``(out_channels,)``: base of each filter times the number of transforms, plus its
            transform.
        orders: int64 buffer, never saved: the transforms as orders of the taps, shape ``(transforms, kh * kw)``.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``
        - Output: ``(N, out_channels, H', W')`` or ``(out_channels, H', W')``

    Raises:
        OptionError: An option has a value that is not allowed.

    References:
        Cohen, Welling 2016, "Group Equivariant Convolutional Networks" (rotations and reflections of filters).
        Shang, Sohn, Almeida, Lee 2016, "Understanding and Improving Convolutional Neural Networks via Concatenated
        Rectified Linear Units" (filters that are negatives of each other).
        Cheng, Wang, Zhou, Zhang 2017, "A Survey of Model Compression and Acceleration for Deep Neural Networks"
        (transferred convolutional filters).
    """

    main_options = ("base_filters", "transforms")

    indices: Tensor
    orders: Tensor

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
        base_filters: int,
        transforms: Transforms = "dihedral",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        what = f"{type(self).__name__}: base_filters"
        self.base_filters = check_whole_number(what, base_filters, 1, out_channels)
        self.transforms: Transforms = transforms
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bases = nn.Parameter(torch.empty((base_filters, *self.weight_shape[1:]), **factory))
        self.scale = nn.Parameter(torch.empty(out_channels, **factory))
        self.bias = nn.Parameter(torch.empty(out_channels, **factory)) if bias else None
        self.register_buffer("indices", torch.zeros(out_channels, dtype=torch.int32, device=device))
        orders = torch.empty(self._tap_orders().shape, dtype=torch.int64, device=device)
        self.register_buffer("orders", orders, persistent=False)
        self.fill_buffers()
        self.reset_parameters()

    def _tap_orders(self) -> Tensor:
        try:
            return tap_orders(self.kernel_size, self.transforms)
        except OptionError as error:
            raise OptionError(f"{type(self).__name__}: {error.message}") from None

    def fill_buffers(self) -> None:
        """Compute the orders of the taps."""
        if not self.orders.is_meta:
            self.orders.copy_(self._tap_orders())

    @classmethod
    def from_pretrained_layer(
        cls,
        layer: nn.Module,
        *,
        base_filters: int | None = None,
        share: float | None = None,
        transforms: Transforms = "dihedral",
    ) -> Self:
        """Build the layer from ``layer``: bases, transforms and scales that make the squared change of weights small.

        Filters of a trained network are hardly transforms of each other, so most layers are to be trained after.

        Args:
            layer: A trained dense layer of the class replaced; not changed.
            base_filters: Number of base filters.
            share: In place of ``base_filters``, their number as a share of the filters, above 0 and at most 1.
            transforms: ``"dihedral"``, ``"flips"`` or ``"none"``.

        Raises:
            UnsupportedLayerError: The layer cannot be carried over whole.
            OptionError: An option has a value that is not allowed, or not one of ``base_filters`` and ``share`` is
                given.
        """
        source = read_layer(layer, cls)
        base_filters = count_or_share(cls, "base_filters", base_filters, share, len(source.weight))
        new = source.empty(cls, base_filters=base_filters, transforms=transforms)
        new.approximate_(source.weight)
        return source.finish(new)

    @classmethod
    def usual_options(cls, layer: nn.Module) -> dict[str, Any]:
        """Half as many base filters as filters."""
        return {"share": 0.5}

    @classmethod
    def lossless_options(cls, layer: nn.Module) -> dict[str, Any] | None:
        """Every filter a base filter."""
        return {"share": 1}

    @torch.no_grad()
    def approximate_(self, weight: Tensor) -> None:
        """Set bases, scales and indices by :func:`lowrank_nn.decompose.transferred_filters`."""
        bases, scale, indices = transferred_filters(weight, self.base_filters, self.orders)
        self.bases.copy_(bases)
        self.scale.copy_(scale)
        self.indices.copy_(indices)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the bases as torch draws dense weights, and deal them out: with all transforms, then all negated."""
        bound = self.fan_in**-0.5
        self.bases.uniform_(-bound, bound)
        if not self.indices.is_meta:
            place, count = torch.arange(self.out_channels, device=self.scale.device), len(self.orders)
            turn = place // self.base_filters
            self.indices.copy_(place % self.base_filters * count + turn % count)
            self.scale.copy_(torch.where(turn // count % 2 == 0, 1, -1))
        draw_bias_(self.bias, self.fan_in)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        return self.convolve(input, self.dense_weight(), self.bias)

    def dense_weight(self) -> Tensor:
        """Return the transformed bases times their scales, shape ``(out_channels, in_channels / groups, kh, kw)``."""
        # In half precision the gradient of a base that many filters share would stall.
        wide = self.bases.to(widened(self.bases.dtype))
        kernel = transferred_kernel(wide, self.orders, self.scale.to(wide.dtype), self.indices)
        return kernel.to(self.bases.dtype)

    def packing(self) -> Mapping[str, Packing]:
        """Store indices in the bits they need."""
        return {"indices": Packing(self._index_bits)}

    def stored_cost(self) -> Cost:
        """Return params, bytes and nonzeros of bases and scales, and the MACs of the weight put together.

        ``bytes`` counts the indices too, packed.
        """
        count = self.bases.numel() + self.scale.numel()
        size = count * self.bases.element_size() + math.ceil(self.out_channels * self._index_bits / 8)
        return Cost(params=count, macs=math.prod(self.weight_shape), bytes=size, nonzeros=count)

    @property
    def _index_bits(self) -> int:
        return max(1, (self.base_filters * len(self.orders) - 1).bit_length())
