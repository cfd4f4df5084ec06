"""Layers whose weights are bfloat16: half the bytes, and twice the speed where the CPU multiplies them."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.cost import Cost
from lowrank_nn.layers._base import register_layer
from lowrank_nn.layers._leaf import LeafLayer
from lowrank_nn.layers._packed import Derived, is_channels_last, may_use_kernel, own_tensors, takes
from lowrank_nn.layers._shapes import CompressedConv2d, CompressedLinear, PaddingMode, Size, draw_bias_
from lowrank_nn.layers._shared import ComputedBuffers
from lowrank_nn.layers._source import read_layer
from lowrank_nn.layers._window import explicit_padding, pad_and_crop


class BFloat16Layer(ComputedBuffers, LeafLayer):
    """Base of the layers with a weight in bfloat16: float32 with 8 significant bits.

    Attributes:
        kernel: The weight, a buffer; casts of the model leave it in bfloat16.
    """

    kernel: Tensor
    _dtype_holder: Tensor

    def _set_up(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        holder = torch.empty(0, device=device, dtype=dtype)
        # Without a bias nothing else says which dtype the layer acts in.
        self.register_buffer("_dtype_holder", holder, persistent=False)
        self.register_buffer("kernel", torch.zeros(self.weight_shape, device=device, dtype=torch.bfloat16))
        bias_tensor = nn.Parameter(holder.new_zeros(self.weight_shape[0])) if bias else None
        self.register_parameter("bias", bias_tensor)
        self.reset_parameters()

    @classmethod
    def from_pretrained_layer(cls, layer: nn.Module) -> Self:
        """Build the layer from ``layer``, each weight rounded to the nearest bfloat16.

        Args:
            layer: A trained dense layer of the class replaced; not changed.

        Raises:
            UnsupportedLayerError: The layer cannot be carried over whole.
        """
        source = read_layer(layer, cls)
        new = source.empty(cls)
        new.approximate_(source.weight)
        return source.finish(new)

    @classmethod
    def usual_options(cls, layer: nn.Module) -> dict[str, Any]:
        """None: there is nothing to choose."""
        return {}

    @classmethod
    def lossless_options(cls, layer: nn.Module) -> dict[str, Any] | None:
        """None: the weight is always rounded."""
        return None

    @torch.no_grad()
    def approximate_(self, weight: Tensor) -> None:
        """Set each entry to the bfloat16 nearest to ``weight``."""
        self.kernel.copy_(weight)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight as torch draws dense ones, from +-1 / sqrt(fan_in), and the bias."""
        bound = self.fan_in**-0.5
        self.approximate_(torch.empty_like(self.kernel, dtype=torch.float32).uniform_(-bound, bound))
        draw_bias_(self.bias, self.fan_in)

    def dense_weight(self) -> Tensor:
        """Return the weight in the dtype of the layer."""
        return self.kernel.to(self._dtype_holder.dtype)

    def stored_cost(self) -> Cost:
        """Return params, bytes and nonzeros of the weight, and its MACs at one position; two bytes a weight."""
        stored = self.kernel.numel()
        return Cost(params=stored, macs=stored, bytes=2 * stored, nonzeros=stored)

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer: in bfloat16 where kernels do, else in the dtype of the input with rounded weights."""
        # Under no_grad only, because the results differ from those with gradients: the kernels round the input too.
        if not may_use_kernel(self, input) or torch.is_grad_enabled() or not takes(self, input.shape):
            return self.simulate(input)
        run = KERNELS.of(self)
        return self.simulate(input) if run is None else run(input)

    @abc.abstractmethod
    def simulate(self, x: Tensor) -> Tensor:
        """Compute the layer in the dtype of ``x``, which is not rounded; differentiable, anywhere."""

    @abc.abstractmethod
    def make_kernel(self) -> Callable[[Tensor], Tensor]:
        """Return a function of float32 inputs on bfloat16 kernels, with the weight packed."""

    def train(self, mode: bool = True) -> Self:
        """Set train or eval mode; training may change the bias through its ``.data``, which nothing shows."""
        if mode:
            KERNELS.forget(self)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        KERNELS.forget(self)  # the tensors are about to be moved or cast
        kernel = self.kernel
        super()._apply(fn, recurse)
        if self.kernel.dtype is not torch.bfloat16:
            self.kernel = kernel.to(self.kernel.device)
        return self


@register_layer
class BFloat16Conv2d(CompressedConv2d, BFloat16Layer):
    """``nn.Conv2d`` with a weight in bfloat16.

    In eval mode, under ``torch.no_grad()`` or ``inference_mode()``, and on float32 inputs on a CPU that multiplies
    bfloat16 (AVX-512 BF16 or AMX), the input is rounded too and the convolution runs in bfloat16, sums in float32; it
    returns float32. Elsewhere it computes in the dtype of its input. The weight does not train; the bias does. The
    kernels are fastest on models in ``torch.channels_last``: others pay for the change of order in every layer.

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
        device: Device of the tensors.
        dtype: Dtype of the bias, and in which the layer acts.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``
        - Output: ``(N, out_channels, H', W')`` or ``(out_channels, H', W')``

    Raises:
        OptionError: ``groups`` does not divide the channels.

    References:
        Kalamkar et al. 2019, "A Study of BFLOAT16 for Deep Learning Training".
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self._set_up(bias, device, dtype)

    def simulate(self, x: Tensor) -> Tensor:
        """Convolve in the dtype of ``x``: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        return self.convolve(x, self.dense_weight(), self.bias)

    def make_kernel(self) -> Callable[[Tensor], Tensor]:
        """Return the convolution of float32 maps on bfloat16 kernels."""
        pads = explicit_padding(self.kernel_size, self.padding, self.dilation)
        inside = self.padding_mode == "zeros" and pads[0] == pads[1] and pads[2] == pads[3]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padding = [pads[2], pads[0]] if inside else [0, 0]
        taps: tuple[Any, ...] = (padding, list(self.stride), list(self.dilation), self.groups)
        weight, bias = self.kernel, _rounded(self.bias)
        packed: list[Tensor] = []
        last = is_channels_last(weight)

        def run(x: Tensor) -> Tensor:
            if x.dim() == 3:
                return run(x.unsqueeze(0)).squeeze(0)
            # Casting and reordering in one go would take twice as long.
            small = x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
            small = small if inside else pad_and_crop(small, pads, mode)
            if not packed:
                reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
                packed.append(reorder(weight.to_mkldnn(), *taps, list(small.shape)))
            y = torch.ops.mkldnn._convolution_pointwise(small, packed[0], bias, *taps, "none", [], "")
            order = torch.channels_last if last or is_channels_last(x) else torch.contiguous_format
            return cast(Tensor, y.to(torch.float32, memory_format=order))

        return run


@register_layer
class BFloat16Linear(CompressedLinear, BFloat16Layer):
    """``nn.Linear`` with a weight in bfloat16.

    Where it computes in what is said of :class:`BFloat16Conv2d`.

    Args:
        in_features: Size of each input sample.
        out_features: Size of each output sample.
        bias: Whether to add a learnable bias.
        device: Device of the tensors.
        dtype: Dtype of the bias, and in which the layer acts.

    Shape:
        - Input: ``(*, in_features)``
        - Output: ``(*, out_features)``

    Raises:
        UnsupportedLayerError: From the factory, where the layer cannot be carried over whole.

    References:
        Kalamkar et al. 2019, "A Study of BFLOAT16 for Deep Learning Training".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self._set_up(bias, device, dtype)

    def simulate(self, x: Tensor) -> Tensor:
        """Apply the weight in the dtype of ``x``: ``(*, in_features)`` to ``(*, out_features)``."""
        return F.linear(x, self.dense_weight(), self.bias)

    def make_kernel(self) -> Callable[[Tensor], Tensor]:
        """Return the product with float32 rows on bfloat16 kernels."""
        # Not self: what is kept beside a layer must not keep it.
        weight, bias, (out, inn) = self.kernel, _rounded(self.bias), self.weight_shape
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

        def run(x: Tensor) -> Tensor:
            rows = x.to(torch.bfloat16).reshape(-1, inn)
            y = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
            return cast(Tensor, y.to(torch.float32).reshape(*x.shape[:-1], out))

        return run


