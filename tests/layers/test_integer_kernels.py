"""Integer kernels: the same as the integer reference, used only where that is right, forgotten when weights change."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from lowrank_nn.layers import PrunedConv2d, QuantConv2d, QuantLinear
from lowrank_nn.layers import _onednn as onednn
from lowrank_nn.layers._affine import quantize, unsigned_grid
from lowrank_nn.layers._kernel import kernel_for, obstacle
from lowrank_nn.layers._onednn import CodeGrid, Geometry, PackedWeight
from tests.layers.geometries import AWKWARD, convolutions, dense_conv

needs_kernels = pytest.mark.skipif(not onednn.is_exact(255, 127), reason="no exact integer kernels on this machine")
pytestmark = needs_kernels


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(dense, x, **options):
    return type_of(dense).from_pretrained_layer(dense, inputs=x, **{"activation_bits": 8} | options).eval()


def type_of(dense):
    return QuantLinear if isinstance(dense, nn.Linear) else QuantConv2d


def linear(in_features=12, out_features=9):
    layer = nn.Linear(in_features, out_features, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(randn(out_features, in_features))
        layer.bias.copy_(randn(out_features))
    return layer


@torch.no_grad()
def assert_kernel_agrees(layer, x):
    kernel = kernel_for(layer, x)
    assert kernel is not None
    found, expected = layer(x), layer.integer_forward(x.double()).float()
    assert type(found) is torch.Tensor
    assert found.shape == expected.shape
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    # Zero points come in through the bias: what rounds are numbers up to 255 times the sum of the weights.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6 * largest)


# --- The same as the reference ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(convolutions(), st.integers(2, 8), st.integers(2, 8), st.sampled_from(["dense", "mask", "window"]))
def test_convolutions_agree_with_the_integer_reference(drawn, bits, activation_bits, how):
    dense, shape = drawn
    dense, x = dense.float(), randn(*shape)
    if how != "dense" and dense.weight[0, 0].numel() > 1:
        granularity = "element" if how == "mask" else "window"
        dense = PrunedConv2d.from_pretrained_layer(dense, sparsity=0.4, granularity=granularity)
    assert_kernel_agrees(quantized(dense, x + 0.3, bits=bits, activation_bits=activation_bits), x)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("geometry", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_awkward_geometries_batched_or_not_in_either_memory_format(geometry, last):
    dense, x = dense_conv(**geometry, dtype=torch.float32), randn(2, 4, 11, 9)
    if last:
        x = x.to(memory_format=torch.channels_last)
    layer = quantized(dense, x)
    for one in (x, x.relu(), x[0]):
        assert_kernel_agrees(layer, one)
    with torch.no_grad():
        assert layer(x).is_contiguous() == (not last)


@given(st.sampled_from([(12,), (5, 12), (2, 3, 12), (1, 1, 1, 12)]), st.integers(2, 8), st.integers(2, 8))
def test_linear_layers_agree_with_the_integer_reference(shape, bits, activation_bits):
    x = randn(*shape)
    assert_kernel_agrees(quantized(linear(), x, bits=bits, activation_bits=activation_bits), x)


def test_layers_of_full_size_agree():
    x = randn(1, 256, 14, 14).relu()
    assert_kernel_agrees(quantized(dense_conv(torch.float32, 256, 64, kernel_size=3, padding=1), x), x)
    assert_kernel_agrees(quantized(linear(2048, 32), randn(3, 2048)), randn(3, 2048))


@given(st.integers(2, 8), st.floats(-3, 0), st.floats(0.1, 5))
def test_bytes_are_those_of_the_reference(bits, low, high):
    layer = QuantLinear(4, 4, activation_bits=bits)
    layer.set_input_range(low, high)
    scale, zero_point, grid = layer._input_grid("test")
    ties = (torch.arange(-300, 300) + 0.5) * scale
    x = torch.cat([3 * randn(500), ties, torch.nextafter(ties, torch.tensor(9e9)), torch.tensor([9e9, -9e9, 0.0])])
    x = torch.cat([x, torch.tensor([torch.inf, -torch.inf])])
    expected = quantize(x, scale, zero_point, unsigned_grid(bits), torch.uint8)
    assert torch.equal(CodeGrid(float(scale), int(zero_point), grid.high).encode(x), expected)


@pytest.mark.parametrize("activation", [("none", ()), ("relu", ()), ("hardtanh", (0.0, 6.0)), ("hardswish", ())])
@pytest.mark.parametrize("top", [255, 15])
def test_kernels_return_bytes_rounded_from_the_activated_sums(activation, top):
    codes = torch.randint(0, 256, (2, 8, 9, 9), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    weight = torch.randint(-127, 128, (16, 8, 3, 3), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    scale, bias = randn(16).abs() * 0.01, randn(16)
    grid, out = CodeGrid(0.02, 100, 255), CodeGrid(0.11 if top == 255 else 2.0, 7, top)
    packed = PackedWeight(weight, scale, bias, grid, Geometry((1, 1), (1, 1, 1, 1), (1, 1), 1))
    sums = torch.conv2d((codes.double() - 100), weight.double(), None, 1, 1)
    y = sums * (0.02 * scale.double()).reshape(-1, 1, 1) + bias.double().reshape(-1, 1, 1)
    functions = {"none": lambda v: v, "relu": torch.relu, "hardtanh": lambda v: v.clamp(0, 6)}
    steps = functions.get(activation[0], nn.functional.hardswish)(y) / out.scale
    found = packed.run(codes, out, activation).double()
    expected = (torch.round(steps) + 7).clamp(0, top)
    differs = found != expected
    assert not bool((found - expected).abs().gt(1).any())
    assert not bool((((steps % 1) - 0.5).abs()[differs] > 1e-3).any())  # only at ties
    assert len(found.unique()) > 3


# --- Used only where it is right ----------------------------------------------------------------------------------


@pytest.fixture
def pair():
    x = randn(2, 4, 7, 7)
    return quantized(dense_conv(torch.float32, kernel_size=3, padding=1), x), x


def test_simulated_in_training_and_where_gradients_are_wanted(pair):
    layer, x = pair
    assert kernel_for(layer, x) is None  # the bias has a gradient
    assert layer(x).requires_grad
    with torch.no_grad():
        assert kernel_for(layer, x) is not None
        layer.train()
        assert kernel_for(layer, x) is None
        layer.eval()
    layer.requires_grad_(False)
    assert kernel_for(layer, x) is not None
    assert kernel_for(layer, x.clone().requires_grad_()) is None


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_simulated_where_somebody_records_or_transforms(pair):
    layer, x = pair
    layer.requires_grad_(False)
    expected = layer.simulate(x)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * layer.cost(x.shape).macs
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert torch.equal(torch.vmap(layer)(x.unsqueeze(1)).squeeze(1), expected)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), expected)
    assert torch.equal(torch.jit.trace(layer, x)(x), expected)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)


def test_simulated_in_other_dtypes_and_on_nothing(pair):
    layer, x = pair
    with torch.no_grad():
        for other in (layer.double(), layer.to(torch.bfloat16)):
            y = other(x.to(other.bias.dtype))
            assert y.dtype is other.bias.dtype
        assert layer.float()(x[:0]).shape == (0, 8, 7, 7)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scheme": "affine"}, "the kernels have no zero point for weights"),
        ({"activation_bits": None, "inputs": None}, "inputs are not quantized"),
    ],
)
def test_obstacles_are_named(options, reason):
    x = randn(2, 4, 7, 7)
    layer = QuantConv2d.from_pretrained_layer(
        dense_conv(torch.float32, kernel_size=3), **{"activation_bits": 8, "inputs": x} | options
    ).eval()
    assert obstacle(layer).startswith(reason)
    with torch.no_grad():
        assert kernel_for(layer, x) is None
        assert torch.equal(layer(x), layer.simulate(x))


def test_sums_that_could_overflow_are_not_computed_in_32_bits():
    wide = QuantLinear(70_000, 1, activation_bits=8, frozen=True)
    with torch.no_grad():
        wide.weight_int.fill_(127)
    assert obstacle(wide) == "sums could overflow 32 bits"
    with torch.no_grad():
        wide.weight_int[:, 1000:] = 0
    assert obstacle(wide) == ""


def test_kernels_that_saturate_are_found_out(monkeypatch):
    """Pairs of products clipped to 16 bits, as on CPUs without VNNI: fine for seven bits, wrong for eight."""

    def saturating(self, codes, out, activation=onednn.NONE):
        if self.geometry is not None:
            return torch.conv2d((codes.float() - 3), self._codes.float(), None, 1, 1, 1, self.geometry.groups)
        products = (codes.long().unsqueeze(1) * self._codes.long()).unflatten(2, (-1, 2)).sum(3)
        return (products.clamp(-(2**15), 2**15 - 1).sum(2) - 3 * self._codes.long().sum(1)).float()

    monkeypatch.setattr(PackedWeight, "run", saturating)
    onednn.is_exact.cache_clear()
    try:
        assert onednn.is_exact(127, 127)
        assert not onednn.is_exact(255, 127)
        x = randn(2, 4, 7, 7)
        layer = quantized(dense_conv(torch.float32, kernel_size=3), x)
        assert obstacle(layer) == "this machine has no exact integer kernels"
        monkeypatch.delattr(PackedWeight, "run")  # an operator that is not there
        onednn.is_exact.cache_clear()
        assert not onednn.is_exact(127, 127)
    finally:
        onednn.is_exact.cache_clear()


@pytest.mark.cuda
def test_simulated_on_cuda(pair, device):
    layer, x = pair
    with torch.no_grad():
        torch.testing.assert_close(layer.to(device)(x.to(device)).cpu(), layer.cpu()(x), rtol=1e-4, atol=1e-4)


# --- Packed weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_every_change_of_the_layer_is_noticed(frozen):
    x = randn(2, 4, 7, 7)
    layer = quantized(dense_conv(torch.float32, kernel_size=3, padding=1), x, frozen=frozen)
    weight = layer.weight_scale if frozen else layer.latent
    other = quantized(dense_conv(torch.float32, kernel_size=3, padding=1), 3 * x, frozen=frozen)
    changes = [
        lambda: weight.mul_(2),
        lambda: layer.bias.add_(1),
        lambda: layer.set_input_range(-1, 1),
        lambda: layer.load_state_dict(other.state_dict()),
        lambda: setattr(layer.bias, "data", torch.zeros(8)),
        layer.unfreeze if frozen else layer.freeze,
        lambda: layer.approximate_(randn(8, 4, 3, 3)),
    ]
    with torch.no_grad():
        for change in changes:
            before = layer(x)
            change()
            assert_kernel_agrees(layer, x)
            torch.testing.assert_close(layer(x), layer.simulate(x), rtol=1e-5, atol=1e-4)
            assert change == changes[5] or not torch.equal(layer(x), before)


def test_what_training_changes_through_data_is_noticed():
    x = randn(2, 4, 7, 7)
    layer = quantized(dense_conv(torch.float32, kernel_size=3, padding=1), x)
    with torch.no_grad():
        before = layer(x)
        layer.train().bias.data += 1  # as old optimizers do
        torch.testing.assert_close(layer.eval()(x), before + 1)


@pytest.mark.parametrize("name", ["latent", "bias"])
def test_changes_below_a_parametrization_are_noticed(name):
    x = randn(2, 4, 7, 7)
    layer = quantized(dense_conv(torch.float32, kernel_size=3, padding=1), x, frozen=False)
    parametrize.register_parametrization(layer, name, nn.Tanh(), unsafe=True)
    with torch.no_grad():
        layer(x)
        layer.parametrizations[name].original.mul_(2)
        torch.testing.assert_close(layer(x), layer.simulate(x), rtol=1e-5, atol=1e-4)
    assert layer(x).requires_grad


def test_packed_weights_are_neither_copied_nor_saved_nor_kept():
    x = randn(2, 4, 7, 7)
    layer = quantized(dense_conv(torch.float32, kernel_size=3, padding=1), x)
    keys = list(layer.state_dict())
    with torch.no_grad():
        expected = layer(x)
        packed = weakref.ref(kernel_for(layer, x).weight)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)
        assert all(torch.equal(twin(x), expected) for twin in twins)
        assert list(layer.state_dict()) == keys
        layer.to(torch.float64)
        gc.collect()
        assert packed() is None
        layer.to(torch.float32)
        packed = weakref.ref(kernel_for(layer, x).weight)
        assert packed() is not None
        del layer
    gc.collect()
    assert packed() is None


def test_layers_made_in_inference_mode_are_simulated():
    x = randn(2, 4, 7, 7)
    with torch.inference_mode():
        layer = quantized(dense_conv(torch.float32, kernel_size=3), x)
        assert kernel_for(layer, x) is None
        layer.weight_scale.mul_(2)
        assert torch.equal(layer(x), layer.simulate(x))
