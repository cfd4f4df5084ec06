"""QuantConv2d and QuantLinear: integers that compute the same as floats, training on the grid, zeros that stay."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from lowrank_nn.errors import CalibrationError, OptionError, UnsupportedLayerError
from lowrank_nn.layers import PrunedConv2d, PrunedLinear, QuantConv2d, QuantLinear, SVDLinear
from tests.layers.geometries import AWKWARD, convolutions, dense_conv
from tests.layers.metrics import random_metric

SCHEMES = ["symmetric", "affine"]
schemes, bit_counts = st.sampled_from(SCHEMES), st.integers(2, 8)


def randn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_linear(in_features=12, out_features=9, dtype=torch.float64, seed=0):
    layer = nn.Linear(in_features, out_features, device="meta", dtype=dtype).to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(randn(out_features, in_features, seed=seed))
        layer.bias.copy_(randn(out_features, seed=seed + 1))
    return layer


def pruned(layer, how):
    """The layer with an element mask, as a window, or as a window with a mask in it."""
    cls = PrunedConv2d if isinstance(layer, nn.Conv2d) else PrunedLinear
    if how in ("window", "window and mask"):
        layer = cls.from_pretrained_layer(layer, sparsity=1 / 3, granularity="window")
    if how in ("mask", "window and mask"):
        layer = cls.from_pretrained_layer(layer, sparsity=0.6)
    return layer


# --- The integer reference ----------------------------------------------------------------------------------------


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
def test_integers_on_cuda_are_those_on_the_cpu(scheme):
    x = randn(2, 4, 11, 9, dtype=torch.float32)
    dense = dense_conv(kernel_size=3, padding=1, groups=2, dtype=torch.float32)
    layer = QuantConv2d.from_pretrained_layer(dense, scheme=scheme, activation_bits=8, inputs=x)
    expected = layer.integer_accumulators(x)
    assert torch.equal(layer.cuda().integer_accumulators(x.cuda()).cpu(), expected)


# --- The grid -----------------------------------------------------------------------------------------------------


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


# --- Two states ---------------------------------------------------------------------------------------------------


def quantized_layers(**options):
    x = randn(2, 4, 6, 6, dtype=torch.float32)
    conv = dense_conv(kernel_size=3, padding=1, dtype=torch.float32)
    for how in ("dense", "mask", "window and mask"):
        for scheme in SCHEMES:
            yield QuantConv2d.from_pretrained_layer(pruned(conv, how), scheme=scheme, **options), x
    linear = dense_linear(dtype=torch.float32)
    yield QuantLinear.from_pretrained_layer(pruned(linear, "mask"), **options), randn(5, 12, dtype=torch.float32)


def train(layer, x, steps=4):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_freezing_and_unfreezing_change_nothing_that_is_computed(bits):
    for layer, x in quantized_layers(bits=bits, activation_bits=8, input_range=(-2, 2), frozen=False):
        train(layer, x)
        expected, keys = layer(x).detach(), [name for name, _ in layer.named_parameters()]
        assert layer.freeze() is layer
        assert layer.config()["frozen"] is True
        assert torch.equal(layer(x), expected)
        assert layer.unfreeze() is layer
        assert layer.config()["frozen"] is False
        assert [name for name, _ in layer.named_parameters()] == keys
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        assert layer.latent.requires_grad


@pytest.mark.parametrize("frozen", [True, False])
def test_both_states_are_rebuilt_from_config_and_state_dict(frozen):
    for layer, x in quantized_layers(bits=4, activation_bits=6, input_range=(-2, 1), frozen=frozen):
        twin = type(layer)(**json.loads(json.dumps(layer.config())))
        twin.load_state_dict(layer.state_dict())
        assert torch.equal(twin(x), layer(x))
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        state = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        shadow = type(layer)(**layer.config(), device="meta")
        assert {name: tuple(tensor.shape) for name, tensor in shadow.state_dict().items()} == state
        assert shadow.cost(x.shape) == layer.cost(x.shape)
        assert shadow.freeze().config() == twin.freeze().config()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_the_rounded_layer_straight_through(scheme):
    dense, x = dense_conv(kernel_size=3, padding=1), randn(2, 4, 6, 6).requires_grad_()
    options = {"bits": 3, "scheme": scheme, "activation_bits": 4, "input_range": (-1, 1), "frozen": False}
    layer = QuantConv2d.from_pretrained_layer(dense, **options)
    weight = layer.dense_weight().detach().requires_grad_()
    step = float(layer.input_scale)
    inside = (torch.round(x / step) + int(layer.input_zero_point)).clamp(0, 15) - int(layer.input_zero_point)
    rounded = (inside * step).detach().requires_grad_()
    F.conv2d(rounded, weight, dense.bias, padding=1).square().sum().backward()
    layer(x).square().sum().backward()
    # Rounding is the identity; no weight lies outside the range that is taken from the weights.
    torch.testing.assert_close(layer.latent.grad, weight.grad, rtol=1e-9, atol=1e-9)
    clipped = inside != torch.round(x / step)
    assert bool(clipped.any())
    torch.testing.assert_close(x.grad, torch.where(clipped, 0, rounded.grad), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_on_the_grid_beats_rounding(bits, scheme):
    # Inputs in a space of three dims leave the twelve weights of an output room to round together.
    teacher, x = dense_linear(), randn(200, 3, seed=5) @ randn(3, 12, seed=6)
    target = teacher(x).detach()
    layer = QuantLinear.from_pretrained_layer(teacher, bits=bits, scheme=scheme, frozen=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.003)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert min(losses) < 0.5 * losses[0]
    expected = layer(x).detach()
    assert torch.equal(layer.freeze()(x), expected)
    assert len(layer.weight_int.unique()) <= 2**bits


def test_two_bit_layers_learn_digits_where_rounding_fails():
    data = load_digits()
    x, labels = torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target)

    def accuracy():
        return float((model(x[1200:]).argmax(1) == labels[1200:]).float().mean())

    def fit(rate):
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(model(x[:1200]), labels[:1200]).backward()
            optimizer.step()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    fit(0.005)
    dense = accuracy()
    with torch.no_grad():
        hidden = model[:2](x[:1200])
    for index, inputs in ((0, x), (2, hidden)):
        options = {"bits": 2, "activation_bits": 4, "inputs": inputs, "frozen": False}
        model[index] = QuantLinear.from_pretrained_layer(model[index], **options)
    rounded = accuracy()
    fit(0.002)
    trained = accuracy()
    assert dense > 0.88
    assert rounded < dense - 0.1
    assert trained > dense - 0.03
    expected = model(x).detach()
    for index in (0, 2):
        model[index].freeze()
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(model[0].integer_forward(x), model[0](x).detach(), rtol=1e-5, atol=1e-5)


# --- Pruned sources -----------------------------------------------------------------------------------------------


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


# --- Errors -------------------------------------------------------------------------------------------------------

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
        "observer: must be one of 'minmax', 'percentile', 'mse', got 'median'",
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
