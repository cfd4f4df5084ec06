"""The step that chooses format and rank of every layer at once, under the budget."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lowrank_nn.cost import Cost
from lowrank_nn.decompose import Metric
from lowrank_nn.errors import BudgetError, OptionError, PlanError, UnsupportedLayerError, check_whole_number
from lowrank_nn.graph import Site
from lowrank_nn.layers import LAYERS, LowRankLayer, RankRule, SVDConv2d, SVDLinear, TuckerConv2d, read_layer
from lowrank_nn.pipeline.apply import class_for, decide_layer, matching, refusal, without_compressed_form
from lowrank_nn.pipeline.evidence import carry_out, gather_once, uses_data
from lowrank_nn.pipeline.select import Patterns, strictest
from lowrank_nn.pipeline.state import Decision, State, Step
from lowrank_nn.planning import Budget, Candidate, Clock, SiteCandidates, TimedCandidates
from lowrank_nn.planning.constraints import checked_shares, in_multiples, within_shares
from lowrank_nn.planning.rules import ALLOCATIONS, Allocation, AllocationRule


class LowRank(Step):
    """Replace layers by low-rank formats, chosen together under the budget or one by one by a rank rule.

    Without ``rank``, the format (Tucker, SVD, CP: every registered one) and the rank of each layer are chosen
    together for the whole network, by a Lagrangian multiple-choice knapsack over all candidates, the dense layer
    included. With a rank rule, each layer is treated by itself: Tucker-2 for k x k convolutions, the SVD for 1 x 1
    convolutions and linear layers.

    With calibration data, what is made small is the change of the network's output on them: candidates are fitted
    under the metric of :func:`lowrank_nn.planning.collect_metrics`, whose errors add up over layers; then all chosen
    layers are fitted once more in the order of execution, each to give what the given network gave, out of what the
    compressed layers before it produce; and the change of each layer's mean output is corrected, in its bias or in
    the running mean of the norm behind it. Without data, the product over layers of the share of energy kept,
    1 - ||W - W'||^2 / ||W||^2, is made large.

    Args:
        where: Shell patterns on dotted paths of the layers wanted.
        but_not: Shell patterns of the layers to leave as they are, such as ``"conv1"``.
        formats: Low-rank classes to choose from; if left out all registered ones but those that have to be named
            (``planned_by_default``). With a rank rule, each layer takes the first that replaces its kind.
        rank: A rank rule (``VBMF()``, ``Energy(0.9)``, ``Params(0.3)``, ``SpeedUp(2)``), or None for the budget.
        allocation: How the budget is shared out: ``"knapsack"``, or one of the rules to compare it with: ``"uniform"``
            (every layer keeps the same share), ``"alds"`` (the largest relative error in operator norm is made small,
            SVD only unless ``formats`` says otherwise), ``"musco"`` (ranks full - w (full - vbmf), one w for all).
        multiple_of: What ranks are to be multiples of, with a budget.
        at_least: Share of a layer's parameters that stays at least, by shell pattern, such as ``{"layer1.*": 0.5}``;
            of several patterns the strictest counts. With a budget.
        at_most: Share of a layer's parameters that may stay at most, likewise.
        data_aware: Whether to use the calibration data; if left out, where there are some and ranks come from the
            budget.
        curvature: Whether errors count by what they do to the network's output, which takes gradients, or by what
            they do to the layer's own.
        reconstruct: Whether to fit the layers once more in the order of execution. Holds the activations of all
            calibration data at one point of the given and of the compressed network in memory.

    Raises:
        OptionError: ``rank`` is neither a rule nor None, there is no such allocation, a share or multiple is out of
            range, or what only a budget can heed comes with a rank rule.

    References:
        Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
        Applications" (rank rule). Zhang et al. 2016, "Accelerating Very Deep Convolutional Networks for
        Classification and Detection" (product of energies). Everett 1963, "Generalized Lagrange Multiplier
        Method" (allocation). Liebenwein et al. 2021, "Compressing Neural Networks: Towards Determining the Optimal
        Layer-wise Decomposition" (``"alds"``). Gusak et al. 2019, "Automated Multi-Stage Compression of Neural
        Networks" (``"musco"``).
    """

    def __init__(
        self,
        *,
        where: Patterns = "*",
        but_not: Patterns = (),
        formats: Sequence[type[LowRankLayer]] | None = None,
        rank: RankRule | None = None,
        allocation: Allocation = "knapsack",
        multiple_of: int = 1,
        at_least: Mapping[str, float] | None = None,
        at_most: Mapping[str, float] | None = None,
        data_aware: bool | None = None,
        curvature: bool = True,
        reconstruct: bool = True,
    ) -> None:
        if rank is not None and not isinstance(rank, RankRule):
            raise OptionError(
                f"LowRank: rank must be a rule such as VBMF() or Energy(0.9), or None to share out the budget, got "
                f"{rank!r}. For one rank everywhere use Apply(TuckerConv2d, rank=...)."
            )
        if allocation not in ALLOCATIONS:
            raise OptionError(f"LowRank: allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}.")
        if rank is not None and (allocation != "knapsack" or multiple_of != 1 or at_least or at_most):
            raise OptionError(
                "LowRank: a rank rule treats each layer by itself; allocation, multiple_of, at_least and at_most need "
                "a budget. Leave rank out, or leave them out."
            )
        self.where, self.but_not, self.rank, self.allocation = where, but_not, rank, allocation
        self.multiple_of = check_whole_number("LowRank: multiple_of", multiple_of, 1)
        self.at_least, self.at_most = checked_shares("at_least", at_least), checked_shares("at_most", at_most)
        self.formats = None if formats is None else _low_rank_classes(formats)
        self.data_aware, self.curvature, self.reconstruct = data_aware, curvature, reconstruct

    def _shown(self) -> dict[str, Any]:
        names = ("where", "but_not", "formats", "rank", "allocation", "multiple_of")
        named = {name: getattr(self, name) for name in (*names, "data_aware", "curvature", "reconstruct")}
        return named | {"at_least": self.at_least or None, "at_most": self.at_most or None}

    def allocates(self) -> bool:
        """Whether the ranks come from the budget."""
        return self.rank is None

    def decide(self, state: State) -> list[Decision]:
        """Decide format and rank of each matching layer.

        Raises:
            PlanError: A pattern matches nothing, or there is no budget.
            BudgetError: The budget cannot be met.
            CalibrationError: There are no calibration data, and ``data_aware`` is set, or they are not usable.
        """
        classes = self._classes()
        chosen = [site for site, _ in matching(state, classes, self.where, self.but_not, "LowRank")]
        if self.rank is None:
            return self._share_out(state, chosen, classes)
        watched = state.watch(chosen, f"LowRank: {self.rank}")
        return [decide_layer(state, site, self._format_of(site), {"rank": self.rank}) for site in watched]

    def execute(self, state: State, decisions: list[Decision]) -> None:
        """Replace the layers as decided; with calibration data, fitted to them."""
        if state.dry or not self._on_data(state):
            super().execute(state, decisions)
        else:
            carry_out("LowRank", state, decisions, curvature=self.curvature, sequential=self.reconstruct)

    def _on_data(self, state: State) -> bool:
        return uses_data("LowRank", state, self.data_aware, by_default=self.rank is None)

    def _classes(self) -> tuple[type[LowRankLayer], ...]:
        low_rank = [cls for cls in LAYERS.values() if issubclass(cls, LowRankLayer)]
        by_default = tuple(cls for cls in low_rank if cls.planned_by_default)
        return self.formats or self._rule().formats or by_default

    def _rule(self) -> AllocationRule:
        return ALLOCATIONS[self.allocation]

    def _format_of(self, site: Site) -> type[LowRankLayer]:
        """Return the format for a rank rule: the first of the user's, or Tucker for k x k kernels and else the SVD."""
        classes: tuple[type[LowRankLayer], ...] = self.formats or (TuckerConv2d, SVDConv2d, SVDLinear)
        if self.formats is None and isinstance(site.layer, nn.Conv2d) and site.layer.kernel_size == (1, 1):
            classes = (SVDConv2d,)
        cls = class_for(site, classes)
        assert cls is not None
        assert issubclass(cls, LowRankLayer)
        return cls

    def _share_out(self, state: State, sites: list[Site], classes: tuple[type[LowRankLayer], ...]) -> list[Decision]:
        budget = state.budget
        if budget is None:
            raise PlanError(
                "LowRank: there is no budget to share out. Pass budget=Budget(params=0.3) or the like, or a rank rule: "
                "LowRank(rank=VBMF())."
            )
        tables = [self._candidates(state, site, classes) for site in state.watch(sites, "LowRank: candidates")]
        if state.clock is not None:
            tables = self._timed(state, state.clock, tables, budget)
        open_tables = [table for table in tables if table.candidates]
        changeable = sum((table.candidates[0].cost for table in open_tables), Cost())
        target = budget.scaled(state.slack)
        fixed = target.spent(
            state.cost() - changeable, state.latency() - sum(table.candidates[0].latency for table in open_tables)
        )
        allowed = target.allowed(state.dense_cost(), state.dense_latency()) - fixed
        bounded = self._within_bounds(sites, tables)
        usable = [table for table in bounded if table.candidates]
        picks = self._rule().choose([table.choices(target) for table in usable], allowed)
        if picks is None:
            raise BudgetError(_cannot_be_met(target, state, fixed, bounded))
        chosen = {t.path: t.candidates[i] for t, i in zip(usable, picks, strict=True)}
        on_data = self._on_data(state)
        return [_decision(table, chosen.get(table.path), on_data=on_data) for table in tables]

    def _within_bounds(self, sites: list[Site], tables: list[SiteCandidates]) -> list[SiteCandidates]:
        """Return the tables with the candidates that ``at_least`` and ``at_most`` admit."""
        least = strictest(sites, self.at_least, "LowRank", max)
        most = strictest(sites, self.at_most, "LowRank", min)
        bounded = least.keys() | most.keys()
        return [
            within_shares(table, least.get(table.path, 0.0), most.get(table.path, 1.0))
            if table.path in bounded
            else table
            for table in tables
        ]

    def _timed(self, state: State, clock: Clock, tables: list[SiteCandidates], budget: Budget) -> list[SiteCandidates]:
        """Return the tables with what the clock says now; before the first time, all layers are timed in place."""
        open_tables = [table for table in tables if table.candidates]
        key: Any = (TimedCandidates, *open_tables)
        if key not in state.cache:
            state.cache[key] = timed = TimedCandidates(open_tables, state.recording(), clock, state.base)
            timed.measure(state.watch(timed.probes(), "LowRank: timing"))
        faster = {table.path: table for table in state.cache[key].faster(budget)}
        return [faster.get(table.path, table) for table in tables]

    def _candidates(self, state: State, site: Site, classes: tuple[type[LowRankLayer], ...]) -> SiteCandidates:
        note = refusal(site)
        if note:
            return SiteCandidates(site.path, [], note)
        if not isinstance(site.layer, (nn.Conv2d, nn.Linear)):
            return SiteCandidates(site.path, [], f"it is a {type(site.layer).__name__} already: put LowRank first")
        metric = gather_once(state, curvature=self.curvature).metric(site.path) if self._on_data(state) else None
        width = 1 if state.clock is None else state.clock.vector_width
        key: Any = (LowRank, state.base[0], site.path, *self._kind(), metric is not None, self.curvature, width)
        if key not in state.cache:
            state.cache[key] = self._computed(site, state.weights_of(site), classes, metric, width)
        found: SiteCandidates = state.cache[key]
        return found

    def _computed(
        self, site: Site, layer: nn.Module, classes: Sequence[type[LowRankLayer]], metric: Metric | None, width: int
    ) -> SiteCandidates:
        try:
            read_layer(layer, next(cls for cls in classes if isinstance(layer, cls.replaces)))
        except UnsupportedLayerError as error:  # ahead of all else: to read a parametrized weight may change the layer
            return SiteCandidates(site.path, [], error.message)
        table = self._rule().candidates(site, layer, classes, metric, multiple=math.lcm(width, self.multiple_of))
        return in_multiples(table, self.multiple_of)

    def _kind(self) -> tuple[Any, ...]:
        """Return what the candidates of a layer depend on, the data apart."""
        return (self._classes(), self._rule().candidates, self.multiple_of)


