"""Convolution arguments, awkward and random, that the tests of the formats share."""

import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_nn.layers import read_layer
from lowrank_nn.layers._rank_problem import Positions

AWKWARD = {
    "uneven stride and padding": {"kernel_size": 3, "stride": (2, 1), "padding": (1, 2)},
    "same, dilated": {"kernel_size": 3, "padding": "same", "dilation": (2, 1)},
    "same, even kernel": {"kernel_size": (4, 2), "padding": "same"},
    "valid": {"kernel_size": (2, 4), "padding": "valid", "stride": (1, 3)},
    "circular": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
    "circular, same": {"kernel_size": (3, 2), "padding": "same", "padding_mode": "circular"},
    "reflect": {"kernel_size": (3, 5), "padding": (1, 3), "padding_mode": "reflect", "stride": (1, 2)},
    "replicate": {"kernel_size": 3, "padding": (3, 1), "padding_mode": "replicate", "dilation": 2},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "1 x 1": {"kernel_size": 1, "stride": 2},
    "1 x 1, padded": {"kernel_size": 1, "padding": 1},
    "row": {"kernel_size": (1, 5), "padding": (0, 2)},
    "no bias": {"kernel_size": (5, 3), "bias": False},
}


def dense_conv(dtype=torch.float64, in_channels=4, out_channels=8, **arguments):
    """A convolution with random weights, the same every time."""
    layer = nn.Conv2d(in_channels, out_channels, **arguments, device="meta", dtype=dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def largest_difference(compressed, dense, *, batched=True):
    """Relative Frobenius distance of the outputs of two layers on one random input."""
    shape = (2, dense.in_channels, 11, 9) if batched else (dense.in_channels, 11, 9)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dense.weight.dtype)
    with torch.no_grad():
        expected = dense(x)
        output = compressed(x)
    assert output.shape == expected.shape
    return float((output - expected).norm() / expected.norm())


@st.composite
def convolutions(draw):
    """A convolution without bias, of any geometry, and the shape of an input for it."""
    groups = draw(st.integers(1, 3))
    size = st.integers(1, 4)
    kernel_size = draw(st.tuples(size, size))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 3), st.integers(0, 3))))
    stride = (1, 1) if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    layer = dense_conv(
        in_channels=groups * draw(st.integers(1, 5)),
        out_channels=groups * draw(st.integers(1, 6)),
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        groups=groups,
        bias=False,
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    return layer, (*batch, layer.in_channels, draw(st.integers(8, 12)), draw(st.integers(8, 12)))


def assert_costs_agree(cls, layer, input_shape, ranks, **options):
    """The problem's formulas, the built layer's ``cost`` and torch's flop counter give the same numbers."""
    problem = cls.rank_problem(read_layer(layer, cls), **options)
    arguments = {name: getattr(layer, name) for name in ("in_channels", "out_channels", "kernel_size", "stride")}
    arguments |= {name: getattr(layer, name) for name in ("padding", "dilation", "groups", "padding_mode")}
    rank = cls.rank_argument(ranks, problem.limits)
    compressed = cls(**arguments, bias=False, rank=rank, dtype=layer.weight.dtype, **options)
    x = torch.zeros(input_shape, dtype=layer.weight.dtype)
    with FlopCounterMode(display=False) as counter:
        output = compressed(x)
    cost = compressed.cost(input_shape)
    positions = Positions.of(input_shape, output.shape)
    assert cost.params == sum(p.numel() for p in compressed.parameters()) == problem.params(*ranks)
    assert 2 * cost.macs == counter.get_total_flops() == 2 * problem.macs(positions, *ranks)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert problem.dense(positions) == (layer.weight.numel(), counter.get_total_flops() // 2)
