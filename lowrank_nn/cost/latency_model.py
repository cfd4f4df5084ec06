"""What a call of a convolution or linear layer takes: timings of such calls, and a formula fitted to them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from lowrank_nn.cost._dense import conv_output_size

Floats = NDArray[np.float64]

_SMALL_INPUT = 20480  # torch's own limit: single images up to this many scalars are convolved outside of oneDNN
_TERMS = 5
_FEW = 5  # timings of one kind of call that a fit of its own needs
_REWEIGHTS = 8
_REACH = 0.5  # distance, on a log scale of channels and positions, over which a timing tells about its neighbours
_DOUBT = 0.3  # weight of the formula itself against that of the neighbours
_LEAST = 1e-4  # milliseconds; below any call


@dataclasses.dataclass(frozen=True)
class LeafCall:
    """One call of a convolution or linear layer, as the latency model sees it.

    Attributes:
        key: Names the layer, its options and its input: equal keys take equal time.
        kind: Calls that run the same kind of kernel and share coefficients: a name, or several with commas between
            them, the most general first.
        work: Amounts of work that take time: the call itself, multiply-accumulates with the output channels padded to
            the vector width, weights, activations read and written, entries of the unfolded input.
        place: Logarithms of the input channels per group, the output channels, the positions and the taps.
    """

    key: str
    kind: str
    work: tuple[float, ...]
    place: tuple[float, ...]


def leaf_call(key: str, layer: Mapping[str, Any], input_shape: Sequence[int], width: int) -> LeafCall:
    """Describe a call of one of torch's convolutions or recurrent layers, an ``nn.Linear`` or a layer in their place.

    Args:
        key: See :class:`LeafCall`.
        layer: Constructor arguments of the dense layer; of a recurrent one also the number of its ``gates``.
        input_shape: Shape of its input, batched or not.
        width: Number of output channels that are computed together; see :func:`vector_width`.
    """
    if "in_features" in layer:
        positions = math.prod(input_shape[:-1])
        return _call(key, "linear", width, positions, layer["in_features"], layer["out_features"])
    if "hidden_size" in layer:
        return _recurrent_call(key, layer, math.prod(input_shape[:-1]), width)
    kernel, groups, size = layer["kernel_size"], layer["groups"], input_shape[-len(layer["kernel_size"]) :]
    batch, taps = math.prod(input_shape[: -len(kernel) - 1]), math.prod(kernel)
    kind = "pointwise" if taps == 1 else "depthwise" if groups == layer["in_channels"] else "spatial"
    written = 1  # outputs of a channel for every position at which all taps are multiplied
    if layer.get("transposed"):
        kind, written = f"{kind}, transposed", math.prod(layer["stride"])
    else:
        size = conv_output_size(size, kernel, layer["stride"], layer["padding"], layer["dilation"])
        small = batch == 1 and groups == 1 and max(kernel) <= 3 and math.prod(input_shape) <= _SMALL_INPUT
        kind = f"{kind}, {len(kernel)}d" if len(kernel) != 2 else f"{kind}, small" if small else kind
    return _call(
        key,
        kind,
        width,
        batch * math.prod(size),
        layer["in_channels"],
        layer["out_channels"],
        taps=taps,
        groups=groups,
        inputs=math.prod(input_shape),
        written=written,
    )


def _recurrent_call(key: str, layer: Mapping[str, Any], positions: int, width: int) -> LeafCall:
    """Describe all layers as one: from what they read at a step, inputs and states, to the gates of both directions."""
    layers, directions = layer.get("num_layers", 1), 2 if layer.get("bidirectional") else 1
    state = layer.get("proj_size") or layer["hidden_size"]
    read = layer["input_size"] + (layers - 1) * directions * state + layers * state
    return _call(key, "recurrent", width, positions, read, directions * layer["gates"] * layer["hidden_size"])


def between_stages(key: str) -> LeafCall:
    """Describe what a layer of several stages adds to them: the calls themselves, padding."""
    return LeafCall(key, "between stages", (1.0, *(0.0,) * (_TERMS - 1)), (0.0,) * 4)


def _call(
    key: str,
    kind: str,
    width: int,
    positions: int,
    channels: int,
    out: int,
    *,
    taps: int = 1,
    groups: int = 1,
    inputs: int | None = None,
    written: int = 1,
) -> LeafCall:
    inner, outer = channels // groups, out // groups
    padded = outer if inner == 1 else -(-outer // width) * width  # depthwise kernels vectorise over the groups
    inputs = positions * channels if inputs is None else inputs
    work = (
        1.0,
        float(positions * groups * padded * inner * taps),
        float(out * inner * taps),
        float(inputs + positions * out * written),
        float(positions * channels * taps) if taps > 1 else 0.0,
    )
    place = tuple(math.log(max(1, amount)) for amount in (inner, out, positions, taps))
    return LeafCall(key, kind, work, place)


def vector_width(device: torch.device) -> int:
    """Return the number of float32 channels that convolution kernels compute together on ``device``.

    That is 16 with AVX-512 (channels are laid out in blocks of 16) and 8 elsewhere: AVX2, and tensor cores.
    """
    return 16 if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


class LatencyModel:
    r"""Milliseconds of calls: as timed where they were, by formula in between.

    t = c_0 + c_1 (padded MACs) + c_2 (weights) + c_3 (activations) + c_4 (unfolded inputs), with coefficients
    :math:`c \ge 0` for each kind of call, which minimise the sum of the relative errors. A kind with few timings takes
    the coefficients of the more general one, times a factor. Next to timed calls the formula is corrected by their
    residuals, averaged with a Gaussian weight over the logarithms of channels and positions.

    Args:
        timings: Measured milliseconds of calls.

    Attributes:
        median_error: Median relative error of the formula, uncorrected, over the timings.
    """

    def __init__(self, timings: Mapping[LeafCall, float]) -> None:
        self._exact = {call.key: time for call, time in timings.items()}
        self._coefficients: dict[str, Floats] = {}
        self._neighbours: dict[str, tuple[Floats, Floats]] = {}
        errors: list[float] = []
        for kind in sorted({name for call in timings for name in _names(call.kind)}):  # general ones first
            exact = {call: time for call, time in timings.items() if call.kind == kind}
            own = exact or {call: time for call, time in timings.items() if kind in _names(call.kind)}
            self._coefficients[kind] = self._fit(kind, own)
            residuals = np.log(self._over_formula(own))
            self._neighbours[kind] = np.array([call.place for call in own]), residuals
            errors += list(np.abs(np.expm1(-residuals))) if exact else []
        self.median_error = float(np.median(errors)) if errors else math.nan
        self.milliseconds = functools.cache(self._milliseconds)

    def _milliseconds(self, call: LeafCall) -> float:
        if call.key in self._exact:
            return self._exact[call.key]
        return self._formula(call) * math.exp(self._correction(call))

    def _formula(self, call: LeafCall) -> float:
        coefficients = self._of_kind(self._coefficients, call.kind)
        return _LEAST if coefficients is None else max(_LEAST, float(np.dot(coefficients, call.work)))

    def _correction(self, call: LeafCall) -> float:
        """Return the mean log residual of the timed calls around this one, drawn to zero where there are few."""
        neighbours = self._of_kind(self._neighbours, call.kind)
        if neighbours is None:
            return 0.0
        places, residuals = neighbours
        distances = np.square(places - call.place).sum(axis=1)
        weights = np.exp(-distances / (2 * _REACH**2))
        return float(weights @ residuals / (weights.sum() + _DOUBT))

    def _fit(self, kind: str, timings: Mapping[LeafCall, float]) -> Floats:
        """Return coefficients for these calls; where they are few, those of a more general kind times a factor."""
        general = self._of_kind(self._coefficients, kind)
        if len(timings) >= _FEW or general is None:
            return _fit(timings)
        coefficients: Floats = general * np.median(self._over_formula(timings))
        return coefficients

    def _over_formula(self, timings: Mapping[LeafCall, float]) -> Floats:
        return np.array([time / self._formula(call) for call, time in timings.items()])

    @staticmethod
    def _of_kind(table: Mapping[str, Any], kind: str) -> Any:
        """Return the entry of the most special name of ``kind`` that has one."""
        return next((table[name] for name in reversed(_names(kind)) if name in table), None)


def _names(kind: str) -> list[str]:
    """Return the names of a kind, from any call at all to itself."""
    parts = kind.split(", ") if kind else []
    return [", ".join(parts[:length]) for length in range(len(parts) + 1)]


def _fit(timings: Mapping[LeafCall, float]) -> Floats:
    """Return the non-negative coefficients with the least sum of relative errors (iteratively reweighted squares)."""
    work, times = np.array([call.work for call in timings]), np.array(list(timings.values()))
    scale = np.maximum(work.max(axis=0), 1e-300)
    relative = work / scale / times[:, None]
    weights = np.ones(len(times))
    for _ in range(_REWEIGHTS):
        solution, _ = nnls(relative * weights[:, None], weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(relative @ solution - 1), 0.02))
    coefficients: Floats = solution / scale
    return coefficients
