"""High-bias absorption: what channels never fall below goes into the biases of the layers that read them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lowrank_nn.graph.agree import keeps_outputs, outputs_of
from lowrank_nn.graph.equalization import Channels, channels_of, refusal, with_one_group
from lowrank_nn.graph.fold import uses_of
from lowrank_nn.graph.groups import find_groups

Shift = dict[str, Tensor]
"""By path of a layer, what is added to its bias, float64."""

RAISED = 16
"""Channels are probed with values so many times as large as any that was seen."""


class Extremes(NamedTuple):
    """What a layer returned on data.

    Attributes:
        least: The smallest value of each output channel, ``(O,)``, float64.
        largest: The largest absolute value of all.
    """

    least: Tensor
    largest: float


def find_absorbable(model: nn.Module, example_inputs: Any) -> list[tuple[Channels, str]]:
    """Return the channels that one layer computes, each with why they cannot be shifted; empty where they may be."""
    uses, found = uses_of(model), []
    for group in find_groups(with_one_group(model), example_inputs):
        reason, channels = refusal(model, group, uses), channels_of(group)
        if len(channels.computed) == 1 and channels.read:
            found.append((channels, reason or _unfit(model, channels)))
    return found


def _unfit(model: nn.Module, channels: Channels) -> str:
    for place in (*channels.computed, *channels.read):
        layer = model.get_submodule(place.path)
        if isinstance(layer, _ConvTransposeNd):
            return f"{place.path} is a transposed convolution"
        if layer._parameters["bias"] is None:
            return f"{place.path} has no bias: fold batch norms first"
    padded = [place.path for place in channels.read if _pads_zeros(model.get_submodule(place.path))]
    return f"{padded[0]} pads with zeros, which no bias makes up for" if padded else ""


def _pads_zeros(layer: nn.Module) -> bool:
    if not isinstance(layer, _ConvNd) or layer.padding_mode != "zeros":
        return False
    padding: str | tuple[int, ...] = layer.padding
    return any(size > 1 for size in layer.kernel_size) if padding == "same" else padding != "valid" and any(padding)


def absorb_(
    model: nn.Module, found: Iterable[tuple[Channels, str]], extremes: Mapping[str, Extremes], inputs: Any
) -> tuple[tuple[str, ...], dict[str, str]]:
    r"""Shift channels down by what they never fall below, in place, and have the layers that read them make up for it.

    With :math:`c_i \ge 0` the least value of channel i in front of a function f with f(x) = x for x > 0, such as ReLU,

    .. math:: b^{(1)}_i - c_i, \quad b^{(2)} + \sum_i c_i \sum_{yx} W^{(2)}_{\cdot i y x}

    gives the same wherever the channel is not below c_i, and max(x, c_i) in place of f(x) elsewhere.

    Args:
        model: The model.
        found: What :func:`find_absorbable` returned.
        extremes: By path, what the layers that compute the channels returned on data; those left out stay.
        inputs: Some of these data, on which it is tried out.

    Returns:
        Paths of the layers whose channels were shifted; and of others that have channels to shift, why they stay.
    """
    trial, shifts, left = _Trial(model, inputs), dict[str, Shift](), dict[str, str]()
    for channels, reason in found:
        (place,) = channels.computed
        if place.path not in extremes:
            continue
        least, largest = extremes[place.path]
        floor = least[place.positions].amin(1).clamp(min=0)
        if floor.any():
            reason = reason or trial.refusal(channels, floor, largest)
            if reason:
                left[place.path] = reason
            else:
                shifts[place.path] = trial.shift(channels, -floor)
    together = _sum(shifts.values())
    if not trial.keeps_outputs(together):
        return (), left | dict.fromkeys(shifts, "the model's outputs would change")
    _shift_(model, together)
    return tuple(shifts), left


class _Trial:
    """Tells whether the outputs of a model stay the same when its channels are shifted."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self._model, self._one_group, self._inputs = model, with_one_group(model), inputs
        self._expected = outputs_of(model, inputs)

    def refusal(self, channels: Channels, floor: Tensor, largest: float) -> str:
        """Return why channels cannot be shifted by ``floor``; empty where they can."""
        raised = RAISED * largest * (floor > 0).double()
        if not all(self.keeps_outputs(self.shift(channels, by)) for by in (raised, -floor)):
            return "something on the way, such as a bound or padding, does not leave positive values as they are"
        if self.keeps_outputs(self.shift(dataclasses.replace(channels, read=()), raised)):
            return "the outputs do not depend on them"
        return ""

    def keeps_outputs(self, shift: Shift) -> bool:
        """Whether the outputs stay the same; the model is left as it was."""
        with _shifted(self._model, shift):
            return keeps_outputs(self._model, self._inputs, self._expected)

    def shift(self, channels: Channels, by: Tensor) -> Shift:
        """Return what adds ``by`` to the biases that compute channels, and makes up for it in those that read them."""
        parts: list[Shift] = []
        for place in channels.computed:
            bias = torch.zeros(self._weight(place.path).shape[0], dtype=torch.float64, device="cpu")
            bias[place.positions] = by[:, None]
            parts.append({place.path: bias})
        for place in channels.read:
            weight = self._weight(place.path)
            columns = weight.reshape(*weight.shape[:2], -1).sum(2)[:, place.positions].sum(2)
            parts.append({place.path: -columns @ by})
        return _sum(parts)

    def _weight(self, path: str) -> Tensor:
        return self._one_group.get_parameter(f"{path}.weight").detach().double().cpu()


def _sum(shifts: Iterable[Shift]) -> Shift:
    total: Shift = {}
    for shift in shifts:
        for path, values in shift.items():
            total[path] = total[path] + values if path in total else values
    return total


@torch.no_grad()
def _shift_(model: nn.Module, shift: Shift) -> None:
    for path, values in shift.items():
        bias = model.get_parameter(f"{path}.bias")
        bias.copy_(bias + values.to(bias.device))


@contextlib.contextmanager
def _shifted(model: nn.Module, shift: Shift) -> Iterator[None]:
    """Run a block with the biases shifted, then put the old ones back."""
    kept = {path: model.get_parameter(f"{path}.bias").detach().clone() for path in shift}
    try:
        _shift_(model, shift)
        yield
    finally:
        with torch.no_grad():
            for path, values in kept.items():
                model.get_parameter(f"{path}.bias").copy_(values)
