"""Proof that channels were removed and nothing else: a model without them against one in which they are zero."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from lowrank_nn.errors import LowRankError
from lowrank_nn.graph.proof_comparison import Comparison
from lowrank_nn.graph.proof_modes import MeansOfKept, NormaliseKept, StandardiseKept
from lowrank_nn.graph.proof_runs import Run, Trial, short
from lowrank_nn.graph.surgery import Removal, cuts_of, masked_units, named_tensors, remove_units


@dataclasses.dataclass(frozen=True)
class Proof:
    """Which removals leave the rest of the model as it is.

    Attributes:
        proven: The removals that were proven, all at once.
        refused: By name of the group, why a removal was not.
        untested: What could not be tested of the proven ones, in words; empty where everything was.
    """

    proven: tuple[Removal, ...]
    refused: dict[str, str]
    untested: str = ""


def prove(
    model: nn.Module,
    removals: Sequence[Removal],
    example_inputs: Any,
    *,
    together: Sequence[Collection[str]] = (),
    seed: int = 0,
) -> Proof:
    """Find out which removals change nothing but that the channels are gone.

    Twice the model runs on the same inputs: once without the doomed units, once with all their slices zero in every
    member of their groups; layer norms, and weights that are standardised, take mean and variance of the other channels
    in both. In eval mode the outputs must agree; in train mode, with dropout off and a batch twice as large where the
    model allows that, also the gradients of all that is kept and the statistics of the norms. Both runs are in float64,
    where the model runs in it: rounding is no excuse then.

    All removals are tried at once first. Where they do not agree they are halved, so that a few bad ones among many
    cost few runs; layers at the same place of repeated blocks, which mostly share their fate, stay together longest.
    First that is in eval mode alone, which costs a fraction of the rest and finds nearly all bad ones.

    Args:
        model: Not changed; worked on is a copy.
        removals: At most one for each group, all for the model as it is.
        example_inputs: What the model is called with.
        together: Names of groups that are tried together first: the model may do without both, but not without one.
        seed: Seed of what the model draws.

    Raises:
        PlanError: The model fails on the inputs, or returns no finite numbers, so that there is nothing to compare.
    """
    trial = Trial(model, example_inputs, seed)
    refused: dict[str, str] = {}
    left = _bundles(removals, together)
    for runs in (trial.runs[:1], trial.runs):
        left = _halved(trial, left, runs, refused)
    order = {id(removal): index for index, removal in enumerate(removals)}
    proven = sorted((removal for bundle in left for removal in bundle), key=lambda removal: order[id(removal)])
    return Proof(tuple(proven), refused, trial.untested)


_Bundle = tuple[Removal, ...]
"""Removals that are tried together."""


def _bundles(removals: Sequence[Removal], together: Sequence[Collection[str]]) -> list[_Bundle]:
    """Return what is tried together, alike next to each other: those whose names differ in numbers alone."""
    bundles = [tuple(removal for removal in removals if removal.group.name in names) for names in together]
    bundled = {removal.group.name for bundle in bundles for removal in bundle}
    bundles = [*filter(None, bundles), *((removal,) for removal in removals if removal.group.name not in bundled)]
    return sorted(bundles, key=lambda bundle: re.sub(r"\d+", "", bundle[0].group.name))


def _halved(trial: Trial, bundles: list[_Bundle], runs: Sequence[Run], refused: dict[str, str]) -> list[_Bundle]:
    """Return the bundles that agree, all at once, and note why others do not."""
    proven: list[_Bundle] = []
    queue = [bundles] if bundles else []
    known: dict[frozenset[int], str] = {}  # where one half is proven, the other makes up the whole that was not
    while queue:
        batch = queue.pop()
        tried = [removal for bundle in [*proven, *batch] for removal in bundle]
        key = frozenset(map(id, tried))
        if key not in known:
            known[key] = _difference(trial, tried, runs)
        problem = known[key]
        if not problem:
            proven += batch
        elif len(batch) > 1:
            middle = len(batch) // 2
            queue += [batch[middle:], batch[:middle]]
        elif len(batch[0]) > 1:
            queue.append([(removal,) for removal in batch[0]])
        else:
            refused[batch[0][0].group.name] = problem
    return proven


def _difference(trial: Trial, removals: Sequence[Removal], runs: Sequence[Run]) -> str:
    """Return how the model without some units differs from the one where they are zero; empty if it does not.

    Where zeros are divided by zeros (a weight by its norm), the model is taken in which nothing reads the units.
    """
    try:
        comparisons = _compared(trial.model, removals, removals, runs)
        if any(comparison.undefined() for comparison in comparisons):
            unread = _compared(trial.model, removals, [_readers(removal) for removal in removals], runs)
            comparisons = [b if a.undefined() else a for a, b in zip(comparisons, unread, strict=True)]
    except _FailedError as error:
        return str(error)
    for (mode, _), comparison in zip(runs, comparisons, strict=True):
        if problem := comparison.problem():
            return f"{problem} {mode} differ from those with the same channels held at zero"
    return ""


def _readers(removal: Removal) -> Removal:
    """Return the removal from those members of the group alone that read its units."""
    members = tuple(member for member in removal.group.members if member.role == "in")
    return dataclasses.replace(removal, group=dataclasses.replace(removal.group, members=members))


class _FailedError(Exception):
    """Units cannot be removed, or not without the forward failing; the message says why."""


def _compared(
    model: nn.Module, removals: Sequence[Removal], masked: Sequence[Removal], runs: Sequence[Run]
) -> list[Comparison]:
    """Return for each run how the model without some units compares with one in which parts of them are zero."""
    try:
        cuts = cuts_of(removals, named_tensors(model))
        undo = remove_units(model, removals)
    except LowRankError as error:
        raise _FailedError(str(error)) from error
    # The smaller model first: where it fails, nothing else has to run.
    comparisons: list[Comparison] = []
    try:
        for _, run in runs:
            comparisons.append(Comparison(cuts))
            run(comparisons[-1].keep)
    except Exception as error:
        mode = runs[len(comparisons) - 1][0]
        raise _FailedError(f"without these channels the forward fails {mode}: {short(error)}") from error
    finally:
        undo()
    means = {mean for removal in removals for mean in removal.group.means}
    with masked_units(model, masked), NormaliseKept(model, cuts), StandardiseKept(model, cuts):
        for (_, run), comparison in zip(runs, comparisons, strict=True):
            with MeansOfKept(means):
                run(comparison.compare)
    return comparisons
