"""Layers with weights held at zero by a fixed mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lowrank_nn.errors import OptionError
from lowrank_nn.layers._base import register_layer
from lowrank_nn.layers._masks import (
    WINDOWED,
    Criterion,
    Granularity,
    Units,
    best_window,
    bounding_window,
    check_sparsity,
    fill_window,
    keep_largest,
)
from lowrank_nn.layers._pruned import PrunedLayer, open_scores
from lowrank_nn.layers._shapes import CompressedConv2d, CompressedLinear, PaddingMode, Size
from lowrank_nn.layers._source import read_layer
from lowrank_nn.layers._window import Window, check_window, crop_window, embed_window


@register_layer
class PrunedConv2d(CompressedConv2d, PrunedLayer):
    r"""``nn.Conv2d`` with units of its weight held at zero: W = kernel * mask.

    Units of the weight ``(O, I / groups, kh, kw)``, by ``granularity``:

    - ``"element"``: one scalar.
    - ``"row"`` and ``"column"``: the vector granularity; one row or one column of one filter's 2-D slice.
    - ``"kernel"``: one 2-D slice [o, i].
    - ``"group"``: one position (i, h, w) of all filters (of one block of a grouped convolution): a column of the
      matrix that the convolution is lowered to.
    - ``"shape"``: one position (h, w) of all filters and channels, which leaves kernels of another shape.
    - ``"channel"``: one input channel of all filters that read it.
    - ``"filter"``: one filter; its output is its bias.

    With ``window`` only a rectangle of the kernel is stored, and the layer runs as a convolution that much smaller,
    equal to the dense one with zeros around the rectangle, for every stride, padding, dilation and padding mode.

    Built by its constructor the layer keeps units drawn at random, for training from scratch.

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
        sparsity: Share of the dense weight's units that are pruned, from 0 to below 1; rounded to whole units, of
            which at least one stays.
        granularity: What a unit is.
        window: (top, left, height, width) of the stored rectangle; for granularities ``"shape"`` and ``"element"``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``
        - Output: ``(N, out_channels, H', W')`` or ``(out_channels, H', W')``

    Raises:
        OptionError: An option has a value that is not allowed.

    References:
        Mao et al. 2017, "Exploring the Regularity of Sparse Structure in Convolutional Neural Networks"; Lebedev and
        Lempitsky 2016, "Fast ConvNets Using Group-wise Brain Damage"; Wen et al. 2016, "Learning Structured Sparsity
        in Deep Neural Networks"; Anwar et al. 2017, "Structured Pruning of Deep Convolutional Neural Networks".
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
        sparsity: float,
        granularity: Granularity = "element",
        window: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        name = type(self).__name__
        self.sparsity = check_sparsity(name, sparsity)
        self.granularity = granularity
        self.window = check_window(name, window, self.kernel_size)
        units = Units.of(name, granularity, self.weight_shape, groups)
        if self.window is not None and granularity not in WINDOWED:
            raise OptionError(
                f"{name}: a window goes with granularity 'shape' or 'element', got {granularity!r}. Pass window=None."
            )
        size = self.kernel_size if self.window is None else self.window[2:]
        self.set_up(units, (*self.weight_shape[:2], *size), bias, device=device, dtype=dtype)

    @classmethod
    def from_pretrained_layer(
        cls,
        layer: nn.Module,
        *,
        sparsity: float,
        granularity: Granularity | Literal["window"] = "element",
        criterion: Criterion = "l1",
        fisher: Tensor | None = None,
        seed: int = 0,
    ) -> Self:
        r"""Build the layer from ``layer`` with the units of the smallest score pruned.

        Of units with equal scores the last ones go. Scores: ``"l1"``, the sum of \|w\| of a unit; ``"l2"``, its norm;
        ``"obd"``, 1/2 sum F w^2 (LeCun et al. 1990, "Optimal Brain Damage", with the diagonal Fisher information F
        for the second derivative); ``"random"``.

        Args:
            layer: A trained ``nn.Conv2d``, or a ``PrunedConv2d`` to be pruned further; not changed. What is zero in
                the latter stays zero; it can go on with its own granularity or with ``"element"``.
            sparsity: Share of the dense weight's units that are pruned afterwards, in all.
            granularity: What a unit is. Beside those of the class there is ``"window"``: the best rectangle of
                kernel positions stays, of the area nearest to the share wanted (a 3 x 3 kernel at sparsity 1/3 becomes
                2 x 3 or 3 x 2); the new layer has the granularity ``"shape"``. With ``"shape"`` itself any positions
                may stay; the layer stores the smallest rectangle around them (not known on the meta device, where it
                stores the whole kernel).
            criterion: Which units matter least.
            fisher: F of each scalar of the dense weight, from :func:`lowrank_nn.planning.diagonal_fisher`, for
                ``"obd"``.
            seed: Seed of ``"random"``.

        Raises:
            UnsupportedLayerError: The layer cannot be carried over whole, or is pruned in units of another kind.
            OptionError: An option has a value that is not allowed.
            CalibrationError: ``fisher`` is missing, of another shape, negative or not finite.
        """
        source = read_layer(layer, cls)
        unit: Granularity = "shape" if granularity == "window" else granularity
        units = Units.of(cls.__name__, unit, tuple(source.weight.shape), source.arguments["groups"])
        total = cls.total_sparsity(layer, granularity, sparsity)
        scores = open_scores(cls.__name__, units, source, criterion, fisher, seed)
        size = units.blocks[3:]
        window: Window | None
        if granularity == "window":
            best = window = best_window(scores.reshape(size), total)
            total = 1 - best[2] * best[3] / math.prod(size)
            keep = fill_window(best, size, scores.device).reshape(units.grid)
        else:
            keep = keep_largest(scores, units.kept(total))
            window = bounding_window(keep.reshape(size)) if unit == "shape" else _window_of(layer)
        window = check_window(cls.__name__, window, size)
        new = source.empty(cls, sparsity=total, granularity=unit, window=window)
        mask = units.spread(keep, tuple(source.weight.shape))
        new.store_(crop_window(source.weight, window), crop_window(mask, window))
        return source.finish(new)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        return self.convolve(input, self.masked_kernel(), self.bias, self.window)

    def dense_weight(self) -> Tensor:
        """Return kernel * mask with the window's surroundings, ``(out_channels, in_channels / groups, kh, kw)``."""
        return self.embed(self.masked_kernel())

    def embed(self, kernel: Tensor) -> Tensor:
        """Return values of the stored kernel's entries in the dense weight's shape; zeros outside the window."""
        return embed_window(kernel, self.window, self.kernel_size)


