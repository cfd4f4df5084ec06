"""Dry runs under a budget of latency: what was decided is timed, and decided again until the time is right."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

from lowrank_nn.errors import BudgetError
from lowrank_nn.pipeline.dryrun import DryRun, dry_run
from lowrank_nn.pipeline.state import State, Step
from lowrank_nn.planning import present_layers

logger = logging.getLogger(__name__)

_ROUNDS = 5
_BISECTIONS = 6
_NEAR = (0.95, 1.02)  # of what is asked: measured times vary by some percent
_TOO_LONG = 1.1


def dry_run_in_time(start: State, steps: Sequence[Step]) -> DryRun:
    """Decide a whole recipe under its budget, as :func:`dry_run` does, with latencies that hold when measured.

    Without a latency in the budget nothing is timed. With one, a stand-in of the model that the recipe ends with, its
    weights random, is timed beside the dense model; the clock learns from that, and the recipe is decided again, until
    the measured time is near what is asked, at most five times. The nearest choice is returned.

    Args:
        start: The model as it was given; a clock is made if it has none.
        steps: The recipe.

    Raises:
        PlanError: A step cannot be carried out.
        BudgetError: The recipe ends above the budget, or every choice takes 10 % longer than asked or more.
    """
    asked = None if start.budget is None else start.budget.latency
    if asked is None:
        return dry_run(start, steps)
    start = start.with_clock()
    clock = start.clock
    assert clock is not None
    best: DryRun | None = None
    for _ in range(_ROUNDS):
        planned = _nearest(start, steps, asked)
        estimate = planned.state.latency() / clock.dense
        measured = clock.measure(present_layers(planned.state.recording()), planned.state.base)
        logger.info("latency: %.3g asked, %.3g estimated, %.3g measured", asked, estimate, measured)
        planned = dataclasses.replace(planned, latency=measured)
        if best is None or _miss(planned, asked) < _miss(best, asked):
            best = planned
        # Where the estimate was right, there is no nearer choice.
        if _miss(planned, asked) == 0 or _miss(planned, estimate) == 0:
            break
    assert best is not None
    if best.latency is not None and best.latency > _TOO_LONG * asked:
        raise BudgetError(
            f"the budget latency={asked:.3g} cannot be met with the layers that may change: the fastest model that was "
            f"measured takes {best.latency:.3g} of the dense one's {clock.dense:.3g} ms. Allow more, or let LowRank "
            "change more layers."
        )
    return best


def _nearest(start: State, steps: Sequence[Step], asked: float) -> DryRun:
    """Return the dry run under the budget or, where no estimate is that low, one with the least latency there is."""
    try:
        return dry_run(start, steps)
    except BudgetError:
        fastest = _no_slower(start, steps, asked)
    low, high = asked, 1.0
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        try:
            fastest, high = dry_run(_with_latency(start, middle), steps), middle
        except BudgetError:
            low = middle
    return fastest


def _no_slower(start: State, steps: Sequence[Step], asked: float) -> DryRun:
    try:
        return dry_run(_with_latency(start, 1.0), steps)
    except BudgetError as error:
        raise BudgetError(
            f"latency={asked:.3g} cannot be met, nor can the rest of the budget with all the time that the dense model "
            f"takes (latency=1): {error}"
        ) from error


def _with_latency(start: State, share: float) -> State:
    assert start.budget is not None
    return dataclasses.replace(start, budget=dataclasses.replace(start.budget, latency=share))


def _miss(planned: DryRun, asked: float) -> float:
    """Return how far the measured latency is from what is asked; more counts three times as much as less."""
    assert planned.latency is not None
    share = planned.latency / asked
    return max(0.0, _NEAR[0] - share, 3 * (share - _NEAR[1]))
