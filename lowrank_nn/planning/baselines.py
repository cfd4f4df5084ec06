"""The candidates of published methods, which look at one layer and its weight in their own way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lowrank_nn.decompose import Metric, singular_values
from lowrank_nn.errors import LowRankError, RankError, UnsupportedLayerError
from lowrank_nn.graph import Site
from lowrank_nn.layers import VBMF, LowRankLayer, RankProblem, RankRule, TuckerConv2d, read_layer
from lowrank_nn.planning.candidates import (
    Candidate,
    Judge,
    SiteCandidates,
    dense_candidate,
    kernel_cost,
    low_rank_candidates,
    rank_costs,
    site_positions,
)
from lowrank_nn.planning.choices import Floats

_WEAKENINGS = 100


def alds_candidates(
    site: Site,
    layer: nn.Module,
    classes: Sequence[type[LowRankLayer]],
    metric: Metric | None = None,
    *,
    multiple: int = 1,
) -> SiteCandidates:
    r"""List the ranks of the formats that split one matrix, compared by the operator norm of what they leave out.

    Rank r of a matrix with singular values :math:`\alpha_1 \ge \alpha_2 \ge \dots` is compared by
    :math:`\alpha_{r+1} / \alpha_1`, over groups by the largest of each. This is ALDS without its second choice, into
    how many pieces the input channels are cut before each is decomposed (k = 1).

    Args:
        site: Where the layer is and what it was called with.
        layer: The trained layer, with its weights.
        classes: Formats to consider; those with several ranks, or whose rank is that of no matrix, are skipped.
        metric: Not used: the method looks at weights alone.
        multiple: As for :func:`low_rank_candidates`.

    References:
        Liebenwein et al. 2021, "Compressing Neural Networks: Towards Determining the Optimal Layer-wise Decomposition".
    """
    try:
        splitting = [cls for cls in classes if isinstance(layer, cls.replaces) and _splits_a_matrix(cls, layer)]
    except UnsupportedLayerError as error:
        return SiteCandidates(site.path, [_dense(site, layer)], error.message)
    table = low_rank_candidates(site, layer, splitting, multiple=multiple)
    norms: dict[tuple[type[nn.Module], str], Floats] = {
        (cls, str(variant)): _relative_norms(cls, variant, layer) for cls in splitting for variant in cls.formats
    }

    def compared(candidate: Candidate) -> float:
        if candidate.layer_class is None:
            return 0.0
        variant = {name: value for name, value in candidate.options.items() if name != "rank"}
        return float(norms[candidate.layer_class, str(variant)][candidate.options["rank"]])

    candidates = [dataclasses.replace(candidate, compared=compared(candidate)) for candidate in table.candidates]
    note = table.note if splitting else "ALDS takes formats that split one matrix, such as SVDConv2d"
    return SiteCandidates(site.path, candidates, note)


def _dense(site: Site, layer: nn.Module) -> Candidate:
    return dataclasses.replace(dense_candidate(site, layer), compared=0.0)


def _splits_a_matrix(cls: type[LowRankLayer], layer: nn.Module) -> bool:
    try:
        return len(cls.rank_problem(read_layer(layer, cls)).unfoldings()) == 1
    except RankError:
        return False


def _relative_norms(cls: type[LowRankLayer], variant: dict[str, Any], layer: nn.Module) -> Floats:
    """Return the operator norm of what each rank from 0 leaves out, over that of the whole."""
    (matrices,) = cls.rank_problem(read_layer(layer, cls), **variant).unfoldings()
    values: Floats = torch.stack([singular_values(matrix) for matrix in matrices]).amax(0).cpu().numpy()
    return np.append(values, 0.0) / max(float(values[0]), 1e-300)


def musco_candidates(
    site: Site,
    layer: nn.Module,
    classes: Sequence[type[LowRankLayer]],
    metric: Metric | None = None,
    *,
    multiple: int = 1,
) -> SiteCandidates:
    """List the ranks full - w (full - vbmf) for w in hundredths, compared by w.

    The format is the first of ``classes`` that replaces this kind of layer, Tucker-2 left out for 1 x 1 kernels.

    Args:
        site: Where the layer is and what it was called with.
        layer: The trained layer, with its weights.
        classes: Formats, in order of preference.
        metric: Not used: the method looks at weights alone.
        multiple: Ranks are rounded up to multiples of this.

    References:
        Gusak et al. 2019, "Automated Multi-Stage Compression of Neural Networks".
    """
    dense = _dense(site, layer)
    try:
        found = _weakened(_first_format(layer, classes), site, layer, multiple)
    except LowRankError as error:
        return SiteCandidates(site.path, [dense], error.message)
    return SiteCandidates(site.path, [dense, *found], "" if found else "its VBMF ranks would save nothing")


def _first_format(layer: nn.Module, classes: Sequence[type[LowRankLayer]]) -> type[LowRankLayer]:
    fitting = [cls for cls in classes if isinstance(layer, cls.replaces)]
    pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
    return next((cls for cls in fitting if not (pointwise and cls is TuckerConv2d)), fitting[0])


def _weakened(cls: type[LowRankLayer], site: Site, layer: nn.Module, multiple: int) -> list[Candidate]:
    """Return the candidates of all w that save something; of several w with the same ranks the smallest."""
    source = read_layer(layer, cls)
    problem = cls.rank_problem(source)
    table = problem.table()
    size = Judge(layer, None).size
    estimates = VBMF().choose(problem)
    rules = [_Weakened(estimates, step / _WEAKENINGS, multiple) for step in range(1, _WEAKENINGS + 1)]
    options = [{"rank": cls.resolve_rank(rule, source)} for rule in rules]
    ranks = np.array([_as_integers(option["rank"], problem) for option in options])
    params, macs, saves = rank_costs(problem, site_positions(site), ranks)
    changed = np.append(True, (np.diff(ranks, axis=0) != 0).any(axis=1))
    found = []
    for i in np.flatnonzero(saves & changed):
        # A table need not hold all pairs of ranks: what the best smaller pair loses is a bound.
        error = float(table.errors[(table.ranks <= ranks[i]).all(axis=1)].min(initial=size))
        cost = kernel_cost(source.weight, int(params[i]), int(macs[i]))
        found.append(Candidate(cls, options[i], max(0.0, error) / size, cost, compared=rules[i].weaken))
    return found


def _as_integers(rank: Any, problem: RankProblem) -> tuple[int, ...]:
    modes = rank if isinstance(rank, tuple) else (rank,)
    return tuple(limit if mode is None else mode for mode, limit in zip(modes, problem.limits, strict=True))


@dataclasses.dataclass(frozen=True)
class _Weakened(RankRule):
    """Ranks a share of the way from full to given estimates, rounded up to multiples."""

    estimates: tuple[int, ...]
    weaken: float
    multiple: int

    def choose(self, problem: RankProblem) -> tuple[int, ...]:
        modes = zip(self.estimates, problem.limits, strict=True)
        return tuple(self._rounded(limit - self.weaken * (limit - estimate), limit) for estimate, limit in modes)

    def _rounded(self, rank: float, limit: int) -> int:
        return min(limit, math.ceil(math.ceil(rank) / self.multiple) * self.multiple)
