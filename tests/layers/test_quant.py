"""Quantized layers: the nearest numbers on the grid, pruned sources, rounding on data, and what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_nn.errors import CalibrationError, OptionError, UnsupportedLayerError
from lowrank_nn.layers import PrunedConv2d, PrunedLinear, QuantConv2d, QuantLinear, SVDLinear
from tests.layers.geometries import convolutions, dense_conv
from tests.layers.metrics import random_metric
from tests.layers.quantizing import SCHEMES, bit_counts, dense_linear, pruned, randn, schemes, train


@given(bit_counts, schemes, st.booleans())
def test_weights_are_the_nearest_on_the_grid(bits, scheme, frozen):
    dense = dense_conv(kernel_size=3)
    layer = QuantConv2d.from_pretrained_layer(dense, bits=bits, scheme=scheme, frozen=frozen)
    weight, flat = dense.weight.detach(), dense.weight.detach().flatten(1)
    if scheme == "symmetric":
        step = (flat.abs().amax(1) / (2 ** (bits - 1) - 1)).reshape(-1, 1, 1, 1)
    else:
        step = (weight.max() - weight.min()) / (2**bits - 1)
    integers = layer.dense_weight().detach() / step
    torch.testing.assert_close(integers, torch.round(integers), rtol=0, atol=1e-9)
    assert float(((layer.dense_weight().detach() - weight).abs() / step).max()) <= 0.5 + 1e-9


@pytest.mark.parametrize("scheme", SCHEMES)
def test_integers_are_stored_as_int8_and_nothing_else_of_the_weight(scheme):
    layer = QuantConv2d.from_pretrained_layer(dense_conv(kernel_size=3), bits=3, scheme=scheme, activation_bits=4,
                                              input_range=(0, 1))  # fmt: skip
    state = layer.state_dict()
    assert state["weight_int"].dtype == torch.int8
    assert set(state["weight_int"].unique().tolist()) <= set(range(-4, 4))
    assert {name for name, tensor in state.items() if tensor.numel() > 8} == {"weight_int"}
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    for cast in (layer.half(), layer.double(), layer.to(torch.bfloat16)):
        assert cast.weight_int.dtype == torch.int8
        assert cast.input_zero_point.dtype == torch.int32


def test_a_channel_of_zeros_stays_zero_and_finite():
    dense = dense_linear()
    with torch.no_grad():
        dense.weight[3] = 0
    layer = QuantLinear.from_pretrained_layer(dense, bits=2)
    assert 0 < float(layer.weight_scale[3]) < 0.001 * float(layer.weight_scale.max())
    assert not layer.dense_weight()[3].any()
    assert bool(torch.isfinite(layer(randn(2, 12))).all())


def test_inputs_are_rounded_to_the_grid_and_clipped():
    layer = QuantLinear(1, 1, bias=False, activation_bits=2, dtype=torch.float64)
    layer.approximate_(torch.ones(1, 1, dtype=torch.float64))
    layer.set_input_range(-1, 2)
    x = torch.tensor([[-9.0], [-1.2], [-0.3], [0.0], [0.6], [1.4], [99.0]], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.flatten().tolist() == [-1, -1, 0, 0, 1, 1, 2]
    y.sum().backward()
    assert x.grad.flatten().tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_the_input_range_always_includes_zero():
    layer = QuantLinear(2, 2, activation_bits=8)
    layer.set_input_range(3, 5)
    assert float(layer.input_scale) == pytest.approx(5 / 255)
    assert int(layer.input_zero_point) == 0
    layer.set_input_range(-5, -3)
    assert float(layer.input_scale) == pytest.approx(5 / 255)
    assert int(layer.input_zero_point) == 255


def test_calibration_takes_tensors_one_by_one():
    x = randn(40, 12)
    options = {"activation_bits": 8}
    whole = QuantLinear.from_pretrained_layer(dense_linear(), inputs=x, **options)
    parts = QuantLinear.from_pretrained_layer(dense_linear(), inputs=iter(x.split(7)), **options)
    known = QuantLinear.from_pretrained_layer(dense_linear(), input_range=(float(x.min()), float(x.max())), **options)
    assert torch.equal(whole.input_scale, parts.input_scale)
    assert torch.equal(whole.input_scale, known.input_scale)
    assert torch.equal(whole.input_zero_point, known.input_zero_point)


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_clipping_an_outlier_serves_the_others_better(observer):
    x = randn(2000, 12)
    x[0, 0] = 60.0
    dense, errors = dense_linear(), {}
    for name in ("minmax", observer):
        layer = QuantLinear.from_pretrained_layer(dense, activation_bits=4, inputs=x, observer=name)
        errors[name] = float((layer(x[1:]) - dense(x[1:])).detach().norm())
    assert errors[observer] < 0.5 * errors["minmax"]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("how", ["mask", "window", "window and mask"])
def test_zeros_and_windows_survive(how, scheme, frozen):
    source = pruned(dense_conv(kernel_size=3, padding=1, dtype=torch.float32), how)
    x = randn(2, 4, 6, 6, dtype=torch.float32)
    layer = QuantConv2d.from_pretrained_layer(source, scheme=scheme, bits=5, frozen=frozen)
    zeros = source.dense_weight() == 0
    before, after = source.cost(x.shape), layer.cost(x.shape)
    assert (after.params, after.macs, after.nonzeros) == (before.params, before.macs, before.nonzeros)
    assert (layer.mask is None) == (how == "window")
    assert not layer.dense_weight()[zeros].any()
    train(layer, x)
    assert not layer.dense_weight()[zeros].any()
    if not frozen:
        assert bool(layer.dense_weight()[~zeros].any())
        layer.freeze()
        assert not layer.dense_weight()[zeros].any()
    assert not layer.unfreeze().dense_weight()[zeros].any()
    torch.testing.assert_close(layer(x), layer.to_dense_layer()(x), rtol=1e-5, atol=1e-5)


def test_what_a_mask_drops_has_no_effect_and_is_not_stored():
    layer = QuantLinear.from_pretrained_layer(pruned(dense_linear(), "mask"), scheme="affine")
    expected = layer.dense_weight()
    assert not layer.weight_int[~layer.mask].any()
    layer.weight_int[~layer.mask] = 77
    assert torch.equal(layer.dense_weight(), expected)
    packing = layer.packing()["weight_int"]
    assert (packing.bits, packing.mask) == (8, "mask")


def test_bytes_are_those_of_packed_integers():
    dense = dense_linear(dtype=torch.float32)  # 108 weights, 9 biases
    for bits in range(2, 9):
        layer = QuantLinear.from_pretrained_layer(dense, bits=bits)
        assert layer.cost((1, 12)).bytes == math.ceil(108 * bits / 8) + 9 * 4 + 9 * 4
        assert layer.packing()["weight_int"].bits == bits
    affine = QuantLinear.from_pretrained_layer(dense, bits=3, scheme="affine", activation_bits=8, input_range=(0, 1))
    assert affine.cost((1, 12)).bytes == math.ceil(108 * 3 / 8) + 8 + 9 * 4 + 8
    masked = QuantLinear.from_pretrained_layer(pruned(dense, "mask"), bits=3)
    kept = int(masked.mask.sum())
    assert masked.cost((1, 12)).bytes == math.ceil(kept * 3 / 8) + math.ceil(108 / 8) + 9 * 4 + 9 * 4
    assert masked.cost((1, 12)).nonzeros == kept + 9
    floats = QuantLinear.from_pretrained_layer(pruned(dense, "mask"), bits=3, frozen=False)
    assert floats.cost((1, 12)).bytes == kept * 4 + math.ceil(108 / 8) + 9 * 4


def test_from_scratch_with_a_mask_keeps_the_number_asked_for():
    layer = QuantConv2d(4, 6, 3, bits=4, nonzeros=50)
    assert int(layer.mask.sum()) == 50
    assert int((layer.dense_weight() != 0).sum()) <= 50


BAD_CALLS = [
    ({"bits": 1}, OptionError, "QuantLinear: bits must be a whole number from 2 to 8, got 1"),
    ({"bits": 9}, OptionError, "QuantLinear: bits must be a whole number from 2 to 8, got 9"),
    ({"bits": 4.0}, OptionError, r"QuantLinear: bits must be a whole number from 2 to 8, got 4\.0"),
    ({"scheme": "log"}, OptionError, "QuantLinear: scheme must be 'symmetric' or 'affine', got 'log'"),
    (
        {"activation_bits": 16, "input_range": (0, 1)},
        OptionError,
        "QuantLinear: activation_bits must be a whole number from 2 to 8, got 16",
    ),
    (
        {"activation_bits": 8},
        CalibrationError,
        "QuantLinear: activation_bits=8 needs to know the range of the layer's input. Pass inputs=",
    ),
    ({"input_range": (0, 1)}, OptionError, "QuantLinear: input_range has no effect without activation_bits"),
    ({"inputs": torch.ones(2)}, OptionError, "QuantLinear: inputs has no effect without activation_bits"),
    (
        {"activation_bits": 8, "inputs": torch.ones(2), "input_range": (0, 1)},
        OptionError,
        "QuantLinear: inputs and input_range say the same thing twice",
    ),
    ({"activation_bits": 8, "inputs": []}, CalibrationError, "QuantLinear: calibration: no values were seen"),
    (
        {"activation_bits": 8, "inputs": torch.tensor([math.nan])},
        CalibrationError,
        "QuantLinear: calibration: there are NaN",
    ),
    (
        {"activation_bits": 8, "inputs": [(torch.ones(2), 1)]},
        CalibrationError,
        "QuantLinear: calibration: expected floating-point tensors, got tuple",
    ),
    (
        {"activation_bits": 8, "inputs": torch.ones(2), "observer": "median"},
        OptionError,
        "observer: must be one of 'minmax', 'percentile', 'mse', 'entropy', got 'median'",
    ),
    (
        {"activation_bits": 8, "input_range": (2, 1)},
        CalibrationError,
        r"QuantLinear: the input range must be two finite numbers \(min, max\), got \(2, 1\)",
    ),
    (
        {"activation_bits": 8, "input_range": (0, math.inf)},
        CalibrationError,
        "QuantLinear: the input range must be two finite numbers",
    ),
    (
        {"output_range": (2, 1)},
        OptionError,
        r"QuantLinear: output_range must be two finite numbers \(min, max\), got \(2, 1\)",
    ),
    ({"output_range": (0, math.nan)}, OptionError, "QuantLinear: output_range must be two finite numbers"),
    ({"output_range": (0, 1, 2)}, OptionError, "QuantLinear: output_range must be two finite numbers"),
    ({"output_range": 5}, OptionError, "QuantLinear: output_range must be two finite numbers"),
    (
        {"activation_bits": 8, "input_range": 5},
        OptionError,
        r"QuantLinear: input_range must be two numbers \(min, max\)",
    ),
    ({"activation_bits": 8, "input_range": (2, 1, 3)}, OptionError, "QuantLinear: input_range must be two numbers"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_CALLS)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        QuantLinear.from_pretrained_layer(dense_linear(), **options)


def test_integers_need_a_quantized_input():
    layer = QuantLinear.from_pretrained_layer(dense_linear())
    for call in (lambda: layer.integer_forward(randn(2, 12)), lambda: layer.set_input_range(0, 1)):
        with pytest.raises(
            CalibrationError, match=r"QuantLinear: .* needs a quantized input, and this layer quantizes w"
        ):
            call()


def test_a_count_that_the_weight_cannot_keep_is_refused():
    with pytest.raises(OptionError, match="QuantLinear: nonzeros must be from 1 to the 6 entries of the stored weight"):
        QuantLinear(2, 3, nonzeros=7)
    with pytest.raises(OptionError, match=r"QuantConv2d: window must be \(top, left, height, width\)"):
        QuantConv2d(2, 3, 3, window=(2, 2, 2, 2))


def test_low_rank_and_quantized_sources_are_refused():
    for source in (SVDLinear(4, 4, rank=2), QuantLinear(4, 4)):
        with pytest.raises(UnsupportedLayerError, match="expected Linear or PrunedLinear"):
            QuantLinear.from_pretrained_layer(source)
    with pytest.raises(UnsupportedLayerError, match="PrunedLinear: the layer is a QuantLinear already"):
        PrunedLinear.from_pretrained_layer(QuantLinear(4, 4), sparsity=0.5)


def on_data(layer, **options):
    """The quantized layer rounded under a random metric, the nearest one, and the metric."""
    cls = QuantConv2d if isinstance(layer, nn.Conv2d | PrunedConv2d) else QuantLinear
    dense = layer.to_dense_layer() if isinstance(layer, PrunedConv2d | PrunedLinear) else layer
    metric = random_metric(dense, curvature=options.pop("curvature", True), diagonal=options.pop("diagonal", False))
    fitted = cls.from_pretrained_layer(layer, metric=metric, **options)
    return fitted, cls.from_pretrained_layer(layer, **options), metric


@given(convolutions(), bit_counts, schemes, st.booleans(), st.booleans(), st.sampled_from(["dense", "mask", "window"]))
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_rounding_on_data_is_never_worse_than_the_nearest(drawn, bits, scheme, curvature, diagonal, how):
    layer = drawn[0] if how == "dense" else pruned(drawn[0], how)
    options = {"bits": bits, "scheme": scheme, "curvature": curvature, "diagonal": diagonal}
    fitted, nearest, metric = on_data(layer, **options)
    seen = metric if layer.bias is not None else metric.with_mean()
    weight = layer.weight.detach()
    assert seen.error(fitted.weight - weight) <= seen.error(nearest.weight - weight) * (1 + 1e-9)
    assert torch.equal(fitted.weight == 0, (fitted.weight == 0) | (weight == 0) & (how != "dense"))


@pytest.mark.parametrize(("bits", "share"), [(8, 0.5), (4, 0.4), (3, 0.3), (2, 0.3)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_on_data_takes_most_of_the_error_off(scheme, bits, share):
    layer = dense_conv(in_channels=8, out_channels=16, kernel_size=3)
    fitted, nearest, metric = on_data(layer, bits=bits, scheme=scheme, curvature=False)
    change, change_of_nearest = fitted.weight - layer.weight.detach(), nearest.weight - layer.weight.detach()
    assert metric.error(change) < share * metric.error(change_of_nearest)
    assert torch.linalg.vector_norm(change) > torch.linalg.vector_norm(change_of_nearest)
    torch.testing.assert_close(fitted.bias, layer.bias - metric.mean_output(change))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_was_rounded_on_data_survives_unfreezing(scheme, bits, dtype):
    layer = dense_conv(in_channels=4, out_channels=16, kernel_size=3).to(dtype)
    fitted, _, _ = on_data(layer, bits=bits, scheme=scheme)
    thawed, _, _ = on_data(layer, bits=bits, scheme=scheme, frozen=False)
    codes = fitted.integer_weight()[0]
    assert torch.equal(thawed.integer_weight()[0], codes)
    torch.testing.assert_close(thawed.weight, fitted.weight)
    assert torch.equal(fitted.unfreeze().freeze().integer_weight()[0], codes)
