"""Weights multiplied by a factor for each channel that they compute or read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

Rescaling = dict[str, dict[int, Tensor]]
"""By path of a layer and dim of its weight, as it would be with ``groups=1``: a factor per position, float64."""


@torch.no_grad()
def rescale_(model: nn.Module, rescaling: Rescaling) -> None:
    """Multiply weights, and biases like the output channels, in place."""
    for path, factors in rescaling.items():
        layer = model.get_submodule(path)
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        assert weight is not None
        weight.copy_(rescaled_weight(layer, weight, factors))
        out = factors.get(1 if isinstance(layer, _ConvTransposeNd) else 0)
        if bias is not None and out is not None:
            bias.copy_(bias * out.repeat(bias.numel() // out.numel()).to(bias.device))


def rescaled_weight(layer: nn.Module, weight: Tensor, factors: dict[int, Tensor]) -> Tensor:
    """Return ``weight``, of the form of the layer's own, times the factors of its channels, float64."""
    groups = 1 if isinstance(layer, (nn.Linear, _ConvTransposeNd)) else int(layer.groups)  # type: ignore[arg-type]
    weight = weight.detach().double()
    for dim, factor in factors.items():
        spread = factor.to(weight.device)
        if dim == 0:
            spread = spread[:, None]
        elif groups > 1:  # each group of rows reads channels of its own
            spread = spread.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
        else:
            spread = spread[None]
        weight = weight * spread.reshape(*spread.shape, *[1] * (weight.dim() - 2))
    return weight


@contextlib.contextmanager
def rescaled(model: nn.Module, rescaling: Rescaling) -> Iterator[None]:
    """Run a block with the weights multiplied, then put the old ones back."""
    parameters = [p for path in rescaling for p in model.get_submodule(path).parameters(recurse=False)]
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        rescale_(model, rescaling)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, kept, strict=True):
                parameter.copy_(values)


def merged(several: Iterable[Rescaling]) -> Rescaling:
    """Return the rescaling that is one after the other."""
    together: Rescaling = {}
    for rescaling in several:
        for path, factors in rescaling.items():
            known = together.setdefault(path, {})
            for dim, factor in factors.items():
                known[dim] = known[dim] * factor if dim in known else factor
    return together
