"""How the quantized layers come about: their options, and weights rounded to the nearest number or on data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.decompose import Metric
from lowrank_nn.errors import OptionError, check_whole_number
from lowrank_nn.layers._masks import draw_mask_, empty_mask
from lowrank_nn.layers._observers import ObserverName
from lowrank_nn.layers._pruned import PrunedLayer, sparsity_options
from lowrank_nn.layers._quant_input import check_calibration
from lowrank_nn.layers._quant_weight import BUFFERS, QuantizedWeightLayer, Scheme
from lowrank_nn.layers._rounding import round_on_data
from lowrank_nn.layers._shapes import draw_bias_
from lowrank_nn.layers._source import read_layer
from lowrank_nn.layers._window import crop_window

UNCALIBRATED = (-4.0, 4.0)  # four standard deviations of a normalised input


class QuantLayer(QuantizedWeightLayer):
    """Base of the layers whose weight, and input where asked for, lies on a grid of integers."""

    main_options = ("bits", "activation_bits")

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
            self._set_buffers(mask=empty_mask(type(self).__name__, shape, nonzeros, kernel.device))
        if self.activation_bits is not None:
            zero_point = torch.zeros((), dtype=torch.int32, device=kernel.device)
            self._set_buffers(input_scale=kernel.new_ones(()), input_zero_point=zero_point)
        if frozen:
            self.freeze()
        self.reset_parameters()

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
        observer: ObserverName = "minmax",
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
        new.approximate_(source.weight, source.seen_by(metric))
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
        """Draw the weight as torch draws dense ones, from +-1 / sqrt(fan_in), and the bias; the mask stays.

        The range of a quantized input is the one before calibration, [-4, 4].
        """
        if self.mask is not None and self.nonzeros is not None:
            draw_mask_(self.mask, self.nonzeros)
        if self.activation_bits is not None:
            self.set_input_range(*UNCALIBRATED)
        bound = 1 / math.sqrt(self.fan_in)
        like = cast(Tensor, self.weight_int if self.frozen else self.latent)
        scale = cast(Tensor, self.weight_scale if self.frozen else self.latent)
        weight = torch.empty_like(like, dtype=scale.dtype).uniform_(-bound, bound)
        draw_bias_(self.bias, self.fan_in)
        self._store_(weight)  # scales depend on the bias

    def _kept(self, device: torch.device) -> Tensor | None:
        """Return which entries of the dense weight may be other than zero, a bool tensor; None where all may."""
        if self.window is None:
            return self.mask
        kept = torch.zeros(self.weight_shape, dtype=torch.bool, device=device)
        crop_window(kept, self.window).copy_(torch.tensor(True, device="cpu") if self.mask is None else self.mask)
        return kept
