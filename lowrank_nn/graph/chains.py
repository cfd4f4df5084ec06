"""Which quantized layers hand their output on as integers: found by trying."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowrank_nn.graph.inputs import call_model, tensors
from lowrank_nn.graph.preserve import untouched
from lowrank_nn.layers._deferred import Deferred, rounded_tensors
from lowrank_nn.layers._deferred_sources import Weight
from lowrank_nn.layers._integer import IntegerLayer
from lowrank_nn.layers._kernel import packed_weight


def chain_quantized(model: nn.Module, example_inputs: Any) -> tuple[str, ...]:
    """Let quantized layers hand their outputs to each other as integers, in place, where nobody else sees them.

    What stands between them (ReLU, ReLU6, hardswish, SiLU, max-pooling, the addition of a shortcut, concatenation,
    dropout in eval mode) is then computed in integers too or by the kernel of the layer before. A layer is chained
    unless the model returns its output, or computes with floats of it after another layer took it as integers. What the
    model does in another forward changes how fast it is, not what it computes: a shortcut that is added is rounded to
    the grid of the layer beside it, and everything else is as without chains, up to single steps at ties.

    Args:
        model: A model whose layers were quantized, weights and inputs; only their ``chained`` flags are changed.
        example_inputs: What it is called with; see :func:`lowrank_nn.graph.call_model`.

    Returns:
        Paths of the layers that are chained now.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, IntegerLayer)}
    chained = {path for path, layer in layers.items() if packed_weight(layer) is not None}
    with untouched(model):
        for module in model.modules():
            vars(module).update(training=False)
        while True:
            for path, layer in layers.items():
                layer.chained = path in chained
            exposed = _exposed(model, example_inputs)
            left = {path for path in chained if packed_weight(layers[path]) not in exposed}
            if left == chained:
                break
            chained = left
    for path, layer in layers.items():
        layer.chained = path in chained
    return tuple(path for path in layers if path in chained)


def _exposed(model: nn.Module, example_inputs: Any) -> set[Weight]:
    """Run the model and return the weights whose outputs it returned, or used as floats after they were rounded."""
    with rounded_tensors() as makers, torch.no_grad():
        output = call_model(model, example_inputs)
        for tensor in tensors(output):
            if isinstance(tensor, Deferred):
                makers.update(tensor.source.makers)
    return makers
