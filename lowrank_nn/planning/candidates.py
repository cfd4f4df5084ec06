"""The low-rank candidates of one layer: every registered format, at many ranks, with error and cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowrank_nn.cost import Cost
from lowrank_nn.decompose import Metric
from lowrank_nn.errors import LowRankError
from lowrank_nn.graph import Site, site_cost
from lowrank_nn.graph.derive import meta_copy
from lowrank_nn.layers import CompressedLayer, LowRankLayer, Positions, RankProblem, read_layer
from lowrank_nn.layers._rank_problem import IntArray, aligned
from lowrank_nn.planning.budget import Budget
from lowrank_nn.planning.choices import Choices, Floats

_LEAST_KEPT = 1e-6  # a weight that keeps less of its energy than this counts as lost


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to replace a layer; ``layer_class`` None is the dense layer itself.

    Attributes:
        layer_class: The compressed class.
        options: What its ``from_pretrained_layer`` is called with, the metric apart.
        error: Relative squared change of the weight, ||W - W'||^2 / ||W||^2, or e(W - W') / e(W) under a metric.
        cost: Params, MACs and bytes of the weight (no bias).
        latency: Milliseconds of all calls of one forward; 0 where nothing was timed.
        compared: What the allocation is to compare in place of the error, if anything.
    """

    layer_class: type[CompressedLayer] | None
    options: dict[str, Any]
    error: float
    cost: Cost
    latency: float = 0.0
    compared: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class SiteCandidates:
    """The candidates of one site, and the reason if the dense layer is the only one; equal only to itself.

    Attributes:
        path: The layer's dotted path.
        candidates: The dense layer, then all that save something; where bits are chosen, one for each width.
        note: Why there are no others; empty if there are.
        scale: e(W), the metric's size of the whole weight, where it estimates the change of the network's output;
            None where errors of different layers have no common scale.
    """

    path: str
    candidates: list[Candidate]
    note: str = ""
    scale: float | None = None

    def choices(self, budget: Budget) -> Choices:
        """Return errors and costs as the allocation takes them.

        With a common scale these are the absolute errors, which estimate the squared change of the network's output
        and add up. Without one, the error of a candidate that keeps a share 1 - e of the weight's energy is
        -log(1 - e): their sum is small where the product of the shares over all layers is large (Zhang et al. 2016),
        so that no layer is given up for the others.
        """
        costs = _costs(self.candidates, budget)
        compared = [candidate.compared for candidate in self.candidates if candidate.compared is not None]
        if len(compared) == len(costs):
            return Choices(np.array(compared), costs)
        relative: Floats = np.array([candidate.error for candidate in self.candidates])
        lost = -np.log(np.clip(1 - relative, _LEAST_KEPT, 1.0))
        errors = lost if self.scale is None else relative * self.scale
        return Choices(errors, costs)


def low_rank_candidates(
    site: Site,
    layer: nn.Module,
    classes: Sequence[type[LowRankLayer]],
    metric: Metric | None = None,
    *,
    multiple: int = 1,
) -> SiteCandidates:
    """List every format and rank for ``layer`` that saves parameters or MACs and costs more of neither.

    With a ``multiple``, latency is to decide: what another candidate beats in parameters and MACs stays, since it may
    be the faster one.

    Args:
        site: Where the layer is and what it was called with.
        layer: The trained layer, with its weights.
        classes: Formats to consider; those that do not replace this kind of layer are skipped.
        metric: What the errors measure; None for the squared Frobenius norm. With a curvature of the network's output
            in it, errors of different layers are comparable.
        multiple: Only ranks that are multiples of this are listed, and small ones and full ranks.
    """
    found: list[Candidate] = []
    notes: list[str] = []
    judge = Judge(layer, metric)
    for cls in (cls for cls in classes if isinstance(layer, cls.replaces)):
        for options in cls.formats:
            try:
                found += _candidates(cls, options, layer, judge, site, multiple)
            except LowRankError as error:
                notes.append(error.message)
    note = "" if found else (notes[0] if notes else "no format at any rank is smaller")
    kept = undominated(found, Budget(params=1, macs=1)) if multiple == 1 else found
    dense = dense_candidate(site, layer)
    if site.weight_reads and kept:
        kept = [c for c in (_with_reads(c, site) for c in kept) if c.cost.macs <= dense.cost.macs]
        note = "" if kept else "the model's own code reads its weight, and multiplying factors for it takes more MACs"
    return SiteCandidates(site.path, [dense, *kept], note, judge.scale)


def dense_candidate(site: Site, layer: nn.Module) -> Candidate:
    """Return the candidate that is ``layer`` itself."""
    assert isinstance(layer.weight, Tensor)
    macs = sum(call_macs(p, layer) for p in site_positions(site))
    return Candidate(None, {}, 0.0, kernel_cost(layer.weight, layer.weight.numel(), macs))


