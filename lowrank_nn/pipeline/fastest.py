"""Whether layers run faster in integers than in floating point: timed where they stand."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lowrank_nn.graph import chain_quantized, replace_module
from lowrank_nn.graph.preserve import untouched_process
from lowrank_nn.graph.stand_in import with_numbers
from lowrank_nn.graph.timing import Profile, time_in_place
from lowrank_nn.layers import CompressedLayer
from lowrank_nn.layers._integer import IntegerLayer
from lowrank_nn.pipeline.state import Decision, State, build

logger = logging.getLogger(__name__)

_CLEARLY = 0.98  # of the other time: less is within the error of the measurement
_AFTER_RELU = (0.0, 4.0)

Timer = Callable[[Sequence[tuple[nn.Module, Iterable[str]]], Any], list[Profile]]


def slower_layers(state: State, decisions: Sequence[Decision], *, timer: Timer = time_in_place) -> dict[str, str]:
    """Return, by path, why layers had better stay in floating point: they were timed and found slower in integers.

    Stand-ins are timed in turn: the model as it is, and with everything quantized that is to be. The factors of one
    layer hand integers to each other and are judged as a whole; layers take and return floats, as they have to beside
    a layer that stays. Then the model without the slower ones is timed beside one in which all layers are quantized,
    and may hand integers to each other, and beside the model as it is: the fastest is kept. What was found is kept for
    later dry runs of the same layers.

    Args:
        state: The dry run.
        decisions: What the step would do.
        timer: Times models with the layers at some paths; another one in tests.
    """
    replaced = [decision for decision in decisions if decision.layer_class is not None]
    outer = {decision.path: _outer_path(state, decision.path) for decision in replaced}
    paths = list(dict.fromkeys(outer.values()))
    key = ("fastest", *(repr(state.model.get_submodule(path)) for path in paths), *map(repr, replaced))
    if key not in state.cache:
        with untouched_process():
            torch.manual_seed(state.seed)
            state.cache[key] = _slower(_stand_ins(state, replaced), paths, state.example_inputs, timer)
    found = state.cache[key]
    return {path: found[layer] for path, layer in outer.items() if layer in found}


def _stand_ins(state: State, replaced: Sequence[Decision]) -> tuple[nn.Module, nn.Module]:
    """Return the model as it is and with everything quantized, with numbers that take as long as the right ones."""
    before = with_numbers(state.model, state.base[0]).eval()
    after = copy.deepcopy(before)
    for decision in replaced:
        layer = build(decision, after.get_submodule(decision.path), {"input_range": _AFTER_RELU})
        after = replace_module(after, decision.path, layer)
    return before, after


def _slower(
    models: tuple[nn.Module, nn.Module], paths: Sequence[str], example_inputs: Any, timer: Timer
) -> dict[str, str]:
    """Return which of the layers at ``paths`` to leave as they are in the first model, and why."""
    for path in paths:
        _chain_stages(models[1].get_submodule(path))
    profiles = timer([(model, paths) for model in models], example_inputs)
    before, after = ({path: sum(profile.calls.get(path, ())) for path in paths} for profile in profiles)
    slower = [path for path in paths if after[path] >= before[path]]
    mixed = copy.deepcopy(models[1])
    for path in slower:
        mixed = replace_module(mixed, path, models[0].get_submodule(path))
    for model in (mixed, models[1]):
        chain_quantized(model, example_inputs)
    float_time, mixed_time, integer_time = (
        profile.total for profile in timer([(model, ()) for model in (models[0], mixed, models[1])], example_inputs)
    )
    logger.info("in floating point %.3f ms, mixed %.3f ms, in integers %.3f ms", float_time, mixed_time, integer_time)
    if integer_time < _CLEARLY * min(mixed_time, float_time):
        return {}
    if float_time < _CLEARLY * mixed_time:
        text = f"the whole model is slower in integers: {mixed_time:.3f} ms, in floating point {float_time:.3f} ms"
        return dict.fromkeys(paths, text)
    return {
        path: f"slower in integers: {after[path]:.3f} ms, in floating point {before[path]:.3f} ms" for path in slower
    }


def _outer_path(state: State, path: str) -> str:
    """Return the path of the factorised layer that the layer at ``path`` is inside of, or ``path`` itself."""
    inside = next(site.inside for site in state.sites() if site.path == path)
    return path if inside is None else inside


def _chain_stages(layer: nn.Module) -> None:
    stages = list(layer.stages()) if isinstance(layer, CompressedLayer) else []
    for stage in stages[:-1]:
        if isinstance(stage, IntegerLayer):
            stage.chained = True