def _low_rank_classes(formats: Any) -> tuple[type[LowRankLayer], ...]:
    classes = tuple(formats) if isinstance(formats, Iterable) else (formats,)
    wrong = [cls for cls in classes if not _is_format(cls)]
    if wrong or not classes:
        known = ", ".join(name for name, cls in LAYERS.items() if issubclass(cls, LowRankLayer))
        got = repr(wrong[0]) if wrong else "none"
        raise OptionError(f"LowRank: formats must be classes of low-rank layers ({known}), got {got}.")
    return classes


def _is_format(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, LowRankLayer) and not inspect.isabstract(cls)


def _decision(table: SiteCandidates, candidate: Candidate | None, *, on_data: bool) -> Decision:
    every = tuple(table.candidates)
    if candidate is None or candidate.layer_class is None:
        note = table.note or "dense within the budget: other layers lose less"
        return Decision(table.path, None, note=note, candidates=every)
    error = None if on_data else math.sqrt(candidate.error)  # on data, that of a candidate is not the weight's
    return Decision(table.path, candidate.layer_class, candidate.options, error=error, candidates=every)


def _cannot_be_met(target: Budget, state: State, fixed: NDArray[np.float64], tables: list[SiteCandidates]) -> str:
    """Say what the budget asks and how far low rank alone can go."""
    dense = target.spent(state.dense_cost(), state.dense_latency())
    least = sum((table.choices(target).costs.min(axis=0) for table in tables if table.candidates), fixed)
    parts = [
        f"{name}={share:.3g} (least possible {lowest / max(before, 1e-9):.3g})"
        for (name, share), lowest, before in zip(target.shares().items(), least, dense, strict=True)
    ]
    stuck: dict[str, list[str]] = {}
    for table in tables:
        if table.note:
            stuck.setdefault(table.note.rstrip("."), []).append(table.path)
    for site in state.sites():
        if isinstance(site.layer, LowRankLayer):
            stuck.setdefault("of low rank already", []).append(site.path)
        if without_compressed_form(site):
            stuck.setdefault(f"{type(site.layer).__name__} has no compressed form", []).append(site.path)
    out_of_reach = "".join(f" It cannot change {', '.join(paths)}: {note}." for note, paths in stuck.items())
    return (
        f"LowRank: the budget {', '.join(parts)} cannot be met with the layers it may change.{out_of_reach} Allow "
        "more, let it change more layers, or add pruning or quantization steps."
    )
