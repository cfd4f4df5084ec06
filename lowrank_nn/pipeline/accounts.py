"""The account of what was done: reports on a plan, on a result, and on any two models; times, if asked for."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from lowrank_nn.cost import compare_speed
from lowrank_nn.graph import Recording, call_model, record
from lowrank_nn.graph.fold import folded_norms
from lowrank_nn.pipeline.batches import device_of
from lowrank_nn.pipeline.dryrun import DryRun
from lowrank_nn.pipeline.state import State
from lowrank_nn.report import Latency, Report, make_report


def plan_report(start: State, planned: DryRun) -> Report:
    """Return the report on a plan.

    Args:
        start: The model as it was given.
        planned: What was decided.
    """
    after = planned.state
    report = make_report(
        "plan",
        (start.model, start.original),
        (after.model, after.recording()),
        left=planned.left(start.original),
        errors=planned.errors(),
        choices=planned.choices(),
    )
    if planned.latency is None:
        return report
    before = after.dense_latency()
    threads, device = torch.get_num_threads(), str(device_of(start.dense))
    return dataclasses.replace(
        report, latency=Latency(before, planned.latency * before, 1 / planned.latency, threads, device)
    )


def result_report(state: State, small: Recording, planned: DryRun) -> Report:
    """Return the report on a compressed model, with measured times if the budget asks for them.

    Args:
        state: The recipe carried out.
        small: What the compressed model was recorded to do.
        planned: What was decided.
    """
    dense, inputs = state.dense, state.example_inputs
    report = make_report(
        "result",
        (dense, state.original),
        (state.model, small),
        left=planned.left(state.original),
        remarks=state.remarks,
        choices=planned.choices(),
        folded=folded_norms(dense, state.model, inputs),
        rescaled=state.rescaled,
    )
    if planned.latency is None:
        return report
    return dataclasses.replace(report, latency=measured_latency(dense, state.model, inputs))


def compare(dense: nn.Module, small: nn.Module, example_inputs: Any, *, measure_speed: bool = False) -> Report:
    """Return the report on any two models of one architecture, such as one compressed in several calls.

    Args:
        dense: The model before compression.
        small: The model after it, with a layer at every path where ``dense`` has one.
        example_inputs: What both are called with.
        measure_speed: Whether to time both models.

    Raises:
        PlanError: A model fails on these inputs, or ``small`` has no layer where ``dense`` has one.
    """
    report = make_report(
        "result",
        (dense, record(dense, example_inputs)),
        (small, record(small, example_inputs)),
        left={},
        folded=folded_norms(dense, small, example_inputs),
    )
    if not measure_speed:
        return report
    return dataclasses.replace(report, latency=measured_latency(dense, small, example_inputs))


def measured_latency(dense: nn.Module, small: nn.Module, example_inputs: Any) -> Latency:
    """Return the times of two models, taken in turn."""
    copies = [copy.deepcopy(model).eval() for model in (dense, small)]  # a forward may change buffers
    with torch.no_grad():
        timing = compare_speed(*(functools.partial(call_model, model, example_inputs) for model in copies))
    return Latency(timing.first, timing.second, timing.ratio, torch.get_num_threads(), str(device_of(small)))
