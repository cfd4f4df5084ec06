"""The calls that a user makes: plan(), compress_model() and sweep()."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lowrank_nn.accelerator import full_precision, has_float64
from lowrank_nn.errors import LowRankError, PlanError
from lowrank_nn.graph import Recording, record
from lowrank_nn.graph.derive import deep_copy
from lowrank_nn.graph.inputs import tensors
from lowrank_nn.graph.preserve import preserved_random_state
from lowrank_nn.graph.sites import refuse_opaque
from lowrank_nn.graph.surgery import named_tensors
from lowrank_nn.pipeline.accounts import measured_latency, plan_report, result_report
from lowrank_nn.pipeline.batches import device_of, read_calibration
from lowrank_nn.pipeline.copies import record_result, working_copy
from lowrank_nn.pipeline.latency import dry_run_in_time
from lowrank_nn.pipeline.recipes import Recipe, read_recipe
from lowrank_nn.pipeline.result import Result
from lowrank_nn.pipeline.search import smallest_within
from lowrank_nn.pipeline.state import State, Step
from lowrank_nn.planning import Budget
from lowrank_nn.report import Report

logger = logging.getLogger(__name__)


def plan(
    model: nn.Module,
    example_inputs: Any,
    recipe: Recipe | None = None,
    *,
    budget: Budget | None = None,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Return the table that :func:`compress_model` would end with, without compressing.

    The recipe runs on the meta device. What decisions depend on is computed (ranks of rules, errors of candidates, from
    the weights or from the calibration data); nothing is trained, and no layer replaced. Layers count as often as the
    given model calls them; where that depends on values, compression may change it. So may the choice of what to prune
    with ``granularity="shape"``, of which the plan counts what can remain at most.

    Args:
        model: The trained model; not changed.
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of keywords.
        recipe: Steps in order, or the name of a published recipe; ``[LowRank()]`` if left out.
        budget: What may remain at the end of the recipe.
        calibration: As for :func:`compress_model`.
        seed: Seed of everything random.
        progress: Whether to show progress bars, on a terminal.

    Raises:
        PlanError: The recipe or the budget cannot be carried out on this model.
        CalibrationError: A step needs calibration data and there are none.
    """
    start, steps = _start(model, example_inputs, budget, calibration, seed, progress), read_recipe(recipe)
    if budget is not None and budget.accuracy_drop is not None:
        raise PlanError(
            "plan: a budget of accuracy_drop needs models compressed and evaluated, which compress_model does. Plan "
            "with a share, such as Budget(params=0.3)."
        )
    with _own_modes(seed):
        return plan_report(start, dry_run_in_time(start, steps))


def compress_model(
    model: nn.Module,
    example_inputs: Any,
    recipe: Recipe | None = None,
    *,
    budget: Budget | None = None,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    measure_speed: bool = False,
) -> Result:
    """Compress a trained network: plan the recipe, carry it out on a copy, and account for the result.

    The given model is never changed, also not by an error or an interrupt half-way; nor are the global random state
    and the warnings filters. An ``autocast`` around the call does not count, nor does another default dtype or device:
    all is computed in the model's own precision (``FineTune`` takes an ``autocast`` for training).

    Args:
        model: The trained model: any ``nn.Module`` that runs.
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of keywords.
        recipe: Steps in order (``LowRank``, ``Apply``, ``Prune``, ``Quantize``, ``FineTune``), or the name of a
            published recipe (``"one-shot"``); ``[LowRank()]`` if left out.
        budget: What may remain at the end of the recipe, as shares of the dense model; or the drop of accuracy within
            which the smallest model is wanted, for which up to eight are compressed.
        calibration: Batches of inputs, labels in them ignored (a second item, or the entry ``labels``, ``label``,
            ``targets`` or ``target`` of a dict): what ranks, bits and filters are chosen by, layers fitted to, and
            ranges of activations measured on. Batches on another device than the model are moved to it.
        seed: Seed of everything random. The same inputs and seed give the same bits on the same machine.
        progress: Whether to show progress bars, on a terminal.
        measure_speed: Whether to time both models on ``example_inputs`` for the report; under a latency budget they are
            timed in any case.

    Returns:
        The compressed model, the report and the plan.

    Raises:
        PlanError: The recipe or the budget cannot be carried out on this model.
        CalibrationError: A step needs calibration data and there are none, or they are not usable.
        BudgetError: The budget cannot be met.
        TrainingError: Fine-tuning met a loss that is not finite.
        LowRankError: The compressed model returns values that are not finite where the dense one's are.
    """
    start, steps = _start(model, example_inputs, budget, calibration, seed, progress), read_recipe(recipe)
    return _compress_and_time(start, steps, measure_speed)


