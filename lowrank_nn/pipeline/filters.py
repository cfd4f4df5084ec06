"""Removing filters, units and heads for good: which ones, under an amount or a budget, and the proof of it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from lowrank_nn.errors import PlanError
from lowrank_nn.graph import Recording, Site, record
from lowrank_nn.graph.free_norms import measure_free_norms, resize_free_norms
from lowrank_nn.graph.groups import ChannelGroup, find_groups
from lowrank_nn.graph.proof import Proof, prove
from lowrank_nn.graph.stand_in import with_numbers
from lowrank_nn.graph.surgery import Removal, named_tensors, remove_units
from lowrank_nn.graph.widths import SharedWidth, shared_widths
from lowrank_nn.pipeline.evidence import changed_since_given
from lowrank_nn.pipeline.filter_budget import removals_of, within_budget
from lowrank_nn.pipeline.refit import merge_similar_, refit_readers
from lowrank_nn.pipeline.select import Patterns, select
from lowrank_nn.pipeline.state import Decision, State
from lowrank_nn.planning import BatchLoss
from lowrank_nn.planning.importance import ADDITIVE, UnitCriterion, obstacle, unit_importance
from lowrank_nn.planning.moment_scores import MOMENT_CRITERIA
from lowrank_nn.planning.unit_choice import KeepRule, least_important

Found = TypeVar("Found")

_PROBED = 0.5  # share of each group that is removed to find out, under a budget, which groups can be


@dataclasses.dataclass(frozen=True)
class FilterDecision(Decision):
    """What becomes of the output channels of the layer at ``path``.

    Attributes:
        removal: Units that go, as the given weights tell (later weights may tell others, as many); None where none
            does, and at all but the first of the layers that compute them.
    """

    removal: Removal | None = None


@dataclasses.dataclass(frozen=True)
class FilterRemoval:
    """The part of :class:`lowrank_nn.Prune` that makes layers physically smaller; see there.

    Attributes:
        amount: Share of the units to remove; None for as many as the budget asks for.
        keep: What every group keeps.
        criterion: Which units matter least.
        where: Patterns of the layers wanted.
        but_not: Patterns of the layers to leave as they are.
        batches: Batches for ``loss``.
        loss: For criteria that need one.
        reconstruct: Whether calibration data, if there are any, are used to refit the readers of what was removed.
    """

    amount: float | None
    keep: KeepRule
    criterion: str | UnitCriterion
    where: Patterns
    but_not: Patterns
    batches: Iterable[Any] | None
    loss: BatchLoss | None
    reconstruct: bool

    def decide(self, state: State) -> list[Decision]:
        """Decide for every channel group that the patterns want.

        Raises:
            PlanError: A pattern matches nothing, there is neither an amount nor a budget, or the model fails.
            BudgetError: The budget cannot be met.
        """
        model = self._numbers_of(state)
        groups = _cached(state, "groups", lambda: find_groups(model, state.example_inputs))
        wanted = self._wanted(state, groups)
        open_groups = [group for group in wanted if not group.frozen]
        widths = shared_widths(open_groups, named_tensors(model))
        scores = _cached(state, ("scores", id(self)), lambda: self._scores(state, model, open_groups))
        notes = {group.name: group.frozen for group in wanted if group.frozen}
        notes |= {g.name: self._silence(model, g) for g in open_groups if g.name not in scores}
        if self.amount is None:
            removals, refused = self._within_budget(state, model, wanted, scores, widths, notes)
        else:
            chosen = removals_of(wanted, self.keep.choose(scores, self.amount, widths))
            proof = self._prove(state, model, chosen, widths)
            removals, refused = proof.proven, proof.refused
        return _decisions(wanted, {removal.group.name: removal for removal in removals}, notes | refused)

    def execute(self, state: State, decisions: Sequence[Decision]) -> None:
        """Remove as many units of each group as decided, those that matter least now, and prove it."""
        removals = [d.removal for d in decisions if isinstance(d, FilterDecision) and d.removal is not None]
        if state.dry:
            smaller, recording, channels = self._smaller(state, removals)
            remove_units(state.model, removals)
            resize_free_norms(state.model, channels)
            state.pruned = (smaller, recording)
        else:
            self._remove(state, self._proven_now(state, removals))
            state.pruned = (state.model, record(state.model, state.example_inputs))
        cut = {path for removal in removals for path in _producers(removal.group)}
        for decision in decisions:
            if decision.note and state.is_resized(decision.path):
                which = "some" if decision.path in cut else "all"
                state.remark(decision.path, f"Prune: {which} output channels stay: {decision.note}")

    def _numbers_of(self, state: State) -> nn.Module:
        """Return a copy of the model of a dry run with numbers."""
        # Where every group loses the same share, numbers only tell what runs; later ones tell which units go.
        fit = self.keep.scope == "global"
        return _cached(state, ("numbers", fit), lambda: with_numbers(state.model, state.base[0], fit=fit))

    def _within_budget(
        self,
        state: State,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        scores: Mapping[str, Tensor],
        widths: Sequence[SharedWidth],
        stuck: Mapping[str, str],
    ) -> tuple[Sequence[Removal], dict[str, str]]:
        """Return removals that meet the budget and run, and by name of other groups why they cannot lose as many."""
        every = dataclasses.replace(self.keep, scope="layer")
        probe = removals_of(groups, every.choose(scores, _PROBED, widths))
        refused = self._prove(state, model, probe, widths).refused
        while True:
            left = {name: values for name, values in scores.items() if name not in refused}
            additive = self.criterion in ADDITIVE
            removals = within_budget(state, groups, left, self.keep, widths, {**stuck, **refused}, additive=additive)
            try:
                self._smaller(state, removals)
            except PlanError:
                # The share that was proven runs, this one does not (channels that have to come in fours).
                found = self._prove(state, model, removals, widths).refused
                if not found:
                    raise
                refused = refused | found
            else:
                return removals, refused

    def _smaller(self, state: State, removals: Sequence[Removal]) -> tuple[nn.Module, Recording, dict[str, int]]:
        """Return what :func:`_shrunk` makes of the model of a dry run, computed once."""
        return _cached(state, ("shrunk", *removals), lambda: _shrunk(self._numbers_of(state), removals, state))

    def _remove(self, state: State, removals: Sequence[Removal]) -> None:
        """Remove units, and make the best of what is left."""
        before = None
        if self._refits(state) and removals:
            before = copy.deepcopy(state.model) if changed_since_given(state) else state.dense
        if self.criterion == "similar":
            merge_similar_(state.model, removals)
        _take_away(state.model, removals, state)
        if before is not None:
            refit_readers(state, before, removals)

    def _refits(self, state: State) -> bool:
        return self.reconstruct and state.calibration is not None

    def _wanted(self, state: State, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        """Return the groups of which every producer is wanted and none is not."""
        known = {site.path: site for site in state.sites()}
        paths = dict.fromkeys(path for group in groups for path in _producers(group))
        sites = [known.get(path) or Site(path, state.model.get_submodule(path), (), (), None, ()) for path in paths]
        chosen = {site.path for site in select(sites, self.where, self.but_not, "Prune")}
        return [group for group in groups if chosen.issuperset(_producers(group))]

    def _scores(self, state: State, model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
        """Return the importance of the units of each group, by name."""
        return unit_importance(
            model,
            groups,
            self.criterion,
            calibration=state.calibration,
            batches=self.batches,
            loss=self.loss,
            corrected=self._refits(state),
            seed=state.seed,
            progress=state.progress and not state.dry,
        )

    def _silence(self, model: nn.Module, group: ChannelGroup) -> str:
        """Return why the criterion says nothing about a group."""
        why = obstacle(model, group, self.criterion)
        if not why and self.criterion in [*MOMENT_CRITERIA]:
            why = "not only nn.Conv2d and nn.Linear read it"
        if why:
            return f"criterion={self.criterion!r} says nothing about it: {why}"
        return "the criterion says nothing about it"

    def _prove(
        self, state: State, model: nn.Module, removals: Sequence[Removal], widths: Sequence[SharedWidth]
    ) -> Proof:
        proof = _cached(state, ("proof", *removals), lambda: _proof(state, model, removals, widths))
        if proof.refused:  # the others were proven together
            _cached(state, ("proof", *proof.proven), lambda: dataclasses.replace(proof, refused={}))
        return proof

    def _proven_now(self, state: State, removals: Sequence[Removal]) -> Sequence[Removal]:
        """Return what can be removed of the model with its numbers; the report says what not."""
        widths = shared_widths([removal.group for removal in removals], named_tensors(state.model))
        if changed_since_given(state):
            proof = _proof(state, state.model, self._chosen_now(state, removals), widths)
        else:  # with an amount, the plan has proven it of these very numbers
            proof = self._prove(state, state.model, removals, widths)
        groups = {removal.group.name: removal.group for removal in removals}
        for name, reason in proof.refused.items():
            state.remark(_producers(groups[name])[0], f"Prune: filters put back: {reason}")
        if proof.untested:
            state.remark("", f"Prune: removed filters are proven in eval mode only: {proof.untested}")
        return proof.proven

    def _chosen_now(self, state: State, removals: Sequence[Removal]) -> list[Removal]:
        """Return as many units of each group, chosen by the weights as they are now."""
        scores = self._scores(state, state.model, [removal.group for removal in removals])
        return [
            Removal(r.group, least_important(scores[r.group.name], len(r.units)) if r.group.name in scores else r.units)
            for r in removals
        ]


def _proof(state: State, model: nn.Module, removals: Sequence[Removal], widths: Sequence[SharedWidth]) -> Proof:
    together = [width.names for width in widths]
    return prove(model, removals, state.example_inputs, together=together, seed=state.seed)


def _shrunk(model: nn.Module, removals: Sequence[Removal], state: State) -> tuple[nn.Module, Recording, dict[str, int]]:
    """Return a copy of a model without some units, what it is recorded to do, and sizes of norms without tensors."""
    smaller = copy.deepcopy(model)
    channels = _take_away(smaller, removals, state)
    return smaller, record(smaller, state.example_inputs), channels


def _take_away(model: nn.Module, removals: Sequence[Removal], state: State) -> dict[str, int]:
    """Remove units, and let norms without tensors follow; return the sizes of these."""
    remove_units(model, removals)
    channels = measure_free_norms(model, state.example_inputs)
    resize_free_norms(model, channels)
    return channels


def _cached(state: State, what: Any, compute: Callable[[], Found]) -> Found:
    """Compute once for all dry runs in which the model is the same here."""
    model = state.base[0]  # kept in the entry, so that no other model gets its id
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in named_tensors(state.model).items())
    key = (FilterRemoval, id(model), shapes, what)
    if key not in state.cache:
        state.cache[key] = (model, compute())
    found: Found = state.cache[key][1]
    return found


def _producers(group: ChannelGroup) -> list[str]:
    """Return the paths of the modules that compute the units; of those that hold them, where none does."""
    computing = [member for member in group.members if member.role == "out"] or group.members[:1]
    return list(dict.fromkeys(member.name.rpartition(".")[0] for member in computing))


def _decisions(
    groups: Sequence[ChannelGroup], removals: Mapping[str, Removal], notes: Mapping[str, str]
) -> list[Decision]:
    """Return a decision for each producer of each group; the first one of a group carries the removal."""
    decisions: list[Decision] = []
    for group in groups:
        paths, removal = _producers(group), removals.get(group.name)
        if removal is None:
            note = notes.get(group.name, f"none of its {group.size} units goes at this amount")
            decisions += [FilterDecision(path, None, note=note) for path in paths]
        else:
            decisions.append(FilterDecision(paths[0], None, removal=removal))
            decisions += [FilterDecision(path, None) for path in paths[1:]]
    return decisions
