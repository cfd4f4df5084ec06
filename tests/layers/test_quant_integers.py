"""The integer reference of the quantized layers: sums of integers that are what floats give."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_nn.layers import QuantConv2d, QuantLinear
from tests.layers.geometries import AWKWARD, convolutions, dense_conv
from tests.layers.quantizing import SCHEMES, bit_counts, dense_linear, pruned, randn, schemes


def centred(layer, x):
    """The integers of input and dense weight minus their zero points, in float64, from the definition."""
    scale, zero = layer.input_scale.double(), layer.input_zero_point.double()
    top = 2**layer.activation_bits - 1
    x_codes = (torch.round(x.double() / scale) + zero).clamp(0, top) - zero
    weight = layer.dense_weight().detach().double()
    scales = layer.weight_scale.double().reshape(-1, *(1,) * (weight.dim() - 1))
    return x_codes, torch.round(weight / scales)


def assert_integers_agree(layer, x, convolve):
    x_codes, w_codes = centred(layer, x)
    sums = layer.integer_accumulators(x)
    assert sums.dtype == torch.int32
    # Padding zeros of the centred input is padding with the zero point.
    assert torch.equal(sums.double(), convolve(x_codes, w_codes))
    torch.testing.assert_close(layer.integer_forward(x), layer(x).detach(), rtol=1e-9, atol=1e-9)


def convolve_like(layer):
    def convolve(x, weight):
        dense = nn.Conv2d(**layer.dense_arguments() | {"bias": False}, device="meta", dtype=torch.float64)
        return torch.func.functional_call(dense, {"weight": weight}, (x,))

    return convolve


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(convolutions(), bit_counts, bit_counts, schemes, st.sampled_from(["dense", "mask", "window", "window and mask"]))
def test_integer_convolution_is_exact(drawn, bits, activation_bits, scheme, how):
    dense, shape = drawn
    if how.startswith("window") and dense.weight[0, 0].numel() < 2:
        how = "mask"
    x = randn(*shape)
    layer = QuantConv2d.from_pretrained_layer(
        pruned(dense, how), bits=bits, scheme=scheme, activation_bits=activation_bits, inputs=x[..., 1:, 1:] + 0.3
    )
    assert_integers_agree(layer, x, convolve_like(layer))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("geometry", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_integer_convolution_on_awkward_geometries(geometry, scheme):
    dense, x = dense_conv(**geometry), randn(2, 4, 11, 9)
    layer = QuantConv2d.from_pretrained_layer(dense, scheme=scheme, activation_bits=8, inputs=x + 1)
    assert int(layer.input_zero_point) not in (0, 255)
    assert_integers_agree(layer, x, convolve_like(layer))
    assert_integers_agree(layer, x[0], convolve_like(layer))


@given(
    st.sampled_from([(12,), (5, 12), (2, 3, 12), (0, 12)]),
    bit_counts,
    bit_counts,
    schemes,
    st.sampled_from(["dense", "mask"]),
)
def test_integer_linear_is_exact(shape, bits, activation_bits, scheme, how):
    options = {"bits": bits, "scheme": scheme, "activation_bits": activation_bits, "input_range": (-1.5, 2)}
    layer = QuantLinear.from_pretrained_layer(pruned(dense_linear(), how), **options)
    assert_integers_agree(layer, randn(*shape), F.linear)


def test_integer_forward_follows_the_trained_weight_before_freezing():
    layer = QuantLinear.from_pretrained_layer(dense_linear(), activation_bits=8, input_range=(-3, 3), frozen=False)
    x = randn(5, 12)
    with torch.no_grad():
        layer.latent.mul_(3)
    torch.testing.assert_close(layer.integer_forward(x), layer(x).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integer_forward_keeps_the_dtype_and_is_forward_up_to_its_rounding(dtype):
    x = randn(2, 4, 7, 7).to(dtype)
    dense = dense_conv(kernel_size=3, padding=1, dtype=dtype)
    layer = QuantConv2d.from_pretrained_layer(dense, activation_bits=8, inputs=x)
    y, expected = layer.integer_forward(x), layer(x).detach()
    assert y.dtype == expected.dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps
    assert float((y.float() - expected.float()).norm()) <= tolerance * float(expected.float().norm())


@pytest.mark.cuda
@pytest.mark.parametrize("scheme", SCHEMES)
def test_integers_on_cuda_are_those_on_the_cpu(scheme, device):
    x = randn(2, 4, 11, 9, dtype=torch.float32)
    dense = dense_conv(kernel_size=3, padding=1, groups=2, dtype=torch.float32)
    layer = QuantConv2d.from_pretrained_layer(dense, scheme=scheme, activation_bits=8, inputs=x)
    expected = layer.integer_accumulators(x)
    assert torch.equal(layer.to(device).integer_accumulators(x.to(device)).cpu(), expected)
