"""Whether layers run faster in integers than in floating point: timed where they stand."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lowrank_nn.graph import replace_module
from lowrank_nn.graph.derive import derive_recording
from lowrank_nn.graph.preserve import untouched_process
from lowrank_nn.graph.stand_in import stand_in
from lowrank_nn.graph.timing import Profile, time_in_place
from lowrank_nn.layers import CompressedLayer
from lowrank_nn.layers._integer import IntegerLayer
from lowrank_nn.pipeline.state import Decision, State, build
from lowrank_nn.planning import present_layers

logger = logging.getLogger(__name__)

Timer = Callable[[Sequence[tuple[nn.Module, Iterable[str]]], Any], list[Profile]]


def slower_layers(
    state: State, decisions: Sequence[Decision], stand_ins: dict[str, Any], *, timer: Timer = time_in_place
) -> dict[str, str]:
    """Return, by path, why layers had better stay in floating point: they were timed and found slower in integers.

    Two stand-ins with random weights are timed in turn: the model as it is, and with everything quantized that is to
    be. The factors of one layer hand integers to each other and are judged as a whole; layers take and return floats,
    as they have to beside a layer that stays. The timings are kept for later dry runs of the same layers.

    Args:
        state: The dry run.
        decisions: What the step would do.
        stand_ins: Options for building layers now whose ranges will be measured later.
        timer: Times models with the layers at some paths; another one in tests.
    """
    replaced = [decision for decision in decisions if decision.layer_class is not None]
    outer = {decision.path: _outer_path(state, decision.path) for decision in replaced}
    paths = list(dict.fromkeys(outer.values()))
    key = ("fastest", *(repr(state.model.get_submodule(path)) for path in paths), *map(repr, replaced))
    if key not in state.cache:
        state.cache[key] = _time(state, replaced, stand_ins, paths, timer)
    before, after = state.cache[key]
    return {
        path: f"slower in integers: {after[layer]:.3f} ms, in floating point {before[layer]:.3f} ms"
        for path, layer in outer.items()
        if after[layer] >= before[layer]
    }


def _time(
    state: State, replaced: Sequence[Decision], stand_ins: dict[str, Any], paths: Sequence[str], timer: Timer
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the milliseconds that the layers at ``paths`` take per forward, as they are and in integers."""
    quantized = copy.deepcopy(state.model)
    for decision in replaced:
        layer = build(decision, quantized.get_submodule(decision.path), stand_ins)
        quantized = replace_module(quantized, decision.path, layer)
    recordings = state.recording(), derive_recording(state.original, quantized)
    with untouched_process():
        torch.manual_seed(state.seed)
        models = [stand_in(state.dense, present_layers(recording)) for recording in recordings]
        for path in paths:
            _chain_stages(models[1].get_submodule(path))
        profiles = timer([(model, paths) for model in models], state.example_inputs)
    before, after = ({path: sum(profile.calls.get(path, ())) for path in paths} for profile in profiles)
    logger.info("quantized layers timed: %.3f ms in floating point, %.3f in integers", *map(_total, (before, after)))
    return before, after


def _total(times: dict[str, float]) -> float:
    return sum(times.values())


def _outer_path(state: State, path: str) -> str:
    """Return the path of the factorised layer that the layer at ``path`` is inside of, or ``path`` itself."""
    inside = next(site.inside for site in state.sites() if site.path == path)
    return path if inside is None else inside


def _chain_stages(layer: nn.Module) -> None:
    stages = list(layer.stages()) if isinstance(layer, CompressedLayer) else []
    for stage in stages[:-1]:
        if isinstance(stage, IntegerLayer):
            stage.chained = True
