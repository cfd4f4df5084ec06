"""The input patches that a layer's weight is multiplied with, at positions drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_nn.cost import conv_output_size
from lowrank_nn.layers._shapes import pair
from lowrank_nn.layers._window import explicit_padding

CHUNK = 1 << 22  # entries of patches gathered at a time: bounds the memory


class Patches(NamedTuple):
    """Patches of some images of one call, and the outputs at the same positions; float32 or float64.

    Attributes:
        inputs: Shape (groups, n, p), the features in the order (kernel row, kernel column, channel).
        outputs: Shape (groups, n, o); None where they are not wanted.
        weight: Positions of the map that each drawn one stands for.
    """

    inputs: Tensor
    outputs: Tensor | None
    weight: float


class PatchSampler:
    """Draws patches of one layer, the same number from every image of a call.

    All positions of a map are taken up to 64; beyond that an eighth, but at least 64 and at most 128: one from each of
    so many stretches of equal length, so that every position is drawn with the same probability. Only these patches
    are gathered, and of a few images at a time.

    Args:
        layer: Convolution or linear layer; the positions of the latter are those of its input's middle dims.
        seed: Seed of the positions, which are drawn on the CPU.

    Attributes:
        groups: Groups of the layer.
        features: Length of a patch, p = channels / groups * kh * kw.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, seed: int) -> None:
        if isinstance(layer, nn.Conv2d):
            self.groups, channels, self._kernel = layer.groups, layer.in_channels, layer.kernel_size
        else:
            self.groups, channels, self._kernel = 1, layer.in_features, (1, 1)
        self.features = channels // self.groups * self._kernel[0] * self._kernel[1]
        self._layer = layer
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, x: Tensor, output: Tensor | None = None) -> Iterator[Patches]:
        """Yield patches of one call.

        Args:
            x: What the layer was called with, not empty.
            output: What it returned, where the outputs are wanted too.
        """
        maps, results = self._maps(x), None if output is None else self._maps(output)
        height, width = self._output_size(maps)
        positions = self._positions(len(maps), height * width).to(x.device)
        rows, columns = (positions // width)[..., None], (positions % width)[..., None]
        step = max(1, CHUNK // max(positions.shape[1] * self.features * self.groups, maps[0].numel()))
        for start in range(0, len(maps), step):
            part = slice(start, start + step)
            inputs = self._grouped(self._receptive(maps[part], rows[part], columns[part]))
            outputs = None if results is None else self._grouped(_select(results[part], rows[part], columns[part]))
            yield Patches(inputs, outputs, height * width / positions.shape[1])

    def in_weight_order(self, values: Tensor) -> Tensor:
        """Return (groups, p) or (groups, p, p) with the features in the order of the weight: channel, row, column."""
        taps = self._kernel[0] * self._kernel[1]
        order = torch.arange(self.features, device=values.device).reshape(taps, -1).T.flatten()
        return values[:, order] if values.dim() == 2 else values[:, order[:, None], order]

    def _maps(self, x: Tensor) -> Tensor:
        """Return an input or output of the layer as (N, channels, height, width)."""
        if isinstance(self._layer, nn.Conv2d):
            return x if x.dim() == 4 else x[None]
        images = 1 if x.dim() == 1 else len(x)
        return x.reshape(images, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)

    def _output_size(self, maps: Tensor) -> tuple[int, int]:
        height, width = maps.shape[2:]
        if isinstance(self._layer, nn.Linear):
            return height, width
        layer = self._layer
        size = conv_output_size((height, width), layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        return size[0], size[1]

    def _positions(self, images: int, size: int) -> Tensor:
        """Draw positions, in raster order: (images, k)."""
        count = min(size, max(64, min(size // 8, 128)))
        if count == size:
            return torch.arange(size, device="cpu").expand(images, size)
        # One number after another from the generator: the same for every split of the images into batches.
        shift = torch.rand(images, count, generator=self._generator, dtype=torch.float64, device="cpu")
        return ((torch.arange(count, device="cpu") + shift) * (size / count)).long().clamp(max=size - 1)

    def _receptive(self, maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the inputs that outputs at positions (n, k, 1) are computed from: (n * k, taps, channels)."""
        if isinstance(self._layer, nn.Linear):
            return _select(maps, rows, columns)
        layer = self._layer
        padding = layer.padding if isinstance(layer.padding, str) else pair(layer.padding)
        pads = explicit_padding(pair(layer.kernel_size), padding, pair(layer.dilation))
        padded = F.pad(maps, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        taps = torch.arange(self._kernel[0] * self._kernel[1], device=maps.device)
        rows = rows * layer.stride[0] + taps // self._kernel[1] * layer.dilation[0]
        columns = columns * layer.stride[1] + taps % self._kernel[1] * layer.dilation[1]
        return _select(padded, rows, columns)

    def _grouped(self, values: Tensor) -> Tensor:
        """Return (n, taps, channels) as (groups, n, taps * channels / groups), wide enough for products."""
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return wide.reshape(*values.shape[:2], self.groups, -1).permute(2, 0, 1, 3).flatten(2)


def _select(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the entries of maps (n, c, h, w) at positions (n, k, taps), as (n * k, taps, c)."""
    images, channels, height, width = maps.shape
    image = torch.arange(images, device=maps.device)[:, None, None]
    index = (image * height + rows) * width + columns
    # Channels last: what is gathered are whole rows of memory.
    flat = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    return flat.index_select(0, index.flatten()).reshape(-1, index.shape[2], channels)
