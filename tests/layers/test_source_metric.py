"""Metrics that are handed to layers by hand."""

import pytest
import torch
from torch import nn

from lowrank_nn import LAYERS, LowRankLayer, OptionError, Params
from lowrank_nn.decompose import Metric
from lowrank_nn.layers._quantized import QuantLayer

LINEAR, CONV = nn.Linear(8, 6), nn.Conv2d(8, 6, 3, groups=2)


def metric(groups=1, inputs=8, outputs=6, value=1.0):
    eye = value * torch.eye(inputs, dtype=torch.float64).expand(groups, -1, -1)
    return Metric(eye, eye.new_zeros(groups, inputs), torch.eye(outputs, dtype=torch.float64).expand(groups, -1, -1))


@pytest.mark.parametrize(
    "wrong",
    [metric(inputs=9), metric(outputs=5), metric(groups=2), metric(value=torch.nan), torch.eye(8), "weighted"],
    ids=["inputs", "outputs", "groups", "not finite", "no metric", "text"],
)
@pytest.mark.parametrize("cls", [cls for cls in LAYERS.values() if issubclass(cls, (LowRankLayer, QuantLayer))])
def test_metrics_of_other_layers_are_refused(cls, wrong):
    conv = issubclass(cls.replaces, nn.Conv2d)
    layer = nn.Conv2d(8, 6, 3) if conv else LINEAR
    options = {"rank": Params(0.9)} if issubclass(cls, LowRankLayer) else {}
    inputs = 72 if conv else 8
    with pytest.raises(OptionError, match=f"of 1 groups with 6 outputs and {inputs} inputs each. Collect it"):
        cls.from_pretrained_layer(layer, metric=wrong, **options)


def test_groups():
    fitted = LAYERS["SVDConv2d"].from_pretrained_layer(CONV, rank=1, metric=metric(groups=2, inputs=36, outputs=3))
    assert fitted.dense_weight().shape == CONV.weight.shape
