"""Checks of layers fitted under a metric: what a change of the weight does to the layer's own outputs."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.decompose import Metric
from lowrank_nn.layers import CompressedLayer
from lowrank_nn.testing._tools import (
    TOLERANCE,
    bias_of,
    built,
    compress,
    dense_output,
    expect,
    expect_close,
    options_for,
)
from lowrank_nn.testing.cases import Case

_CANCELLATION = 1e-14  # what rounding leaves of a difference of squares in float64


def check_fit_under_a_metric(cls: type[CompressedLayer], case: Case) -> None:
    """Under the metric of its inputs a layer that takes one errs as the metric says, and no more than without."""
    if not _takes_a_metric(cls):
        return
    dense, metric = case.layer(), input_metric(case)
    layer = compress(cls, dense, options_for(cls, case, dense) | {"metric": metric})
    wide, dense_wide, x = copy.deepcopy(layer).double(), case.layer().double(), _input(case)
    with torch.no_grad():
        # Inputs that the layer rounds are left as they are: the metric knows of weights only.
        expected, output = dense_wide(x), dense_output(case, x, wide.dense_weight(), bias_of(wide))
    outputs = expected.numel() // dense.get_parameter("weight").shape[0]
    measured = float((output - expected).square().sum()) / outputs
    energy = float(expected.square().sum()) / outputs
    # A bias takes up the change of the mean output; without one that change is part of the error.
    seen = metric if bias_of(dense) is not None else metric.with_mean()
    error, error_without = (
        seen.error(dense_wide.get_parameter("weight") - other.dense_weight())
        for other in (wide, built(cls, case).double())
    )
    # In the metric products as large as this cancel, even where the outputs are small.
    raw = metric.with_mean().covariance.diagonal(dim1=1, dim2=2)
    largest = float(dense_wide.get_parameter("weight").detach().square().sum() * raw.sum())
    rounding = TOLERANCE[case.dtype] ** 2 * energy + _CANCELLATION * largest
    expect(
        abs(measured - error) <= 1e-6 * error + rounding,
        f"the mean squared error of the outputs is {measured:.6g}, the metric says {error:.6g}",
    )
    expect(
        error <= (1 + 1e-4) * error_without + rounding,
        f"the error under the metric is {error:.6g}, without fitting under it {error_without:.6g}",
    )


def check_lossless_under_a_metric(cls: type[CompressedLayer], case: Case) -> None:
    """Under a metric too a layer's ``lossless_options``, if it has any, lose nothing, and the meta device works."""
    if not _takes_a_metric(cls):
        return
    dense, metric = case.layer(), input_metric(case)
    lossless = cls.lossless_options(dense)
    if lossless is not None:
        layer = compress(cls, dense, lossless | {"metric": metric})
        weight, tolerance = dense.get_parameter("weight"), TOLERANCE[case.dtype]
        expect_close(layer.dense_weight(), weight, tolerance, "lossless dense_weight() under a metric")
    for chosen in (lossless, options_for(cls, case, dense)):
        if chosen is None:
            continue
        shadow = compress(cls, case.layer().to("meta"), chosen | {"metric": metric})
        devices = {tensor.device.type for tensor in (*shadow.parameters(), *shadow.buffers())}
        expect(devices == {"meta"}, f"tensors are on {sorted(devices)}, expected meta")


def _takes_a_metric(cls: type[CompressedLayer]) -> bool:
    return "metric" in inspect.signature(cls.from_pretrained_layer).parameters


def input_metric(case: Case) -> Metric:
    """Return the metric of the case's input: the layer's mean squared output error over all its positions."""
    patches = _patches(case.layer(), _input(case, batched=True))
    mean = patches.mean(1)
    centred = patches - mean[:, None]
    return Metric(centred.mT @ centred / patches.shape[1], mean)


def _input(case: Case, *, batched: bool = False) -> Tensor:
    """Return the case's input in float64, about a mean that a layer without bias has to see."""
    return case.input(batched=batched).double() + 1


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what each output of ``layer`` is computed from, (groups, positions, p), in the order of the weight."""
    if not isinstance(layer, nn.Conv2d):
        return x.flatten(0, -2)[None]
    # One output channel for each tap of each input channel: torch itself says which inputs the taps meet.
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    geometry: dict[str, Any] = {
        name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    channels = layer.in_channels
    reader = nn.Conv2d(channels, channels * taps, groups=channels, bias=False, device="meta", dtype=x.dtype, **geometry)
    reader = reader.to_empty(device=x.device)
    with torch.no_grad():
        reader.weight.copy_(torch.eye(taps, device="cpu").repeat(channels, 1).view_as(reader.weight))
        read: Tensor = reader(x)
    return read.reshape(len(x), layer.groups, -1, read[0, 0].numel()).permute(1, 0, 3, 2).flatten(1, 2)
