"""Running a recipe on the meta device: every decision made, no number computed, the budget checked at the end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from lowrank_nn.errors import BudgetError
from lowrank_nn.graph import Recording
from lowrank_nn.graph.derive import meta_copy
from lowrank_nn.layers import LeafLayer, LowRankLayer
from lowrank_nn.pipeline.apply import without_compressed_form
from lowrank_nn.pipeline.filters import FilterDecision
from lowrank_nn.pipeline.state import Decision, State, Step
from lowrank_nn.planning import LayerChoices

_SEARCHES = 10
_NARROWEST = 0.25
_SPENT = 0.97  # share of the budget that counts as all of it: ranks are whole numbers


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a recipe decides, and the structure it ends with.

    Attributes:
        decisions: The decisions of each step.
        steps: The steps.
        state: The model on the meta device after the last step.
        latency: Its measured time over that of the dense model, where the budget asks for it.
    """

    decisions: list[list[Decision]]
    steps: list[Step]
    state: State
    latency: float | None = None

    def overspent(self) -> float:
        """Return the largest ratio of what remains to what the budget allows; 0 without a budget."""
        budget = self.state.budget
        if budget is None:
            return 0.0
        spent = budget.spent(self.state.cost(), self.state.latency())
        return float((spent / budget.allowed(self.state.dense_cost(), self.state.dense_latency())).max())

    def fits(self) -> bool:
        """Whether what remains is within the budget, up to rounding."""
        return self.overspent() <= 1 + 1e-9

    def errors(self) -> dict[str, float]:
        """Return the predicted relative weight errors by path."""
        return {d.path: d.error for decisions in self.decisions for d in decisions if d.error is not None}

    def choices(self) -> tuple[LayerChoices, ...]:
        """Return what low-rank steps chose for each layer, and out of what."""
        found = []
        for decision in (decision for decisions in self.decisions for decision in decisions):
            cls = decision.layer_class
            if cls is not None and issubclass(cls, LowRankLayer):
                found.append(LayerChoices(decision.path, cls, decision.options, decision.candidates))
            elif decision.candidates:
                found.append(LayerChoices(decision.path, None, {}, decision.candidates))
        return tuple(found)

    def left(self, dense: Recording) -> dict[str, tuple[str, ...]]:
        """Return reason to paths of all layers that a step, or all of them, left as they were."""
        reasons: dict[str, list[str]] = {}
        touched = {site.path for site in dense.sites if self.state.is_resized(site.path)}
        for step, decisions in zip(self.steps, self.decisions, strict=True):
            for decision in decisions:
                smaller = isinstance(decision, FilterDecision) and self.state.is_resized(decision.path)
                if decision.note and not smaller:
                    reason = f"{type(step).__name__}: {decision.note.rstrip('.')}"
                    reasons.setdefault(reason, []).append(decision.path)
        every = [decision for decisions in self.decisions for decision in decisions]
        # A folded norm is no answer to why the steps that replace layers did not reach one of another kind.
        replacing = any(decision.layer_class is not None for decision in every)
        unreached = {site.path for site in dense.sites if replacing and without_compressed_form(site)}
        touched |= {decision.path for decision in every if decision.note or decision.path not in unreached}
        for site in dense.sites:
            layer = site.layer
            has_weight = isinstance(layer, LeafLayer) or any(p.dim() >= 2 for p in layer.parameters(recurse=False))
            if site.inside is None and site.path not in touched and has_weight:
                reason = "no step of the recipe acts on them"
                if without_compressed_form(site):
                    reason = f"{type(layer).__name__} has no compressed form"
                reasons.setdefault(reason, []).append(site.path)
        return {reason: tuple(dict.fromkeys(paths)) for reason, paths in reasons.items()}


def dry_run(start: State, steps: Sequence[Step]) -> DryRun:
    """Decide a whole recipe under its budget.

    The budget holds at the end of the recipe. A step that allocates is first given the budget itself; where later steps
    save more (int8 after low rank), its share is widened by bisection over complete dry runs until the end just fits,
    and narrowed where they cost more (masks of few zeros).

    Args:
        start: The model as it was given.
        steps: The recipe.

    Raises:
        PlanError: A step cannot be carried out.
        BudgetError: The recipe ends above the budget.
    """
    first = _try_once(start, steps)
    fits = isinstance(first, DryRun) and first.fits()
    best = first if isinstance(first, DryRun) and fits else None
    if start.budget is not None and any(step.allocates() for step in steps):
        over = isinstance(first, DryRun) and not fits
        bounds = (_NARROWEST, 1.0) if over else (1.0, 1 / min(start.budget.shares().values()))
        best = _search(start, steps, best, *bounds)
    if best is None:
        raise BudgetError(_above_budget(first)) if isinstance(first, DryRun) else first
    return best


def _search(start: State, steps: Sequence[Step], best: DryRun | None, low: float, high: float) -> DryRun | None:
    """Bisect the largest slack with which the whole recipe still ends within the budget."""
    for _ in range(_SEARCHES):
        if best is not None and best.overspent() > _SPENT:
            break
        middle = math.sqrt(low * high)
        tried = _try_once(dataclasses.replace(start, slack=middle), steps)
        if isinstance(tried, DryRun) and not tried.fits():
            high = middle
            continue
        low = middle  # it fits, or low rank alone could not go that far down
        if isinstance(tried, DryRun) and (best is None or tried.overspent() > best.overspent()):
            best = tried
    return best


def _try_once(start: State, steps: Sequence[Step]) -> DryRun | BudgetError:
    try:
        return _run_once(start, steps)
    except BudgetError as error:
        return error


def _run_once(start: State, steps: Sequence[Step]) -> DryRun:
    state = dataclasses.replace(start, model=meta_copy(start.dense), dry=True, remarks={})
    decisions = []
    for step in steps:
        decided = step.decide(state)
        step.execute(state, decided)
        decisions.append(decided)
    return DryRun(decisions, list(steps), state)


def _above_budget(end: DryRun) -> str:
    budget, state = end.state.budget, end.state
    assert budget is not None
    spent = budget.spent(state.cost(), state.latency())
    dense = budget.spent(state.dense_cost(), state.dense_latency())
    parts = [
        f"{name}: {now / max(before, 1e-9):.3g} of the dense model, allowed {share:.3g}"
        for (name, share), now, before in zip(budget.shares().items(), spent, dense, strict=True)
    ]
    hint = "Prune more"
    if not any(step.allocates() for step in end.steps):
        hint = "Add LowRank(), which works towards the budget"
    elif budget.latency is not None:
        hint = "Leave out steps that save bytes and no time (masks, codebooks, integers without activations='int8')"
    return f"the recipe ends above its budget ({'; '.join(parts)}). {hint}, or allow more."
