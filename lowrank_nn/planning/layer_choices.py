"""What a planner chose for one layer, and out of what."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from lowrank_nn.decompose import singular_values
from lowrank_nn.errors import LowRankError
from lowrank_nn.layers import LowRankLayer, read_layer
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

    def spectra(self, layer: nn.Module) -> list[tuple[Floats, int]]:
        """Return, for each mode of the chosen rank, the singular values that it cuts off and the rank.

        Of several groups the root of the mean square is taken.

        Args:
            layer: The dense layer, with its weights.

        Returns:
            Nothing where the layer stays dense, or its rank is not that of a matrix (CP).
        """
        if self.layer_class is None:
            return []
        variant = {name: value for name, value in self.options.items() if name in _variants(self.layer_class)}
        try:
            problem = self.layer_class.rank_problem(read_layer(layer, self.layer_class), **variant)
            unfoldings = problem.unfoldings()
        except LowRankError:
            return []
        rank = self.options["rank"]
        modes = rank if isinstance(rank, (tuple, list)) else (rank,)
        found = []
        for matrices, mode, limit in zip(unfoldings, modes, problem.limits, strict=True):
            values = torch.stack([singular_values(matrix) for matrix in matrices]).square().mean(0).sqrt()
            found.append((values.cpu().numpy(), limit if mode is None else mode))
        return found


def _variants(cls: type[LowRankLayer]) -> set[str]:
    return {name for options in cls.formats for name in options}
