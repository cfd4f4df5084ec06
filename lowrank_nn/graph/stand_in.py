"""A model that takes as long as a compressed one, without the work of compressing: for timing."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowrank_nn.graph.swap import replace_module
from lowrank_nn.layers import CompressedLayer


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
def _with_values(layer: CompressedLayer, dense: nn.Module) -> CompressedLayer:
    """Return a copy of ``layer`` on the device of ``dense``, in its memory format, with outputs of the same size."""
    weight = dense.weight
    assert isinstance(weight, Tensor)
    new = copy.deepcopy(layer).to_empty(device=weight.device)
    for buffer in new.buffers():
        buffer.fill_(True)  # masks keep everything, scales and zero points are one
    for module in new.modules():  # the layer first, then the leaves inside it that are compressed themselves
        if isinstance(module, CompressedLayer):
            module.reset_parameters()
    # With torch's default weights activations may shrink from layer to layer until they are denormal, which is slow.
    *_, last = [new, *new.stages()]
    scale = float(weight.float().std(correction=0)) * math.sqrt(3 * max(1, weight[0].numel()))
    own = last._parameters.get("weight")
    if own is not None:
        own.mul_(scale)
    if weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        new.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return new
