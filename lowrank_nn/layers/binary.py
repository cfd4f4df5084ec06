"""Layers whose weights are signs, one bit each, with a scale per filter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lowrank_nn.cost import Cost
from lowrank_nn.layers._affine import widened
from lowrank_nn.layers._base import Packing, register_layer
from lowrank_nn.layers._leaf import LeafLayer
from lowrank_nn.layers._shapes import CompressedConv2d, CompressedLinear, PaddingMode, Size, draw_bias_
from lowrank_nn.layers._source import read_layer


def sign_through(x: Tensor) -> Tensor:
    """Return 1 where ``x`` is not negative, else -1; the gradient passes where x is from -1 to 1, else it is 0."""
    clipped = x.clamp(-1, 1)
    # The difference is exactly zero: it carries the gradient.
    return 1 - 2 * (x < 0).to(x.dtype) + (clipped - clipped.detach())


class BinaryLayer(LeafLayer):
    r"""Base of the binary layers: W_o = alpha_o sign(latent_o), alpha_o = mean \|latent_o\| over each filter.

    The weight is in one of two states. Frozen, it is a bit per weight and a scale per filter; nothing of it trains.
    Not frozen, it is a float parameter whose sign and mean are taken in every forward, with straight-through
    gradients that stop at +-1.

    Attributes:
        frozen: Which of the two states the weight is in.
        binary_inputs: Whether the input is replaced by its signs too.
        latent: The float weight, a parameter; None when frozen.
        signs: uint8, 1 for plus and 0 for minus, of the weight's shape; None when not frozen.
        weight_scale: alpha, shape ``(O,)``; None when not frozen.
    """

    main_options = ("binary_inputs",)

    latent: nn.Parameter | None
    signs: Tensor | None
    weight_scale: Tensor | None

    def _set_up(self, bias: bool, frozen: bool, binary_inputs: bool, **factory: Any) -> None:
        """Create the tensors."""
        self.binary_inputs, self.frozen = binary_inputs, False
        self.latent = nn.Parameter(torch.empty(self.weight_shape, **factory))
        self.register_parameter("bias", nn.Parameter(self.latent.new_empty(self.weight_shape[0])) if bias else None)
        self.signs = self.weight_scale = None
        self.reset_parameters()
        if frozen:
            self.freeze()

    @classmethod
    def from_pretrained_layer(cls, layer: nn.Module, *, frozen: bool = True, binary_inputs: bool = False) -> Self:
        r"""Build the layer from ``layer``: its signs, and the mean of \|w\| of each filter for a scale.

        That is the least squared change of the weights. It is a large one: the layer is to be trained.

        Args:
            layer: A trained dense layer of the class replaced; not changed.
            frozen: True: bits, to be used. False: floats, to be trained; call ``freeze()`` after.
            binary_inputs: Whether the input is replaced by its signs too.

        Raises:
            UnsupportedLayerError: The layer cannot be carried over whole.
        """
        source = read_layer(layer, cls)
        new = source.empty(cls, frozen=frozen, binary_inputs=binary_inputs)
        new.approximate_(source.weight)
        return source.finish(new)

    @classmethod
    def usual_options(cls, layer: nn.Module) -> dict[str, Any]:
        """Bits for the weights alone."""
        return {}

    @classmethod
    def lossless_options(cls, layer: nn.Module) -> dict[str, Any] | None:
        """None: the weight is always rounded."""
        return None

    @torch.no_grad()
    def approximate_(self, weight: Tensor) -> None:
        """Set the signs to those of ``weight``, and the scales to the means of its absolute values."""
        if not self.frozen:
            assert self.latent is not None
            self.latent.copy_(weight)
            return
        assert self.signs is not None
        assert self.weight_scale is not None
        self.signs.copy_(weight >= 0)
        self.weight_scale.copy_(_mean_magnitudes(weight))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw signs at random, with scales that give torch's default variance, and the bias."""
        std = (3 * self.fan_in) ** -0.5
        if self.frozen:
            assert self.signs is not None
            assert self.weight_scale is not None
            self.signs.random_(0, 2)
            self.weight_scale.fill_(std)
        else:
            assert self.latent is not None
            self.latent.uniform_(-2 * std, 2 * std)  # of mean magnitude std
        draw_bias_(self.bias, self.fan_in)

    def freeze(self) -> Self:
        """Turn the float weight into signs and scales, in place; the layer computes the same as before.

        The parameter ``latent`` is gone afterwards: take it out of the optimizer too.

        Returns:
            The layer itself.
        """
        if not self.frozen:
            assert self.latent is not None
            latent = self.latent.detach()
            # Registered only now: torch.export (2.13) gives tensors to the wrong names where a buffer is None.
            del self.signs, self.weight_scale
            self.register_buffer("signs", (latent >= 0).to(torch.uint8))
            self.register_buffer("weight_scale", _mean_magnitudes(latent))
            self.latent, self.frozen = None, True
        return self

    def unfreeze(self) -> Self:
        """Turn signs and scales into a float parameter that trains, in place; the layer computes the same as before.

        Returns:
            The layer itself.
        """
        if self.frozen:
            latent = self.dense_weight()
            del self.signs, self.weight_scale
            self.signs = self.weight_scale = None
            self.latent, self.frozen = nn.Parameter(latent), False
        return self

    def dense_weight(self) -> Tensor:
        """Return alpha sign(latent), in the dense layer's shape; straight-through gradients."""
        if self.frozen:
            assert self.signs is not None
            assert self.weight_scale is not None
            scale, signs = self.weight_scale, self.signs.to(self.weight_scale.dtype) * 2 - 1
        else:
            assert self.latent is not None
            scale, signs = _mean_magnitudes(self.latent), sign_through(self.latent)
        return scale.reshape(-1, *(1,) * (signs.dim() - 1)) * signs

    def packing(self) -> Mapping[str, Packing]:
        """Store signs as bits."""
        return {"signs": Packing(bits=1)} if self.frozen else {}

    def stored_cost(self) -> Cost:
        """Return params, bytes and nonzeros of the weight, and its MACs at one position of the output.

        ``params`` counts the weights, whatever their bits, and not the scales. ``bytes`` is what a file takes:
        ceil(n / 8) for n signs, and the scales; floats when not frozen. The MACs are the dense layer's: there are no
        kernels for bits here.
        """
        count, floats = math.prod(self.weight_shape), cast(Tensor, self.weight_scale if self.frozen else self.latent)
        size = floats.numel() * floats.element_size() + (-(-count // 8) if self.frozen else 0)
        return Cost(params=count, macs=count, bytes=size, nonzeros=count)

    def _seen(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Return the input as the layer sees it: its signs times the mean magnitude over ``dims``, or itself."""
        return x.abs().mean(dims, keepdim=True) * sign_through(x) if self.binary_inputs else x


def _mean_magnitudes(weight: Tensor) -> Tensor:
    """Return the mean of the absolute values of each filter, shape ``(O,)``."""
    wide = weight.to(widened(weight.dtype))
    return wide.flatten(1).abs().mean(1).to(weight.dtype)


@register_layer
class BinaryConv2d(CompressedConv2d, BinaryLayer):
    r"""``nn.Conv2d`` whose weights are signs with a scale per filter: W_o = alpha_o sign(latent_o).

    alpha_o = mean \|latent_o\|, so that signs and scales are as near to the latent weight as such can be. The gradient
    is straight-through: the sign counts as the identity where \|latent\| <= 1, and stops it beyond, which keeps latent
    weights from growing without effect. Built by its constructor the layer trains from scratch (not frozen).
    ``forward`` computes in floating point: the layer is smaller, not faster.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Stride of the convolution.
        padding: Padding: int, pair, ``"same"`` or ``"valid"``.
        dilation: Spacing of the kernel's taps.
        groups: Number of blocked connections.
        bias: Whether to add a learnable bias; it stays in floating point.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        frozen: Whether the weight is stored as bits; else it is a float parameter.
        binary_inputs: Whether the input is replaced by its signs, times the mean of its absolute values over each
            sample (XNOR-Net takes that mean around each position). Behind a ReLU all signs are alike: normalise in
            front.
        device: Device of the tensors.
        dtype: Dtype of parameters and scales.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``
        - Output: ``(N, out_channels, H', W')`` or ``(out_channels, H', W')``

    Raises:
        OptionError: An option has a value that is not allowed.

    References:
        Rastegari et al. 2016, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks";
        Courbariaux et al. 2015, "BinaryConnect: Training Deep Neural Networks with binary weights during propagations".
    """

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
        frozen: bool = False,
        binary_inputs: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self._set_up(bias, frozen, binary_inputs, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the signs: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        return self.convolve(self._seen(input, (-3, -2, -1)), self.dense_weight(), self.bias)


@register_layer
class BinaryLinear(CompressedLinear, BinaryLayer):
    r"""``nn.Linear`` whose weights are signs with a scale per output: y = alpha sign(latent) x + b.

    Scales, states and training are those of :class:`BinaryConv2d`.

    Args:
        in_features: Size of each input sample.
        out_features: Size of each output sample.
        bias: Whether to add a learnable bias; it stays in floating point.
        frozen: Whether the weight is stored as bits; else it is a float parameter.
        binary_inputs: Whether the input is replaced by its signs, times the mean of its absolute values. Behind a ReLU
            all signs are alike: normalise in front.
        device: Device of the tensors.
        dtype: Dtype of parameters and scales.

    Shape:
        - Input: ``(*, in_features)``
        - Output: ``(*, out_features)``

    Raises:
        OptionError: An option has a value that is not allowed.

    References:
        Rastegari et al. 2016, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks";
        Courbariaux et al. 2015, "BinaryConnect: Training Deep Neural Networks with binary weights during propagations".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        frozen: bool = False,
        binary_inputs: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self._set_up(bias, frozen, binary_inputs, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the signs: ``(*, in_features)`` to ``(*, out_features)``."""
        return F.linear(self._seen(input, (-1,)), self.dense_weight(), self.bias)