def _with_reads(candidate: Candidate, site: Site) -> Candidate:
    """Return a candidate with the MACs of its calls and of the reads of its weight."""
    assert candidate.layer_class is not None
    new = candidate.layer_class.from_pretrained_layer(meta_copy(site.layer), **candidate.options)
    macs = site_cost(dataclasses.replace(site, layer=new)).macs
    return dataclasses.replace(candidate, cost=dataclasses.replace(candidate.cost, macs=macs))


def rank_costs(
    problem: RankProblem, positions: list[Positions], ranks: IntArray
) -> tuple[IntArray, IntArray, NDArray[np.bool_]]:
    """Return params and MACs at each row of ``ranks``, and where these save something and cost more of neither."""
    params = problem.params(*ranks.T)
    macs = np.sum([problem.macs(p, *ranks.T) for p in positions], axis=0)
    dense_params = problem.dense(positions[0])[0]
    dense_macs = sum(problem.dense(p)[1] for p in positions)
    saves = (params <= dense_params) & (macs <= dense_macs) & ((params < dense_params) | (macs < dense_macs))
    return params, macs, saves


def kernel_cost(weight: Tensor, params: int, macs: int) -> Cost:
    """Return the cost of factors in the dtype of the weight that they replace."""
    return Cost(params, macs, params * weight.element_size(), params)


class Judge:
    """Says how large an error of a layer's weight is: under a metric, or squared in the Frobenius norm.

    Args:
        layer: The layer, with its weight.
        metric: The metric; None for the Frobenius norm.

    Attributes:
        metric: The metric, with a changed mean output counted as error where the layer has no bias to make up for it.
        size: The error of losing the whole weight, which others are relative to; never zero.
        scale: ``size`` where it estimates the change of the network's output, else None.
    """

    def __init__(self, layer: nn.Module, metric: Metric | None) -> None:
        assert isinstance(layer.weight, Tensor)
        self.metric = metric if metric is None or layer.bias is not None else metric.with_mean()
        self.size = max(self._squared(layer.weight.detach()), 1e-300)
        self.scale = self.size if metric is not None and metric.curvature is not None else None

    def relative(self, change: Tensor) -> float:
        """Return the error of a change of the weight, relative to losing all of it."""
        return max(0.0, self._squared(change)) / self.size

    def _squared(self, change: Tensor) -> float:
        if self.metric is not None:
            return self.metric.error(change)
        return float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2


def _candidates(
    cls: type[LowRankLayer], options: dict[str, Any], layer: nn.Module, judge: Judge, site: Site, multiple: int
) -> list[Candidate]:
    """Return the ranks of one class and variant that save something and cost more of nothing."""
    source = read_layer(layer, cls)
    problem = cls.rank_problem(source, **options)
    problem.multiple = multiple
    ranks, errors = problem.table(judge.metric)
    params, macs, saves = rank_costs(problem, site_positions(site), ranks)
    found = []
    for i in np.flatnonzero(saves & _aligned(ranks, problem)):
        rank = cls.rank_argument(tuple(int(r) for r in ranks[i]), problem.limits)
        cost = kernel_cost(source.weight, int(params[i]), int(macs[i]))
        found.append(Candidate(cls, {"rank": rank, **options}, max(0.0, float(errors[i])) / judge.size, cost))
    return found


def _aligned(ranks: IntArray, problem: RankProblem) -> NDArray[np.bool_]:
    """Return which rows of ranks fill whole vectors; all of them where none does."""
    modes = zip(ranks.T, problem.limits, strict=True)
    mask = np.all([aligned(mode, limit, problem.multiple) for mode, limit in modes], axis=0)
    return mask if mask.any() else np.ones_like(mask)


def site_positions(site: Site) -> list[Positions]:
    """Return how often the kernel is applied in each recorded call of a convolution or linear layer."""
    if isinstance(site.layer, nn.Linear):
        return [Positions(batch=int(np.prod(call.input_shape[:-1]))) for call in site.calls]
    return [Positions.of(call.input_shape, call.output_shape) for call in site.calls]


def call_macs(positions: Positions, layer: nn.Module) -> int:
    """Return the MACs of one call of a dense ``nn.Conv2d`` or ``nn.Linear``."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight.numel() * positions.outputs


def undominated(candidates: list[Candidate], budget: Budget) -> list[Candidate]:
    """Drop candidates that another one beats or equals in error and in all that ``budget`` limits."""
    if not candidates:
        return []
    costs = _costs(candidates, budget)
    errors = np.array([candidate.error for candidate in candidates])
    order = np.lexsort((*costs.T[::-1], errors))
    kept: list[int] = []
    front = np.empty((0, costs.shape[1]))
    for i in order:  # by rising error: keep what is strictly cheaper than all before it in some entry
        if not (front <= costs[i]).all(axis=1).any():
            kept.append(int(i))
            front = np.vstack([front, costs[i]])
    return [candidates[i] for i in sorted(kept)]


def _costs(candidates: Sequence[Candidate], budget: Budget) -> Floats:
    return np.stack([budget.spent(candidate.cost, candidate.latency) for candidate in candidates])
