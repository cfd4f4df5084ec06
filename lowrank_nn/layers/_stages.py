"""Calling layers one after the other, as factorised layers do with their factors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lowrank_nn.layers._integer import IntegerLayer
from lowrank_nn.layers._kernel import Kernel, kernel_for, known_shape


def run_stages(stages: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Call layers one after the other; where all run on integer kernels, those are run without calling the layers.

    Between small factors the calls would take as long as the kernels.

    Args:
        stages: Layers, each of which takes what the one before returns.
        x: Input of the first.
    """
    kernels = _kernels(stages, x)
    if not kernels:
        for stage in stages:
            x = stage(x)
        return x
    source = kernels[0][1].input_of(x)
    for (stage, kernel), (_, following) in itertools.pairwise(kernels):
        source = kernel.product(stage, source).promised(following.grid)
    stage, kernel = kernels[-1]
    return kernel.output(stage, source)


def _kernels(stages: Sequence[nn.Module], x: Tensor) -> list[tuple[IntegerLayer, Kernel]]:
    """Return ``stages`` with their kernels; none where the layers have to be called."""
    layers = [stage for stage in stages if isinstance(stage, IntegerLayer)]
    if len(layers) < len(stages):  # asked first, so that torch.fx can trace floats: what it traces with has no shape
        return []
    if torch.compiler.is_compiling() or len(known_shape(x)) != 4:
        return []
    if torch._C._len_torch_function_stack() or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return []
    kernels, shape = [], known_shape(x)
    for stage in layers:
        kernel = None if _is_watched(stage) else kernel_for(stage, x)
        if kernel is None or not (stage.chained or stage is layers[-1]):
            return []
        shape_after = kernel.output_shape(stage, shape)
        if shape_after is None:
            return []
        kernels.append((stage, kernel))
        shape = shape_after
    return kernels


def _is_watched(layer: nn.Module) -> bool:
    """Whether somebody wants to see the layer called."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
