"""What the quantized layers share: the two states of their weight, calibration, and the integer reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.cost import Cost
from lowrank_nn.decompose import Metric
from lowrank_nn.errors import OptionError, check_whole_number
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
from lowrank_nn.layers._masks import random_mask
from lowrank_nn.layers._pruned import PrunedLayer, sparsity_options
from lowrank_nn.layers._qdq import dequantize_bias, dequantize_weight, exports_pairs
from lowrank_nn.layers._quant_input import check_calibration
from lowrank_nn.layers._rounding import round_on_data
from lowrank_nn.layers._shapes import draw_bias_
from lowrank_nn.layers._source import read_layer
from lowrank_nn.layers._window import Window, crop_window

Scheme = Literal["symmetric", "affine"]

BUFFERS = ("weight_int", "weight_scale", "weight_zero_point", "mask", "input_scale", "input_zero_point")
UNCALIBRATED = (-4.0, 4.0)  # four standard deviations of a normalised input
LARGEST_BIAS = 2.0**30  # in steps of the sums, which are added to it in 32 bits


class QuantLayer(IntegerLayer):
    """Base of the layers whose weight, and input where asked for, lies on a grid of integers.

    The weight is in one of two states. Frozen, it is int8 integers and their scale; nothing of it trains. Not frozen,
    it is a float parameter that is rounded to the grid in every forward, in train and eval mode alike, with
    straight-through gradients (quantization-aware training); its scale follows it from step to step.

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

    main_options = ("bits", "activation_bits")

    latent: nn.Parameter | None
    weight_int: Tensor | None
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    mask: Tensor | None
    window: Window | None = None

    def _set_up(
        self,
        shape: tuple[int, ...],
        bias: bool,
        bits: int,
        scheme: Scheme,
        activation_bits: int | None,
        frozen: bool,
        nonzeros: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Check the options and create the tensors; ``shape`` is that of the stored kernel."""
        self.bits = self._check_bits("bits", bits)
        self.activation_bits = None if activation_bits is None else self._check_bits("activation_bits", activation_bits)
        if scheme not in ("symmetric", "affine"):
            raise OptionError(f"{type(self).__name__}: scheme must be 'symmetric' or 'affine', got {scheme!r}.")
        self.scheme, self.frozen, self.nonzeros = scheme, False, nonzeros
        kernel = torch.zeros(shape, device=device, dtype=dtype)
        # Both names are registered in either state, so that the order of the parameters is the same.
        self.latent = nn.Parameter(kernel)
        self.register_parameter("bias", nn.Parameter(kernel.new_zeros(shape[0])) if bias else None)
        for name in BUFFERS:
            setattr(self, name, None)
        if nonzeros is not None:
            self._set_buffers(mask=random_mask(type(self).__name__, shape, nonzeros, kernel.device))
        if self.activation_bits is not None:
            zero_point = torch.zeros((), dtype=torch.int32, device=kernel.device)
            self._set_buffers(input_scale=kernel.new_ones(()), input_zero_point=zero_point)
            self.set_input_range(*UNCALIBRATED)
        if frozen:
            self.freeze()
        self.reset_parameters()

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

    def _check_bits(self, name: str, value: int) -> int:
        return check_whole_number(f"{type(self).__name__}: {name}", value, 2, 8)

    @classmethod
    def from_pretrained_layer(
        cls,
        layer: nn.Module,
        *,
        bits: int = 8,
        scheme: Scheme = "symmetric",
        activation_bits: int | None = None,
        inputs: Tensor | Iterable[Tensor] | None = None,
        observer: str = "minmax",
        input_range: tuple[float, float] | None = None,
        output_range: tuple[float, float] | None = None,
        metric: Metric | None = None,
        frozen: bool = True,
    ) -> Self:
        """Build the layer from ``layer``, each weight rounded to the nearest number on the grid.

        With a ``metric`` weights are rounded, and scales chosen, so that the output changes little on data, and the
        bias takes up the change of the mean output; where there is no bias, that change counts as error. On a pruned
        layer zeros stay exactly zero, and a kernel stored as a window stays the smaller one.

        Args:
            layer: A trained dense layer of the class replaced, or the pruned layer of that kind; not changed.
            bits: Bits per weight, 2 to 8.
            scheme: ``"symmetric"``, a scale per output channel, or ``"affine"``, one scale and zero point in all.
            activation_bits: Bits per entry of the input, 2 to 8; None leaves the input in floating point.
            inputs: What the layer is called with on typical data, a tensor or an iterable of tensors, to choose the
                range of the quantized input from.
            observer: How it is chosen from them: ``"minmax"``, ``"percentile"``, ``"mse"`` or ``"entropy"``.
            input_range: (min, max) in place of ``inputs``, where it was measured already.
            output_range: (min, max) of the output on typical data, for exported graphs.
            metric: What is to be small of the weight's change, from :func:`lowrank_nn.planning.collect_metrics`; None
                rounds to the nearest.
            frozen: True: integers, to be used. False: floats on the grid, to be trained; call ``freeze()`` after.

        Raises:
            UnsupportedLayerError: The layer cannot be carried over whole.
            OptionError: An option has a value that is not allowed, or has no effect beside the others.
            CalibrationError: ``activation_bits`` without range, or a range or inputs that cannot be used.

        References:
            Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization"; Frantar et al. 2022,
            "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (rounding on data).
            Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (bias).
        """
        check_calibration(cls.__name__, activation_bits, inputs, input_range)
        source = read_layer(layer, cls)
        options: dict[str, Any] = {"bits": bits, "scheme": scheme, "activation_bits": activation_bits}
        options["output_range"] = output_range
        new = source.empty(cls, **options, frozen=frozen, **sparsity_options(layer))
        if new.mask is not None:
            assert isinstance(layer, PrunedLayer)
            new.mask.copy_(layer.mask)
        if input_range is not None:
            new.set_input_range(*input_range)
        if inputs is not None:
            new.calibrate(inputs, observer=observer)
        source.copy_bias_to(new)  # scales depend on it
        new.approximate_(source.weight, metric if metric is None or source.bias is not None else metric.with_mean())
        return source.finish(new, metric)

    @classmethod
    def usual_options(cls, layer: nn.Module) -> dict[str, Any]:
        """Weights in 8 bits."""
        return {"bits": 8}

    @classmethod
    def lossless_options(cls, layer: nn.Module) -> dict[str, Any] | None:
        """None: the weight is always rounded."""
        return None

    @torch.no_grad()
    def approximate_(self, weight: Tensor, metric: Metric | None = None) -> None:
        """Set each entry to the grid's number nearest to ``weight``, the dense weight; masked entries to zero.

        Args:
            weight: Of shape ``weight_shape``.
            metric: What is to be small of the change, where that is not each entry's own:
                :func:`lowrank_nn.layers._rounding.round_on_data`.
        """
        if metric is None or weight.is_meta:
            self._store_(crop_window(weight, self.window))
            return
        rounded = round_on_data(weight, metric, self._weight_grid, self._grid_of, self._kept(weight.device))
        if not self.frozen:
            self._store_(crop_window(rounded.weight(), self.window))
        else:
            codes = (crop_window(rounded.steps, self.window) + rounded.zero_point).to(torch.int8)
            self._fill_(self._masked(codes), rounded.scale, rounded.zero_point)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight as torch draws dense ones, from +-1 / sqrt(fan_in), and the bias; the mask stays."""
        bound = 1 / math.sqrt(self.fan_in)
        like = cast(Tensor, self.weight_int if self.frozen else self.latent)
        scale = cast(Tensor, self.weight_scale if self.frozen else self.latent)
        self._store_(torch.empty_like(like, dtype=scale.dtype).uniform_(-bound, bound))
        draw_bias_(self.bias, self.fan_in)

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

    def _kept(self, device: torch.device) -> Tensor | None:
        """Return which entries of the dense weight may be other than zero, a bool tensor; None where all may."""
        if self.window is None:
            return self.mask
        kept = torch.zeros(self.weight_shape, dtype=torch.bool, device=device)
        crop_window(kept, self.window).copy_(torch.tensor(True) if self.mask is None else self.mask)
        return kept

    def _masked(self, kernel: Tensor) -> Tensor:
        return kernel if self.mask is None else torch.where(self.mask, kernel, 0)

    def _per_channel(self, scale: Tensor) -> Tensor:
        """Return ``scale`` in a shape that broadcasts to the stored kernel."""
        return scale.reshape(-1, *(1,) * (len(self.weight_shape) - 1))
