"""A model that takes as long as a compressed one, without the work of compressing: for timing."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.graph.surgery import named_tensors
from lowrank_nn.graph.swap import replace_module
from lowrank_nn.layers import CompressedLayer
from lowrank_nn.layers._packed import is_channels_last


def stand_in(dense: nn.Module, replaced: Mapping[str, CompressedLayer]) -> nn.Module:
    """Return a copy of ``dense`` with other layers in some places, their weights drawn at random.

    The copy shares the parameters of ``dense``. Draws from torch's global random numbers.

    Args:
        dense: The model with its weights; not changed.
        replaced: By path, layers on the meta device that are to stand there.
    """
    parameters = {id(parameter): parameter for parameter in dense.parameters()}
    model = copy.deepcopy(dense, dict(parameters))
    for path, layer in replaced.items():
        model = replace_module(model, path, _with_values(layer, dense.get_submodule(path)))
    return model


@torch.no_grad()
def with_numbers(bare: nn.Module, given: nn.Module, *, fit: bool = True) -> nn.Module:
    """Return a copy of ``bare``, with numbers as far as they are known without data.

    Tensors come from ``given`` where it has one of that name and shape, and compressed layers are made anew from the
    weight that stands in their place there. Of what is left, parameters (the bias of a layer that took up a norm) are
    zero, and buffers (masks, steps between integers) one, unless they follow from the layer's configuration.

    Args:
        bare: The model without numbers: ``given`` after steps of a recipe, on the meta device.
        given: The model with numbers; not changed, and it shares no memory with the copy.
        fit: Whether compressed layers are fitted to these weights, which takes time, or filled at random.
    """
    known = named_tensors(given)
    device = next((tensor.device for tensor in known.values()), torch.device("cpu"))
    memo: dict[int, Any] = {}
    made: set[str] = set()
    for name, tensor in named_tensors(bare).items():
        value = known.get(name)
        if value is None or value.shape != tensor.shape:
            made.add(name)
            value = torch.full_like(tensor, not isinstance(tensor, nn.Parameter), device=device)
        filled: Tensor = value.detach().clone()
        if isinstance(tensor, nn.Parameter):
            filled = nn.Parameter(filled, requires_grad=tensor.requires_grad)
        memo.setdefault(id(tensor), filled)
    model = copy.deepcopy(bare, memo)
    for path, layer in model.named_modules():
        if isinstance(layer, CompressedLayer) and any(_is_inside(name, path) for name in made):
            _make_from(layer, given, path, fit)
    return model


def _is_inside(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def _make_from(layer: CompressedLayer, given: nn.Module, path: str, fit: bool) -> None:
    """Fill a compressed layer from the layer that stands in its place, and a part of another one at random."""
    layer.fill_buffers()
    layer.reset_parameters()
    source = dict(given.named_modules(remove_duplicate=False)).get(path)
    if source is None or not fit:
        return
    weight, bias = source.weight, source.bias
    assert isinstance(weight, Tensor)
    layer.approximate_(weight)
    if isinstance(bias, Tensor) and isinstance(layer.bias, Tensor):
        layer.bias.copy_(bias)


@torch.no_grad()
def _with_values(layer: CompressedLayer, dense: nn.Module) -> CompressedLayer:
    """Return a copy of ``layer`` on the device of ``dense``, in its memory format, with outputs of the same size."""
    weight = dense.weight
    assert isinstance(weight, Tensor)
    new = copy.deepcopy(layer).to_empty(device=weight.device)
    for buffer in new.buffers():
        buffer.fill_(True)  # masks keep everything, scales and zero points are one
    for module in new.modules():  # the layer first, then the leaves inside it that are compressed themselves
        if isinstance(module, CompressedLayer):
            module.fill_buffers()
            module.reset_parameters()
    # With torch's default weights activations may shrink from layer to layer until they are denormal, which is slow.
    *_, last = [new, *new.stages()]
    scale = float(weight.float().std(correction=0)) * math.sqrt(3 * max(1, weight[0].numel()))
    own = last._parameters.get("weight")
    if own is not None:
        own.mul_(scale)
    if is_channels_last(weight):
        new.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return new
