"""What the masked layers share: kernel and mask, their costs, and pruning that goes on from earlier pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.cost import Cost
from lowrank_nn.errors import OptionError, UnsupportedLayerError
from lowrank_nn.layers._base import Packing
from lowrank_nn.layers._leaf import LeafLayer
from lowrank_nn.layers._masks import (
    Criterion,
    Granularity,
    Units,
    check_sparsity,
    draw_mask_,
    keep_largest,
    unit_scores,
)
from lowrank_nn.layers._shapes import draw_bias_
from lowrank_nn.layers._source import Source
from lowrank_nn.layers._window import Window, crop_window, embed_window


class PrunedLayer(LeafLayer):
    """Base of the masked layers: the weight is ``kernel`` where ``mask`` is set, and zero elsewhere.

    The mask is applied in every forward, so that zeros never come back: not through momentum, weight decay, loading
    or casting; the gradient of a masked entry is exactly zero.

    Attributes:
        kernel: The stored weight, a parameter. What it holds outside the mask has no effect.
        mask: Bool buffer of the kernel's shape: which entries count.
        sparsity: Share of the units that are pruned, as asked for.
        granularity: What a unit is.
        window: Place of the kernel in the dense weight, or None where it is all of it.
    """

    main_options = ("sparsity", "granularity")

    kernel: nn.Parameter
    mask: Tensor
    sparsity: float
    granularity: Granularity
    window: Window | None = None

    def set_up(self, units: Units, stored_shape: tuple[int, ...], bias: bool, **factory: Any) -> None:
        """Create the tensors; ``units`` are those of the whole dense weight."""
        self._units = units
        stored = self._stored_units()
        kept = units.kept(self.sparsity)
        if kept > stored.count:
            raise OptionError(
                f"{type(self).__name__}: window={self.window} holds {stored.count} of the {units.count} units, fewer "
                f"than the {kept} that sparsity={self.sparsity} keeps. Pass a larger sparsity, or a larger window."
            )
        out = units.blocks[0] * units.blocks[1]
        self.kernel = nn.Parameter(torch.empty(stored_shape, **factory))
        self.bias = nn.Parameter(torch.empty(out, **factory)) if bias else None
        self.register_buffer("mask", torch.zeros(stored_shape, dtype=torch.bool, device=self.kernel.device))
        self.reset_parameters()

    def _stored_units(self) -> Units:
        """Return the units of the part of the weight that is stored."""
        if self.window is None:
            return self._units
        groups, filters, channels = self._units.blocks[:3]
        return Units(self.granularity, (groups, filters, channels, *self.window[2:]))

    @classmethod
    def usual_options(cls, layer: nn.Module) -> dict[str, Any]:
        """Half of the weights, by magnitude."""
        return {"sparsity": 0.5}

    @classmethod
    def lossless_options(cls, layer: nn.Module) -> dict[str, Any] | None:
        """No sparsity."""
        return {"sparsity": 0.0}

    @torch.no_grad()
    def approximate_(self, weight: Tensor) -> None:
        """Set kernel and mask to the nearest weight of this sparsity and window: the units of largest norm."""
        stored, part = self._stored_units(), crop_window(weight, self.window)
        scores = unit_scores(type(self).__name__, stored, part, "l2")
        keep = keep_largest(scores, self._units.kept(self.sparsity))
        self.store_(part, stored.spread(keep, tuple(part.shape)))

    @torch.no_grad()
    def store_(self, part: Tensor, mask: Tensor) -> None:
        """Set the mask, and the kernel to ``part`` under it; both of the kernel's shape."""
        self.mask.copy_(mask)
        self.kernel.copy_(torch.where(mask, part, 0))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the kept weights as torch draws dense ones, from +-1 / sqrt(fan_in); the mask stays as it is.

        The fan-in is the dense layer's: pruned at random to the density d, a layer's outputs have d times the
        variance of the dense layer's.
        """
        draw_mask_(self.mask, self._units.kept(self.sparsity), self._stored_units())
        bound = self.fan_in**-0.5
        self.kernel.uniform_(-bound, bound)
        self.kernel.copy_(self.masked_kernel())
        draw_bias_(self.bias, self.fan_in)

    def masked_kernel(self) -> Tensor:
        """Return the kernel with zeros where the mask is not set; differentiable."""
        # Selecting, unlike multiplying, keeps zeros and their gradients zero beside infinite values too.
        return torch.where(self.mask, self.kernel, 0)

    @property
    def nonzeros(self) -> int:
        """Scalars of the weight that the mask keeps, the bias not counted."""
        return self._units.kept(self.sparsity) * self._units.size

    @property
    def density(self) -> float:
        """Share of the dense weight's scalars that the mask keeps."""
        return self.nonzeros / math.prod(self._units.blocks)

    @property
    def pattern(self) -> str:
        """What is kept, to read: units, scalars, filters and channels still in use, scalars per kernel position."""
        units, total = self._units, math.prod(self._units.blocks)
        lines = [
            f"{units.granularity}: {units.kept(self.sparsity)} of {units.count} units kept, "
            f"{self.nonzeros} of {total} scalars"
        ]
        if self.mask.is_meta:
            return lines[0]
        mask = self.mask.reshape(self._stored_units().blocks)
        used, filters = int(mask.flatten(2).any(2).sum()), units.blocks[0] * units.blocks[1]
        inputs, channels = int(mask.any(4).any(3).any(1).sum()), units.blocks[0] * units.blocks[2]
        lines.append(f"filters in use: {used} of {filters}; channels in use: {inputs} of {channels}")
        counts = embed_window(mask.sum((0, 1, 2)), self.window, units.blocks[3:]).tolist()
        if len(counts) * len(counts[0]) > 1:
            width = len(str(max(map(max, counts))))
            lines += ["kept at each position:"]
            lines += [" ".join(f"{count:{width}d}" for count in row) for row in counts]
        return "\n".join(lines)

    def packing(self) -> Mapping[str, Packing]:
        """Store the mask as a bitmap, and of the kernel what the mask keeps."""
        return {"kernel": Packing(mask="mask")}

    def stored_cost(self) -> Cost:
        """Return params, bytes and nonzeros of the weight, and its MACs at one position of the output.

        A masked convolution needs all MACs of its stored kernel: zeros are multiplied like other numbers. Only a
        window makes it faster. ``bytes`` is what a file takes: ceil(n / 8) for the mask of n entries, and the kept
        scalars.
        """
        stored = self.kernel.numel()
        size = -(-stored // 8) + self.nonzeros * self.kernel.element_size()
        return Cost(params=stored, macs=stored, bytes=size, nonzeros=self.nonzeros)

    @classmethod
    def total_sparsity(cls, layer: nn.Module, granularity: str, sparsity: float) -> float:
        """Return the sparsity after going further on ``layer``; ``sparsity`` itself on a dense one."""
        sparsity = check_sparsity(cls.__name__, sparsity)
        if not isinstance(layer, PrunedLayer) or layer.density == 1:
            return sparsity
        before = layer.granularity
        if granularity not in ("element", before) and (granularity, before) != ("window", "shape"):
            raise UnsupportedLayerError(
                f"{cls.__name__}: the layer is pruned already with granularity {before!r}, on which only {before!r} or "
                f"'element' can follow, got {granularity!r}. Prune with {granularity!r} first."
            )
        reached = 1 - layer.density
        if sparsity < min(reached, layer.sparsity):
            raise OptionError(
                f"{cls.__name__}: sparsity is the total afterwards, and the layer has {reached:.4g} already, got "
                f"{sparsity:.4g}. Pass at least as much: pruned weights do not come back."
            )
        return max(sparsity, reached)


def sparsity_options(layer: nn.Module) -> dict[str, Any]:
    """Return the options (window, nonzeros) by which another leaf carries over what of ``layer`` is pruned."""
    if not isinstance(layer, PrunedLayer):
        return {}
    options: dict[str, Any] = {} if layer.window is None else {"window": layer.window}
    return options | {"nonzeros": layer.nonzeros if layer.nonzeros < layer.kernel.numel() else None}


def _alive(layer: nn.Module) -> Tensor | None:
    """Return which entries of the dense weight are not pruned yet; None for all."""
    if not isinstance(layer, PrunedLayer):
        return None
    return embed_window(layer.mask, layer.window, layer._units.blocks[3:])


def open_scores(
    name: str, units: Units, source: Source, criterion: Criterion, fisher: Tensor | None, seed: int
) -> Tensor:
    """Return the score of each unit, minus infinity for units that are pruned already."""
    scores = unit_scores(name, units, source.weight, criterion, fisher, seed)
    alive = _alive(source.layer)
    if alive is None:
        return scores
    return scores.masked_fill(units.sums(alive.to(scores.dtype)) == 0, -math.inf)
