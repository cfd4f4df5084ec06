"""At full rank every low-rank format of a convolution computes what the dense layer does, whatever its geometry."""

import pytest
import torch
from torch import nn

from lowrank_nn.layers import LAYERS, CPConv2d, LowRankLayer, TuckerConv2d, read_layer
from tests.layers.geometries import AWKWARD, dense_conv, largest_difference

CLASSES = [cls for cls in LAYERS.values() if issubclass(cls, LowRankLayer) and cls.replaces is nn.Conv2d]
FORMATS = [(cls, options) for cls in CLASSES for options in cls.formats] + [(CPConv2d, {"factors": 4})]
NAMES = [" ".join([cls.__name__, *map(str, options.values())]) for cls, options in FORMATS]


def full_ranks(cls, limits):
    if cls is TuckerConv2d:
        return [limits, (limits[0], None), (None, limits[1])]
    return [limits if len(limits) > 1 else limits[0]]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("cls", "options"), FORMATS, ids=NAMES)
@pytest.mark.parametrize("name", AWKWARD)
def test_full_rank_is_the_dense_layer(name, cls, options):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        dense = dense_conv(dtype, **AWKWARD[name])
        limits = cls.rank_problem(read_layer(dense, cls), **options).limits
        for rank in full_ranks(cls, limits):
            compressed = cls.from_pretrained_layer(dense, rank=rank, **options)
            assert largest_difference(compressed, dense) < tolerance
            assert largest_difference(compressed, dense, batched=False) < tolerance
