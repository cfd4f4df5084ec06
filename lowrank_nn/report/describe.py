"""A compressed layer in a few words."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowrank_nn.layers import CompressedLayer

_SHORT = {"activation_bits": "act", "granularity": "unit"}


def describe(layer: nn.Module) -> tuple[str, str]:
    """Return what a layer is and its main options: ``("TuckerConv2d+QuantConv2d", "rank=(8, 4) bits=8")``.

    The classes of the leaves inside are joined with a plus. An option on which the leaves differ is shown from the
    smallest to the largest.
    """
    if not isinstance(layer, CompressedLayer):
        return type(layer).__name__, ""
    names = [type(layer).__name__]
    options = {name: [value] for name, value in _main_options(layer).items()}
    for stage in layer.stages():
        if isinstance(stage, CompressedLayer):
            if type(stage).__name__ not in names:
                names.append(type(stage).__name__)
            for name, value in _main_options(stage).items():
                options.setdefault(name, []).append(value)
    shown = (f"{_SHORT.get(name, name)}={_span(values)}" for name, values in options.items())
    return "+".join(names), " ".join(shown)


_SIZES = {
    "in": ("in_channels", "in_features", "input_size"),
    "out": ("out_channels", "out_features"),
    "hidden": ("hidden_size",),
}
"""Attributes that say how many channels a layer of torch has."""


def describe_size(before: nn.Module, after: nn.Module) -> str:
    """Return how many channels are left of how many, ``"in=12/16 out=24/32"``; empty where all are."""
    sizes = []
    for name, attributes in _SIZES.items():
        for attribute in attributes:
            old, new = vars(before).get(attribute), vars(after).get(attribute)
            if old != new and old is not None:
                sizes.append(f"{name}={new}/{old}")
    return " ".join(sizes)


def _main_options(layer: CompressedLayer) -> dict[str, Any]:
    options = {name: getattr(layer, name) for name in layer.main_options}
    return {name: value for name, value in options.items() if value is not None}


def _span(values: list[Any]) -> str:
    numbers = all(isinstance(value, (int, float)) for value in values)
    ordered = sorted(values, key=None if numbers else str)
    first, last = _short(ordered[0]), _short(ordered[-1])
    return first if first == last else f"{first}..{last}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
