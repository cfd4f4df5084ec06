"""The two states of quantized layers, and training on the grid."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from lowrank_nn.layers import QuantConv2d, QuantLinear
from tests.layers.geometries import dense_conv
from tests.layers.quantizing import SCHEMES, dense_linear, pruned, randn, train


def quantized_layers(**options):
    x = randn(2, 4, 6, 6, dtype=torch.float32)
    conv = dense_conv(kernel_size=3, padding=1, dtype=torch.float32)
    for how in ("dense", "mask", "window and mask"):
        for scheme in SCHEMES:
            yield QuantConv2d.from_pretrained_layer(pruned(conv, how), scheme=scheme, **options), x
    linear = dense_linear(dtype=torch.float32)
    yield QuantLinear.from_pretrained_layer(pruned(linear, "mask"), **options), randn(5, 12, dtype=torch.float32)


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