def bfloat16_obstacle(layer: BFloat16Layer) -> str:
    """Return why the layer cannot run on bfloat16 kernels whatever its input is; empty if it can."""
    tensors = own_tensors(layer)
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "bfloat16 kernels are for the CPU"
    if layer._dtype_holder.dtype is not torch.float32:
        return "bfloat16 kernels are for layers in float32"
    if any(tensor.is_inference() for tensor in tensors):
        return "tensors made in inference mode do not show their changes"
    return "" if _has_kernels() else "this machine does not multiply bfloat16"


@functools.cache
def _has_kernels() -> bool:
    """Whether the CPU multiplies bfloat16, and torch has the kernels."""
    try:
        if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
            return False
        with torch.inference_mode(False), torch.no_grad():
            options: dict[str, Any] = {"bias": False, "device": "cpu", "dtype": torch.float32}
            convolution = BFloat16Conv2d.empty(in_channels=4, out_channels=4, kernel_size=3, **options)
            return all(map(_is_right, (convolution, BFloat16Linear.empty(in_features=4, out_features=4, **options))))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def _is_right(layer: BFloat16Layer) -> bool:
    layer.approximate_(torch.ones(layer.weight_shape, dtype=torch.float32, device="cpu"))
    x = torch.ones(1, 4, 4, 4, dtype=torch.float32, device="cpu")
    return torch.equal(layer.make_kernel()(x), layer.simulate(x))


def _rounded(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.bfloat16)


def _make_kernel(layer: BFloat16Layer) -> Callable[[Tensor], Tensor] | None:
    return None if bfloat16_obstacle(layer) else layer.make_kernel()


KERNELS: Derived[Callable[[Tensor], Tensor] | None] = Derived(_make_kernel)
"""The kernels of layers, None where there is an obstacle."""
