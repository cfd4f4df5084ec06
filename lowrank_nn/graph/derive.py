"""Models without numbers: copies on the meta device, and what a changed model would be recorded to do."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lowrank_nn.errors import PlanError
from lowrank_nn.graph.sites import Call, Recording, Site
from lowrank_nn.layers import CompressedConv2d, CompressedLayer, CompressedLinear, layer_output_shape


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy of ``model`` on the meta device; none of its parameters and buffers is copied on the way.

    Raises:
        PlanError: The model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    with torch.no_grad():
        return deep_copy(model, type(model).__name__, memo).to("meta")


def deep_copy(model: nn.Module, name: str, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return ``copy.deepcopy(model, memo)``.

    Args:
        model: The model.
        name: What the message begins with.
        memo: What stands for objects of these ids in the copy.

    Raises:
        PlanError: The model cannot be copied.
    """
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise PlanError(
            f"{name}: a copy is worked on, and copy.deepcopy(model) fails: {error}. Make the model "
            "copyable (no tensors with a graph, open files or locks among its attributes)."
        ) from error


def derive_recording(recording: Recording, model: nn.Module) -> Recording:
    """Return ``recording`` as it would be for ``model``, the same network after some layers were replaced.

    A replacement is called with the same shapes as what it replaces, and its stages one after the other; so a
    model on the meta device, or one with layers that were just swapped, needs no forward of its own. Where layers have
    lost channels, so have the shapes; products of activations count as before.

    Args:
        recording: Made from the network before.
        model: The network now; every recorded path must still be there.
    """
    sites = []
    for site in recording.sites:
        if site.inside is None:
            layer = model.get_submodule(site.path)
            now = dataclasses.replace(site, layer=layer, calls=tuple(_resized(call, layer) for call in site.calls))
            sites += [now, *_stages(now, layer)]
    return dataclasses.replace(recording, sites=tuple(sites))


def _resized(call: Call, layer: nn.Module) -> Call:
    """Return a call with the channels that the layer has now."""
    if isinstance(layer, (nn.Linear, CompressedLinear)):
        dim, inputs, outputs = -1, layer.in_features, layer.out_features
    elif isinstance(layer, (_ConvNd, CompressedConv2d)):
        dim, inputs, outputs = -1 - len(layer.kernel_size), layer.in_channels, layer.out_channels
    else:
        return call
    return Call(_with_size(call.input_shape, dim, inputs), _with_size(call.output_shape, dim, outputs))


def _with_size(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    if len(shape) < -dim or shape[dim] == size:
        return shape
    return (*shape[: len(shape) + dim], size, *shape[len(shape) + dim + 1 :])


def _stages(site: Site, layer: nn.Module) -> Iterator[Site]:
    """Yield the sites of the leaves inside a compressed layer, with the shapes they are called with."""
    if not isinstance(layer, CompressedLayer):
        return
    calls: dict[nn.Module, list[Call]] = {stage: [] for stage in layer.stages()}
    for call in site.calls:
        for stage, shape in layer.stage_calls(call.input_shape):
            calls[stage].append(Call(shape, layer_output_shape(stage, shape)))
    paths = {child: name for name, child in layer.named_modules()}
    for stage in layer.stages():
        name = paths[stage]
        yield Site(
            path=f"{site.path}.{name}" if site.path else name,
            layer=stage,
            aliases=tuple(f"{alias}.{name}" for alias in site.aliases),
            calls=tuple(calls[stage]),
            inside=site.path,
            tied_to=(),
        )
