"""Layers on kernels of their own (int8, bfloat16): wrong inputs are refused as by torch; threads do not mix."""

import re

import pytest
import torch
from torch import nn

from lowrank_nn.layers import BFloat16Conv2d, BFloat16Linear, QuantConv2d, QuantLinear, TuckerConv2d
from tests.layers.geometries import dense_conv

MAPS = [(2, 3, 7, 7), (4, 7), (1, 2, 4, 7, 7), (2, 4, 2, 9), (2, 4, 7, 2)]
ROWS = [(2, 11), (), (2, 24), (12, 1)]


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_integers(dense, *, chained=False):
    conv = isinstance(dense, nn.Conv2d)
    x = randn(2, dense.in_channels, 7, 7) if conv else randn(2, dense.in_features)
    layer = (QuantConv2d if conv else QuantLinear).from_pretrained_layer(dense, inputs=x, activation_bits=7)
    layer.chained = chained
    return layer


def in_bfloat16(dense):
    return (BFloat16Conv2d if isinstance(dense, nn.Conv2d) else BFloat16Linear).from_pretrained_layer(dense)


def chained(dense):
    return in_integers(dense, chained=True)


@pytest.mark.parametrize("make", [in_integers, chained, in_bfloat16])
@pytest.mark.parametrize("shape", MAPS + ROWS, ids=str)
def test_wrong_shapes_are_refused_at_once_and_as_torch_refuses_them(shape, make):
    dense = dense_conv(torch.float32, kernel_size=3) if shape in MAPS else nn.Linear(12, 6)
    layer = make(dense.eval())
    with torch.no_grad():
        with pytest.raises(RuntimeError) as expected:
            dense(randn(*shape))
        with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
            layer(randn(*shape))


@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_wrong_shapes_are_refused_at_once_by_factors_that_run_without_calls(shape):
    tucker = TuckerConv2d.from_pretrained_layer(dense_conv(torch.float32, kernel_size=3), rank=(2, 2)).eval()
    for name in ("reduce", "core", "expand"):
        setattr(tucker, name, in_integers(getattr(tucker, name), chained=True))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"channels|[Ii]nput"):
        tucker(randn(*shape))


def test_a_thread_that_calls_with_another_shape_meanwhile_changes_nothing(monkeypatch):
    small, large = randn(1, 4, 6, 6), randn(2, 4, 9, 8)
    layer = in_integers(dense_conv(torch.float32, kernel_size=3).eval())
    plain, meanwhile = QuantConv2d.output_shape, [large]

    def interrupted(self, shape):
        while meanwhile:
            layer(meanwhile.pop())
        return plain(self, shape)

    monkeypatch.setattr(QuantConv2d, "output_shape", interrupted)
    with torch.no_grad():
        torch.testing.assert_close(layer(small), layer.simulate(small), rtol=1e-5, atol=1e-5)
        meanwhile.append(small)
        torch.testing.assert_close(layer(large), layer.simulate(large), rtol=1e-5, atol=1e-5)
