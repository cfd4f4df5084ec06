"""The low-rank candidates of one layer: every registered format, at many ranks, with error and cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_nn.cost import Cost
from lowrank_nn.errors import LowRankError
from lowrank_nn.graph import Site
from lowrank_nn.layers import LowRankLayer, Positions, read_layer
from lowrank_nn.planning.allocation import Choices, Floats
from lowrank_nn.planning.budget import Budget

_LEAST_KEPT = 1e-6  # a weight that keeps less of its energy than this counts as lost


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to replace a layer; ``layer_class`` None is the dense layer itself.

    Attributes:
        layer_class: The compressed class.
        options: What its ``from_pretrained_layer`` is called with.
        error: Relative squared change of the weight, ||W - W'||^2 / ||W||^2.
        cost: Params, MACs and bytes of the weight (no bias).
    """

    layer_class: type[LowRankLayer] | None
    options: dict[str, Any]
    error: float
    cost: Cost


@dataclasses.dataclass(frozen=True)
class SiteCandidates:
    """The candidates of one site, the dense layer first, and the reason if there is no other.

    Attributes:
        path: The layer's dotted path.
        candidates: The dense layer, then all that save something.
        note: Why there are no others; empty if there are.
    """

    path: str
    candidates: list[Candidate]
    note: str = ""

    def choices(self, budget: Budget) -> Choices:
        """Return errors and costs as the allocation takes them.

        The error of a candidate that keeps a share 1 - e of the weight's energy is -log(1 - e): their sum is small
        where the product of the shares over all layers is large (Zhang et al. 2016), so that no layer is given up for
        the others.
        """
        kept: Floats = 1 - np.array([candidate.error for candidate in self.candidates])
        errors = -np.log(np.clip(kept, _LEAST_KEPT, 1.0))
        return Choices(errors, np.stack([budget.spent(candidate.cost) for candidate in self.candidates]))


def low_rank_candidates(site: Site, layer: nn.Module, classes: Sequence[type[LowRankLayer]]) -> SiteCandidates:
    """List every format and rank for ``layer`` that saves parameters or MACs and costs more of neither.

    Args:
        site: Where the layer is and what it was called with.
        layer: The trained layer, with its weights.
        classes: Formats to consider; those that do not replace this kind of layer are skipped.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    positions = site_positions(site)
    size, itemsize = weight.numel(), weight.element_size()
    macs = sum(call_macs(p, layer) for p in positions)
    dense = Candidate(None, {}, 0.0, Cost(size, macs, size * itemsize, size))
    found: list[Candidate] = []
    notes: list[str] = []
    for cls in (cls for cls in classes if isinstance(layer, cls.replaces)):
        for options in cls.formats:
            try:
                found += _of_one_format(cls, options, layer, positions, itemsize)
            except LowRankError as error:
                notes.append(error.message)
    note = "" if found else (notes[0] if notes else "no format at any rank is smaller")
    return SiteCandidates(site.path, [dense, *_undominated(found)], note)


def _of_one_format(
    cls: type[LowRankLayer], options: dict[str, Any], layer: nn.Module, positions: list[Positions], itemsize: int
) -> list[Candidate]:
    """Return the candidates of one class and variant that save something and cost more of nothing."""
    source = read_layer(layer, cls)
    problem = cls.rank_problem(source, **options)
    ranks, errors = problem.table()
    norm = max(float(torch.linalg.vector_norm(source.weight.float())) ** 2, 1e-300)
    params = problem.params(*ranks.T)
    macs = np.sum([problem.macs(p, *ranks.T) for p in positions], axis=0)
    dense_params = problem.dense(positions[0])[0]
    dense_macs = sum(problem.dense(p)[1] for p in positions)
    saves = (params <= dense_params) & (macs <= dense_macs) & ((params < dense_params) | (macs < dense_macs))
    found = []
    for i in np.flatnonzero(saves):
        rank = cls.rank_argument(tuple(int(r) for r in ranks[i]), problem.limits)
        size = int(params[i])
        cost = Cost(size, int(macs[i]), size * itemsize, size)
        found.append(Candidate(cls, {"rank": rank, **options}, max(0.0, float(errors[i])) / norm, cost))
    return found


def site_positions(site: Site) -> list[Positions]:
    """Return how often the kernel is applied in each recorded call of a convolution or linear layer."""
    if isinstance(site.layer, nn.Linear):
        return [Positions(batch=int(np.prod(call.input_shape[:-1]))) for call in site.calls]
    return [Positions.of(call.input_shape, call.output_shape) for call in site.calls]


def call_macs(positions: Positions, layer: nn.Module) -> int:
    """Return the MACs of one call of a dense ``nn.Conv2d`` or ``nn.Linear``."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight.numel() * positions.outputs


def _undominated(candidates: list[Candidate]) -> list[Candidate]:
    """Drop candidates that another one beats or equals in error, params and MACs."""
    if not candidates:
        return []
    table = np.array([(c.error, c.cost.params, c.cost.macs) for c in candidates])
    order = np.lexsort((table[:, 2], table[:, 1], table[:, 0]))
    kept: list[int] = []
    front = np.empty((0, 2))
    for i in order:  # by rising error: keep what is strictly cheaper than all before it in params or MACs
        if not (front <= table[i, 1:]).all(axis=1).any():
            kept.append(int(i))
            front = np.vstack([front, table[i, 1:]])
    return [candidates[i] for i in sorted(kept)]