def _window_of(layer: nn.Module) -> Window | None:
    return layer.window if isinstance(layer, PrunedLayer) else None


@register_layer
class PrunedLinear(CompressedLinear, PrunedLayer):
    r"""``nn.Linear`` with units of its weight held at zero: y = (kernel * mask) x + b.

    Units of the weight ``(out_features, in_features)``, by ``granularity``: ``"element"``, one scalar; ``"channel"``,
    the column of one input; ``"filter"``, the row of one output, which then is its bias.

    Built by its constructor the layer keeps units drawn at random, for training from scratch.

    Args:
        in_features: Size of each input sample.
        out_features: Size of each output sample.
        bias: Whether to add a learnable bias.
        sparsity: Share of the units that are pruned, from 0 to below 1; rounded to whole units, of which at least
            one stays.
        granularity: What a unit is.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(*, in_features)``
        - Output: ``(*, out_features)``

    Raises:
        OptionError: An option has a value that is not allowed.
        UnsupportedLayerError: A linear layer has no units of this granularity.

    References:
        Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float,
        granularity: Granularity = "element",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.sparsity = check_sparsity(type(self).__name__, sparsity)
        self.granularity = granularity
        units = Units.of(type(self).__name__, granularity, self.weight_shape)
        self.set_up(units, self.weight_shape, bias, device=device, dtype=dtype)

    @classmethod
    def from_pretrained_layer(
        cls,
        layer: nn.Module,
        *,
        sparsity: float,
        granularity: Granularity = "element",
        criterion: Criterion = "l1",
        fisher: Tensor | None = None,
        seed: int = 0,
    ) -> Self:
        r"""Build the layer from ``layer`` with the units of the smallest score pruned.

        Args:
            layer: A trained ``nn.Linear``, or a ``PrunedLinear`` to be pruned further; not changed.
            sparsity: Share of the units that are pruned afterwards, in all.
            granularity: What a unit is.
            criterion: Score of a unit, as in :meth:`PrunedConv2d.from_pretrained_layer`.
            fisher: Diagonal Fisher information of the dense weight, for ``"obd"``.
            seed: Seed of ``"random"``.

        Raises:
            UnsupportedLayerError: The layer cannot be carried over whole, is pruned in units of another kind, or has
                no units of this granularity.
            OptionError: An option has a value that is not allowed.
            CalibrationError: ``fisher`` is missing, of another shape, negative or not finite.
        """
        source = read_layer(layer, cls)
        units = Units.of(cls.__name__, granularity, tuple(source.weight.shape))
        total = cls.total_sparsity(layer, granularity, sparsity)
        scores = open_scores(cls.__name__, units, source, criterion, fisher, seed)
        new = source.empty(cls, sparsity=total, granularity=granularity)
        keep = keep_largest(scores, units.kept(total))
        new.store_(source.weight, units.spread(keep, tuple(source.weight.shape)))
        return source.finish(new)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the masked weight: ``(*, in_features)`` to ``(*, out_features)``."""
        return F.linear(input, self.masked_kernel(), self.bias)

    def dense_weight(self) -> Tensor:
        """Return kernel * mask, ``(out_features, in_features)``."""
        return self.masked_kernel()


PrunedConv2d.stacks_on = (PrunedConv2d,)
PrunedLinear.stacks_on = (PrunedLinear,)