def sweep(
    model: nn.Module,
    example_inputs: Any,
    budgets: Iterable[Budget],
    recipe: Recipe | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    measure_speed: bool = False,
) -> Iterator[Result]:
    """Compress a trained network under one budget after the other, and yield a result for each.

    The results are those of :func:`compress_model`; but what the recipe learns from weights, calibration data and
    timings it learns once.

    Args:
        model: The trained model; not changed.
        example_inputs: What the model is called with.
        budgets: What may remain at the end of the recipe, each in turn.
        recipe: As for :func:`compress_model`.
        calibration: As for :func:`compress_model`.
        seed: Seed of everything random, the same for every budget.
        progress: Whether to show progress bars, on a terminal.
        measure_speed: Whether to time both models for the reports.

    Raises:
        LowRankError: Whatever :func:`compress_model` raises, when a budget's turn comes.
    """
    start, steps = _start(model, example_inputs, None, calibration, seed, progress), read_recipe(recipe)
    if not isinstance(budgets, Iterable):
        raise PlanError(
            f"sweep: budgets must be several, such as [Budget(params=0.5), Budget(params=0.3)], got {budgets}."
        )
    for budget in budgets:
        _check_budget(budget)
        yield _compress_and_time(dataclasses.replace(start, budget=budget, remarks={}), steps, measure_speed)


def _start(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | None,
    calibration: Iterable[Any] | None,
    seed: int,
    progress: bool,
) -> State:
    """Return the state that a recipe starts from."""
    _check_budget(budget)
    _check_device(device_of(model))
    calibration = read_calibration(calibration, example_inputs, device_of(model))  # several steps may go through it
    with _own_modes(seed):
        refuse_opaque(model)
        if any(tensor.is_inference() for tensor in named_tensors(model).values()):
            model = deep_copy(model, type(model).__name__)  # whose tensors take gradients
        original = record(model, example_inputs)
    return State(model, model, original, example_inputs, calibration, budget, seed=seed, progress=progress)


def _check_budget(budget: Any) -> None:
    if not (budget is None or isinstance(budget, Budget)):
        raise PlanError(f"budget must be a Budget, such as Budget(params=0.3), got {budget!r}.")


def _check_device(device: torch.device) -> None:
    if not has_float64(device):
        raise PlanError(
            f"The model is on {device}, which has no float64, and fits and proofs compute in it. Move the model and "
            "example_inputs to the CPU, compress there, and move the result back."
        )


@contextlib.contextmanager
def _own_modes(seed: int) -> Iterator[None]:
    """Run a block with random numbers of its own, gradients and full precision, whatever the caller has switched on."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved_random_state(seed))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(full_precision())
        yield


def _compress_and_time(start: State, steps: list[Step], measure_speed: bool) -> Result:
    """Carry the recipe out, once or as often as the search for an accuracy takes."""
    with _own_modes(start.seed):
        if start.budget is not None and start.budget.accuracy_drop is not None:
            result = smallest_within(start, steps, lambda state: _compress(state, steps))
        else:
            result = _compress(start, steps)
        if measure_speed and result.report.latency is None:
            latency = measured_latency(start.dense, result.model, start.example_inputs)
            result = dataclasses.replace(result, report=dataclasses.replace(result.report, latency=latency))
    return result


def _compress(start: State, steps: list[Step]) -> Result:
    """Decide the recipe and carry it out on a copy."""
    dense, model = start.original, start.dense
    with preserved_random_state(start.seed):
        planned = dry_run_in_time(start, steps)
        copied = working_copy(model, steps, planned, start.example_inputs)
        state = dataclasses.replace(start, model=copied, replaced=weakref.WeakKeyDictionary())
        for index, (step, decisions) in enumerate(zip(steps, planned.decisions, strict=True), 1):
            logger.info("step %d of %d: %r", index, len(steps), step)
            step.execute(state, decisions)
        small = record_result(state.model, start.example_inputs, state.replaced)
        _refuse_broken(dense, small)
    return Result(state.model, result_report(state, small, planned), plan_report(start, planned))


def _refuse_broken(dense: Recording, small: Recording) -> None:
    if _finite(dense.output) and not _finite(small.output):
        raise LowRankError(
            "compress_model: the compressed model returns NaN or infinite values where the dense one does not. "
            "Allow a larger budget, leave the most sensitive layers dense (but_not=...), or report this with the model."
        )


def _finite(output: Any) -> bool:
    """Whether all floating tensors in a nest of containers are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors(output) if tensor.is_floating_point())
