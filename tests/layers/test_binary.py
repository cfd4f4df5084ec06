"""Binary layers: signs and scales, straight-through training, bits in files."""

import itertools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_nn as lnn
from lowrank_nn.layers.binary import sign_through
from lowrank_nn.storage import stored_bytes


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def test_signs_and_scales_are_the_nearest_there_are(linear):
    layer = lnn.BinaryLinear.from_pretrained_layer(linear)
    for row, ours in zip(linear.weight.detach(), layer.weight, strict=True):
        least = min(
            float((row - scale * torch.tensor(signs)).square().sum())
            for signs in itertools.product((-1.0, 1.0), repeat=6)
            for scale in [(row * torch.tensor(signs)).mean()]  # the best scale of these signs
        )
        assert float((row - ours).square().sum()) == pytest.approx(least, rel=1e-5)


def test_the_gradient_is_that_of_scale_and_signs(linear):
    """d/dw_i of sum_j g_j alpha s_j is s_i / n sum_j g_j s_j (the scale) + alpha g_i (the sign as the identity)."""
    linear.weight.data[0, 0] = 1.5
    layer = lnn.BinaryLinear.from_pretrained_layer(linear, frozen=False)
    g = torch.randn(4, 6)
    (layer.weight * g).sum().backward()
    w, signs = linear.weight.detach(), linear.weight.detach().sign()
    through_scale = signs * (g * signs).mean(1, keepdim=True)
    through_sign = w.abs().mean(1, keepdim=True) * g * (w.abs() <= 1)
    torch.testing.assert_close(layer.latent.grad, through_scale + through_sign)


def test_signs_are_exact_and_zero_counts_as_plus():
    x = torch.tensor([-1.7, -1e-30, -0.0, 0.0, 0.3, 2.0], requires_grad=True)
    y = sign_through(x)
    assert y.tolist() == [-1, -1, 1, 1, 1, 1]
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


class Widths(TorchDispatchMode):
    """Notes how many bytes an entry of each result takes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        self.seen.add(y.element_size())
        return y


def test_nothing_wider_than_the_weight_is_made_on_the_way():
    with Widths() as widths:
        sign_through(torch.randn(3, 4, dtype=torch.float16, requires_grad=True)).sum().backward()
    assert max(widths.seen) == 2


def test_freezing_and_unfreezing_change_nothing(linear):
    layer = lnn.BinaryLinear.from_pretrained_layer(linear, frozen=False)
    x = torch.randn(5, 6)
    expected = layer(x).detach()
    assert list(layer.freeze().state_dict()) == ["bias", "signs", "weight_scale"]
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(layer.unfreeze()(x), expected)
    assert list(layer.state_dict()) == ["latent", "bias"]
    assert layer.unfreeze() is layer
    assert layer.freeze().freeze().frozen


def test_binary_inputs_are_signs_times_a_mean():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    layer = lnn.BinaryConv2d.from_pretrained_layer(conv, binary_inputs=True)
    x = torch.randn(2, 3, 5, 5)
    seen = torch.stack([sample.sign() * sample.abs().mean() for sample in x])
    torch.testing.assert_close(layer(x), layer.to_dense_layer()(seen))


def test_files_hold_a_bit_per_weight(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(lnn.BinaryConv2d.from_pretrained_layer(nn.Conv2d(16, 32, 3)))
    assert stored_bytes(model) == {"0.signs": 16 * 32 * 9 // 8, "0.weight_scale": 128, "0.bias": 128}
    lnn.save(model, tmp_path / "small.lrnn")
    loaded = lnn.load(tmp_path / "small.lrnn", nn.Sequential(nn.Conv2d(16, 32, 3)))
    x = torch.randn(2, 16, 6, 6)
    assert torch.equal(loaded(x), model(x))


def test_training_in_a_recipe_ends_with_bits():
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16 - 0.5, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.BatchNorm1d(100), nn.Hardtanh(), nn.Linear(100, 10))
    batches = list(zip(images[:1200].split(100), labels[:1200].split(100), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for x, y in batches * 10:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    binary = lnn.Apply(lnn.BinaryLinear, binary_inputs=True)
    results = [
        lnn.compress_model(model, images[:2], recipe, progress=False).model
        for recipe in ([binary], [binary, lnn.FineTune(batches, epochs=6, lr=3e-3)])
    ]
    right = [float((net(images[1200:]).argmax(1) == labels[1200:]).float().mean()) for net in results]
    assert right[1] > right[0] + 0.03
    assert all(layer.frozen for net in results for layer in (net[0], net[3]))


def test_pruned_layers_are_refused(linear):
    pruned = lnn.PrunedLinear.from_pretrained_layer(linear, sparsity=0.5)
    with pytest.raises(lnn.UnsupportedLayerError, match="BinaryLinear: the layer is a PrunedLinear already"):
        lnn.BinaryLinear.from_pretrained_layer(pruned)
