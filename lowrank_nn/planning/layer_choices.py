"""What a planner chose for one layer, and out of what."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_nn.decompose import singular_values
from lowrank_nn.errors import RankError, UnsupportedLayerError
from lowrank_nn.layers import LowRankLayer, SVDLinear, TuckerConv2d, read_layer
from lowrank_nn.planning.candidates import Candidate
from lowrank_nn.planning.choices import Floats


@dataclasses.dataclass(frozen=True)
class LayerChoices:
    """The candidates of one layer and the one that was chosen.

    Attributes:
        path: The layer's dotted path.
        layer_class: The class that was chosen; None where the layer stays dense.
        options: Its options, the rank among them.
        candidates: What there was to choose from, the dense layer first; empty where a rank rule or the user chose.
    """

    path: str
    layer_class: type[LowRankLayer] | None
    options: dict[str, Any]
    candidates: tuple[Candidate, ...] = ()

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that was chosen; None where there were none."""
        same = (c for c in self.candidates if (c.layer_class, c.options) == (self.layer_class, self.options))
        return next(same, None)

    def spectra(self, layer: nn.Module) -> list[Spectrum]:
        """Return the singular values of the matrices whose rank was chosen.

        Where none was (CP, or the layer stays dense), those of the kernel's output and input mode.

        Args:
            layer: The dense layer, with its weights.

        Returns:
            One for each mode; none for a layer that no low-rank format can read.
        """
        try:
            return self._of_the_rank(layer) or _of_the_modes(layer)
        except UnsupportedLayerError:
            return []

    def _of_the_rank(self, layer: nn.Module) -> list[Spectrum]:
        if self.layer_class is None:
            return []
        known = {name for options in self.layer_class.formats for name in options}
        variant = {name: value for name, value in self.options.items() if name in known}
        problem = self.layer_class.rank_problem(read_layer(layer, self.layer_class), **variant)
        rank = self.options["rank"]
        modes = rank if isinstance(rank, (tuple, list)) else (rank,)
        try:
            matrices = problem.unfoldings()
        except RankError:
            return []
        ranks = (limit if mode is None else mode for mode, limit in zip(modes, problem.limits, strict=True))
        return [Spectrum(_values(matrix), rank) for matrix, rank in zip(matrices, ranks, strict=True)]


class Spectrum(NamedTuple):
    """Singular values, over groups the root of their mean square, and the rank that cuts them off, if there is one."""

    values: Floats
    rank: int | None


def _of_the_modes(layer: nn.Module) -> list[Spectrum]:
    cls = next((cls for cls in (TuckerConv2d, SVDLinear) if isinstance(layer, cls.replaces)), None)
    if cls is None:
        return []
    return [Spectrum(_values(matrices), None) for matrices in cls.rank_problem(read_layer(layer, cls)).unfoldings()]


def _values(matrices: Tensor) -> Floats:
    every = torch.stack([singular_values(matrix) for matrix in matrices])
    values: Floats = every.square().mean(0).sqrt().cpu().numpy()
    return values
