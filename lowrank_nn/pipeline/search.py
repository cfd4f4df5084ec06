"""Searching the smallest model whose metric drops no further than allowed."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from lowrank_nn.errors import BudgetError, OptionError, PlanError
from lowrank_nn.graph.preserve import preserved_random_state
from lowrank_nn.pipeline import distributed
from lowrank_nn.pipeline.batches import device_of
from lowrank_nn.pipeline.finetune import FineTune
from lowrank_nn.pipeline.result import Probe, Result
from lowrank_nn.pipeline.state import State, Step
from lowrank_nn.pipeline.training import as_metric
from lowrank_nn.planning import Budget

logger = logging.getLogger(__name__)

_PROBES = 8
_SMALLEST = 0.01  # share of the largest budget that is searched down to
_NEAR = 1.02  # ratio of two budgets that is not worth a probe
_ROUNDING = 1e-9


def smallest_within(start: State, steps: Sequence[Step], compress: Callable[[State], Result]) -> Result:
    """Return the smallest model that is found whose metric drops by at most ``accuracy_drop``.

    The share that the recipe has to meet is bisected, on a log scale, with at most eight models compressed for real.
    What steps have computed of the given model they find again in the cache.

    Args:
        start: The model as it was given; its budget has ``accuracy_drop``. Further shares in it hold for every probe.
        steps: The recipe, of which some step works towards the budget.
        compress: Carries the recipe out.

    Raises:
        PlanError: No step works towards a budget, or a step cannot be repeated.
        BudgetError: The largest model drops too far, or no size can be met.
        OptionError: ``evaluate`` returns no finite number.
    """
    budget = start.budget
    assert budget is not None
    _refuse_what_cannot_be_searched(steps)
    if any(isinstance(step, FineTune) for step in steps):
        distributed.join_processes(device_of(start.dense))  # all processes are to see the same metrics
    if "latency" in (budget.of, *budget.shares()):
        start = start.with_clock()
    search = _Search(start, budget, compress)
    largest = budget.shares().get(budget.of, 1.0)
    low, high = largest * _SMALLEST, largest
    with search.bar:
        while high > low * _NEAR and len(search.probes) < _PROBES - (search.best is None):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if search.passes(middle) else (middle, high)
        best = search.best or search.largest(largest)
    return dataclasses.replace(best, probes=tuple(search.probes))


class _Search:
    """The probes so far, and the smallest model that passed."""

    def __init__(self, start: State, budget: Budget, compress: Callable[[State], Result]) -> None:
        self.start, self.budget, self.compress = start, budget, compress
        self.probes: list[Probe] = []
        self.best: Result | None = None
        self.dense_metric = _metric(budget, start.dense, start.seed)
        hidden = None if start.progress else True
        self.bar = tqdm(total=_PROBES, desc="accuracy_drop: probes", disable=hidden, leave=False)

    def passes(self, share: float) -> bool:
        """Compress to a share and evaluate; a share that cannot be met does not pass."""
        try:
            return self._probe(share).drop <= self._allowed()
        except BudgetError as error:
            logger.info("accuracy_drop: %s=%.3g cannot be met: %s", self.budget.of, share, error)
            return False

    def largest(self, share: float) -> Result:
        """Return the model that is compressed as little as the budget allows, where nothing smaller passed.

        Raises:
            BudgetError: That drops too far too, or cannot be met.
        """
        probe = self._probe(share)
        if self.best is None:
            raise BudgetError(
                f"the budget accuracy_drop={self._allowed():.4g} cannot be met: the mildest of {len(self.probes)} "
                f"probes, {self.budget.of}={share:.3g}, drops by {probe.drop:.4g}, from {self.dense_metric:.6g} to "
                f"{probe.metric:.6g}. Allow a larger drop, fine-tune, or take steps out of the recipe."
            )
        logger.warning("accuracy_drop: no smaller model than %s=%.3g is good enough", self.budget.of, share)
        return self.best

    def _probe(self, share: float) -> Probe:
        result = self.compress(dataclasses.replace(self.start, budget=self.budget.with_share(share), remarks={}))
        metric = _metric(self.budget, result.model, self.start.seed)
        probe = Probe(share, metric, self.dense_metric - metric, result.report)
        self.probes.append(probe)
        self.bar.update()
        logger.info("accuracy_drop: %s=%.3g gives %.6g, a drop of %.4g", self.budget.of, share, metric, probe.drop)
        if probe.drop <= self._allowed():
            self.best = result
        return probe

    def _allowed(self) -> float:
        assert self.budget.accuracy_drop is not None
        return self.budget.accuracy_drop + _ROUNDING * max(1.0, abs(self.dense_metric))


def _refuse_what_cannot_be_searched(steps: Sequence[Step]) -> None:
    if not any(step.allocates() for step in steps):
        raise PlanError(
            "Budget(accuracy_drop=...) searches the size that a recipe is to meet, and no step of this one works "
            "towards a size. Add LowRank() without a rank rule."
        )
    if any(isinstance(step, FineTune) and step.checkpoint is not None for step in steps):
        raise PlanError(
            "Budget(accuracy_drop=...) trains several models, which cannot share one file: leave out "
            "FineTune(checkpoint=...)."
        )


def _metric(budget: Budget, model: nn.Module, seed: int) -> float:
    """Return what the user's function says of a copy of ``model``."""
    assert budget.evaluate is not None
    with preserved_random_state(seed), torch.no_grad():
        value: Any = budget.evaluate(copy.deepcopy(model).eval())
    metric = as_metric(value)
    if not math.isfinite(metric):
        raise OptionError(f"Budget: evaluate must return one finite number, larger for a better model, got {value!r}.")
    return distributed.mean_over_processes(metric, device_of(model))
