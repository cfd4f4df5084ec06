"""Pruning to windows: kernels stored as a rectangle, against dense convolutions with zeros."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_nn.errors import OptionError, UnsupportedLayerError
from lowrank_nn.layers import PrunedConv2d, PrunedLinear
from lowrank_nn.layers._window import check_window, crop_window, embed_window, explicit_padding, windowed_conv2d
from tests.layers.pruning import conv, linear


@st.composite
def geometries(draw):
    size = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    height, width = draw(st.integers(1, size[0])), draw(st.integers(1, size[1]))
    top, left = draw(st.integers(0, size[0] - height)), draw(st.integers(0, size[1] - width))
    small = st.tuples(st.integers(1, 3), st.integers(1, 3))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 4), st.integers(0, 4))))
    geometry = {
        "kernel_size": size,
        "stride": (1, 1) if padding == "same" else draw(small),
        "padding": padding,
        "dilation": draw(small),
        "groups": draw(st.sampled_from([1, 2])),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    return (top, left, height, width), geometry, draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.booleans())


@settings(max_examples=400)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(geometries())
def test_a_window_computes_what_the_dense_convolution_with_zeros_does(drawn):
    window, geometry, height, width, batched = drawn
    generator = torch.Generator().manual_seed(height * 10 + width)
    dense = nn.Conv2d(4, 6, **geometry, dtype=torch.float64)
    kernel = torch.randn(6, 4 // geometry["groups"], *window[2:], generator=generator, dtype=torch.float64)
    x = torch.randn(*((2,) if batched else ()), 4, height, width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.zero_()
        crop_window(dense.weight, window).copy_(kernel)
    assert torch.equal(embed_window(kernel, window, geometry["kernel_size"]), dense.weight)
    try:
        expected = dense(x)
    except RuntimeError:  # the input is too small for the kernel, or for the padding mode
        if geometry["padding_mode"] == "zeros":
            with pytest.raises(RuntimeError):
                windowed_conv2d(x, kernel, dense.bias, window=window, **geometry)
        assume(False)
    actual = windowed_conv2d(x, kernel, dense.bias, window=window, **geometry)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@given(geometries())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_without_window_it_is_torchs_own_convolution_bit_for_bit(drawn):
    _, geometry, height, width, batched = drawn
    dense = nn.Conv2d(4, 6, **geometry)
    pads = [2 * [p] for p in reversed(dense.padding)] if isinstance(dense.padding, tuple) else None
    if pads is not None:
        assert explicit_padding(dense.kernel_size, dense.padding, dense.dilation) == tuple(itertools.chain(*pads))
    x = torch.randn(*((2,) if batched else ()), 4, height, width)
    try:
        expected = dense(x)
    except RuntimeError:
        assume(False)
    for window in (None, (0, 0, *dense.kernel_size)):
        assert torch.equal(windowed_conv2d(x, dense.weight, dense.bias, window=window, **geometry), expected)


@pytest.mark.parametrize(
    "options", [{}, {"padding": 1}, {"padding": "same", "dilation": 2}, {"stride": 2, "groups": 2}]
)
@pytest.mark.parametrize("kept", [(2, 3), (3, 2)])
def test_three_by_three_becomes_two_by_three(options, kept):
    dense = conv(**options)
    with torch.no_grad():
        dense.weight[:, :, kept[0] :] *= 0.01
        dense.weight[:, :, :, kept[1] :] *= 0.01
    x = torch.randn(2, 4, 9, 8)
    for granularity in ("window", "shape"):
        layer = PrunedConv2d.from_pretrained_layer(dense, sparsity=1 / 3, granularity=granularity)
        assert layer.window == (0, 0, *kept)
        assert tuple(layer.kernel.shape[2:]) == kept
        torch.testing.assert_close(layer(x), layer.to_dense_layer()(x))
        costs = layer.cost(tuple(x.shape)), PrunedConv2d.from_pretrained_layer(dense, sparsity=0).cost(tuple(x.shape))
        assert costs[0].macs * 3 == costs[1].macs * 2
        assert costs[0].params == costs[1].params - 3 * 6 * dense.weight.shape[1]
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * costs[0].macs


def test_the_window_taken_is_the_best_rectangle():
    dense = conv()
    layer = PrunedConv2d.from_pretrained_layer(dense, sparsity=5 / 9, granularity="window", criterion="l2")
    energy = dense.weight.detach().double().square().sum((0, 1)).numpy()
    totals = {(t, s, 2, 2): energy[t : t + 2, s : s + 2].sum() for t in (0, 1) for s in (0, 1)}
    assert layer.window == max(totals, key=totals.get)
    assert layer.granularity == "shape"
    assert layer.sparsity == pytest.approx(5 / 9)


def test_shapes_that_are_no_rectangle_are_masked_inside_the_smallest_one():
    dense = conv(kernel_size=5, padding=2)
    cross = torch.zeros(5, 5)
    cross[2, 1:4] = cross[1:4, 2] = 1
    with torch.no_grad():
        dense.weight.mul_(0.01 + cross)
    layer = PrunedConv2d.from_pretrained_layer(dense, sparsity=0.8, granularity="shape")
    assert layer.window == (1, 1, 3, 3)
    assert torch.equal((layer.weight != 0).all(0).all(0), cross.bool())
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(layer(x), layer.to_dense_layer()(x))


def test_window_layers_project():
    layer = PrunedConv2d(4, 6, 3, sparsity=0.5, window=(0, 1, 3, 2))
    target = conv().weight.detach()
    layer.approximate_(target)
    inside = target[..., 1:].abs()
    kept = layer.mask
    assert int(kept.sum()) == 108
    assert inside[kept].min() > inside[~kept].max()
    assert not layer.weight[..., 0].any()


@pytest.mark.parametrize(
    "window",
    [(0, 0, 0, 3), (1, 0, 3, 3), (-1, 0, 2, 2), (0, 0, 3), (0, 0, 4, 3), (0.0, 0, 2, 2), (0, 0, True, 2), (0, 2, 2, 2)],
)
def test_windows_outside_the_kernel_are_refused(window):
    with pytest.raises(OptionError, match=r"PrunedConv2d: window must be \(top, left, height, width\)"):
        PrunedConv2d(4, 6, 3, sparsity=0.9, granularity="shape", window=window)


def test_windows_and_other_options_that_do_not_fit():
    assert check_window("Layer", [0, 0, 3, 3], (3, 3)) is None
    with pytest.raises(OptionError, match=r"holds 6 of the 9 units, fewer than the 9 that sparsity=0.0 keeps"):
        PrunedConv2d(4, 6, 3, sparsity=0.0, granularity="shape", window=(0, 0, 2, 3))
    with pytest.raises(OptionError, match="a window goes with granularity 'shape' or 'element', got 'row'"):
        PrunedConv2d(4, 6, 3, sparsity=0.9, granularity="row", window=(0, 0, 2, 3))
    with pytest.raises(OptionError, match="PrunedLinear: sparsity must be"):
        PrunedLinear.from_pretrained_layer(linear(), sparsity=1)
    with pytest.raises(
        UnsupportedLayerError, match="PrunedLinear: a linear layer has no units of granularity 'window'"
    ):
        PrunedLinear.from_pretrained_layer(linear(), sparsity=0.5, granularity="window")
    with pytest.raises(UnsupportedLayerError, match=r"PrunedLinear: expected an nn.Linear"):
        PrunedLinear.from_pretrained_layer(conv(), sparsity=0.5)
