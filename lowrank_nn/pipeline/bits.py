"""How many bits the weights of each layer get, under a budget of bytes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.decompose import Metric
from lowrank_nn.errors import BudgetError, PlanError
from lowrank_nn.graph import Site, replace_module
from lowrank_nn.graph.stand_in import with_numbers
from lowrank_nn.layers import layer_cost
from lowrank_nn.pipeline.evidence import Evidence
from lowrank_nn.pipeline.state import Decision, State, build
from lowrank_nn.planning import Budget, Candidate
from lowrank_nn.planning.allocation import allocate
from lowrank_nn.planning.candidates import Judge, SiteCandidates


def share_out_bits(
    state: State, decisions: Sequence[Decision], widths: Sequence[int], evidence: Evidence | None, data: dict[str, Any]
) -> list[Decision]:
    """Return the decisions with the bits chosen together, so that errors add up to little and bytes fit the budget.

    The budget is that of the whole recipe, and what this step cannot change counts too. Layers are judged with the
    given weights (factors with those fitted to them) under the metrics of the given model.

    Args:
        state: The dry run.
        decisions: What becomes of each layer, whatever its bits.
        widths: The bits to choose from.
        evidence: What data say about the given model; None to judge layers by the share of energy that they keep.
        data: Values for options that are measured on data later.

    Raises:
        PlanError: There is no budget of bytes.
        BudgetError: The budget cannot be met.
    """
    if state.budget is None or state.budget.bytes is None:
        raise PlanError(
            "Quantize: several widths of weights are shared out under a budget of bytes. Pass budget=Budget(bytes=0.1) "
            "or the like, or one width."
        )
    budget = Budget(bytes=state.budget.bytes)
    sites = {site.path: site for site in state.sites()}
    replaced = [decision for decision in decisions if decision.layer_class is not None]
    lister = _Lister(state, sorted(widths), evidence, data)
    tables = [lister.table(sites[decision.path], decision) for decision in replaced]
    now = sum(layer_cost(sites[d.path].layer, sites[d.path].calls[0].input_shape).bytes for d in replaced)
    fixed = state.cost().bytes - now
    picks = allocate([table.choices(budget) for table in tables], budget.allowed(state.dense_cost()) - fixed)
    if picks is None:
        least = fixed + sum(table.candidates[0].cost.bytes for table in tables)
        raise BudgetError(
            f"Quantize: bytes={budget.bytes:.3g} cannot be met with {min(widths)} to {max(widths)} bits (least "
            f"possible {least / state.dense_cost().bytes:.3g}). Allow more, or fewer bits, or put LowRank or Prune "
            "before it."
        )
    chosen = {table.path: table.candidates[pick] for table, pick in zip(tables, picks, strict=True)}
    return [_with_bits(decision, chosen.get(decision.path)) for decision in decisions]


def _with_bits(decision: Decision, candidate: Candidate | None) -> Decision:
    if candidate is None:
        return decision
    return Decision(decision.path, decision.layer_class, candidate.options, error=candidate.error**0.5)


class _Lister:
    """Lists what each width costs and loses in each layer; the model with numbers is made when it is first needed."""

    def __init__(self, state: State, widths: Sequence[int], evidence: Evidence | None, data: dict[str, Any]) -> None:
        self._state, self._widths, self._evidence, self._data = state, widths, evidence, data
        self._model: nn.Module | None = None

    def table(self, site: Site, decision: Decision) -> SiteCandidates:
        """Return the candidates of one layer, by rising bits; computed once for all dry runs."""
        outer = site.path if site.inside is None else site.inside
        whole = self._state.model.get_submodule(outer)
        aware = self._evidence is not None
        key = ("bits", self._state.base[0], repr(decision), *self._widths, repr(whole), aware)
        if key not in self._state.cache:
            self._state.cache[key] = self._listed(site, outer, decision)
        found: SiteCandidates = self._state.cache[key]
        return found

    def _listed(self, site: Site, outer: str, decision: Decision) -> SiteCandidates:
        if self._model is None:
            self._model = with_numbers(self._state.model, self._state.base[0])
        whole = self._model.get_submodule(outer)
        part = site.path.removeprefix(outer).removeprefix(".")
        metric = None if self._evidence is None else self._evidence.metric(outer)
        judge = Judge(whole, metric)
        candidates = []
        for bits in self._widths:
            chosen = Decision(decision.path, decision.layer_class, decision.options | {"bits": bits})
            error = judge.relative(_change(whole, part, chosen, metric, self._data))
            cost = build(chosen, site.layer, self._data).cost(site.calls[0].input_shape)
            candidates.append(Candidate(decision.layer_class, chosen.options, error, cost))
        return SiteCandidates(site.path, candidates, scale=judge.scale)


@torch.no_grad()
def _change(whole: nn.Module, part: str, decision: Decision, metric: Metric | None, data: dict[str, Any]) -> Tensor:
    """Return how the weight of a layer changes if a part of it, itself or a factor, is quantized."""
    measured = data if part or metric is None else data | {"metric": metric}
    new: nn.Module = build(decision, whole.get_submodule(part), measured)
    if part:
        new = replace_module(copy.deepcopy(whole), part, new)
    assert isinstance(new.weight, Tensor)
    assert isinstance(whole.weight, Tensor)
    return new.weight - whole.weight
