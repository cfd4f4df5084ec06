"""A compressed layer in a few words."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowrank_nn.layers import CompressedLayer


def describe(layer: nn.Module) -> tuple[str, str]:
    """Return what a layer is and with which options: ``("TuckerConv2d + QuantConv2d", "rank=(8, 4), bits=8")``.

    The classes of the leaves inside are joined with a plus; options that all leaves of a class share are shown once,
    others as a range. Constructor arguments of the dense layer are left out.
    """
    if not isinstance(layer, CompressedLayer):
        return type(layer).__name__, ""
    names, options = [type(layer).__name__], _own_options(layer)
    groups: dict[str, list[dict[str, Any]]] = {}
    for stage in layer.stages():
        if isinstance(stage, CompressedLayer):
            groups.setdefault(type(stage).__name__, []).append(_own_options(stage))
    for name, settings in groups.items():
        names.append(name)
        for key in settings[0]:
            values = [setting[key] for setting in settings if key in setting]
            options.setdefault(key, values[0] if all(v == values[0] for v in values) else _span(values))
    return " + ".join(names), ", ".join(f"{key}={_short(value)}" for key, value in options.items())


def _own_options(layer: CompressedLayer) -> dict[str, Any]:
    """The options that the dense layer does not have and that are not at rest (None, False)."""
    dense = layer.dense_arguments()
    return {k: v for k, v in layer.config().items() if k not in dense and v is not None and v is not False}


def _span(values: list[Any]) -> str:
    ordered = sorted(values, key=str)
    return f"{_short(ordered[0])}..{_short(ordered[-1])}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
