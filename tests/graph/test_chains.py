"""Chains of quantized layers: the model computes the same, and nobody outside sees that it does so in integers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.graph import call_model
from lowrank_nn.graph.inputs import tensors
from lowrank_nn.layers._deferred import Deferred
from lowrank_nn.layers._integer import IntegerLayer
from lowrank_nn.layers._onednn import CodeGrid, PackedWeight, is_exact
from tests.zoo import ZOO

pytestmark = pytest.mark.skipif(not is_exact(255, 127), reason="no exact integer kernels on this machine")


def conv(inner, outer, kernel_size=3, seed=0):
    layer = nn.Conv2d(inner, outer, kernel_size, padding=kernel_size // 2, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.normal_(0, (2 / layer.weight[0].numel()) ** 0.5, generator=generator)
        layer.bias.normal_(0, 0.1, generator=generator)
    return layer


def image(*shape):
    return torch.randn(shape or (2, 4, 12, 12), generator=torch.Generator().manual_seed(3))


def quantized(model, x, *steps):
    recipe = [*steps, lnn.Quantize("int8", activations="int8")]
    return lnn.compress_model(model.eval(), x, recipe, calibration=[x], progress=False).model.eval()


def unchained(model):
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, IntegerLayer):
            layer.chained = False
    return model


def chained_in(model):
    return {path for path, layer in model.named_modules() if isinstance(layer, IntegerLayer) and layer.chained}


def outputs_of(model, x):
    with torch.no_grad():
        return list(tensors(call_model(model, x)))


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm().clamp(min=1e-9))


def test_quantize_keeps_the_ranges_of_outputs_and_files_do_too(tmp_path):
    model, x = nn.Sequential(conv(4, 8), nn.ReLU(), conv(8, 4, seed=1)), image()
    small = quantized(model, x)
    with torch.no_grad():
        first = model[0](x)
    expected = [first.min(), first.max()]
    torch.testing.assert_close(torch.tensor(small[0].output_range), torch.tensor(expected), rtol=1e-5, atol=0)
    lnn.save(small, tmp_path / "small.lnn")
    assert lnn.load(tmp_path / "small.lnn", model)[0].output_range == small[0].output_range


class Residual(nn.Module):
    """A shortcut, a shortcut with a convolution, a pooling and branches that are joined."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = conv(4, 8), conv(8, 8, seed=1), conv(8, 8, seed=2)
        self.three, self.short = conv(8, 8, seed=3), conv(8, 8, 1, seed=4)
        self.left, self.right, self.last = conv(8, 8, 1, seed=5), conv(8, 4, seed=6), conv(12, 8, 1, seed=7)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(self.two(F.relu(self.one(x))) + x)
        x = F.relu(self.three(x) + self.short(x))
        x = torch.cat([self.left(x), F.relu(self.right(x))], 1)
        return self.fc(self.last(x).mean((2, 3)))


def test_shortcuts_poolings_and_branches_stay_in_integers():
    x = image()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = quantized(Residual(), x)
    assert chained_in(small) == {"stem", "one", "two", "three", "short", "left", "right", "last"}
    (found,), (expected,) = outputs_of(small, x), outputs_of(unchained(small), x)
    assert type(found) is torch.Tensor
    assert relative_error(found, expected) < 0.03


def test_every_kernel_of_a_chain_returns_bytes(monkeypatch):
    model, x = nn.Sequential(conv(4, 8), nn.ReLU(), conv(8, 8, seed=1), nn.ReLU6(), conv(8, 3, seed=2)), image()
    small, outputs = quantized(model, x), []
    run = PackedWeight.run

    def watched(self, codes, out, *activation):
        outputs.append((codes.dtype, out is None, *activation))
        return run(self, codes, out, *activation)

    outputs_of(small, x)
    monkeypatch.setattr(PackedWeight, "run", watched)
    outputs_of(small, x)
    none, relu, relu6 = ("none", ()), ("relu", ()), ("hardtanh", (0.0, 6.0))
    assert outputs == [(torch.uint8, False, relu), (torch.uint8, False, relu6), (torch.uint8, True, none)]


@pytest.mark.parametrize("cls", [lnn.TuckerConv2d, lnn.SVDConv2d, lnn.SpatialSVDConv2d, lnn.CPConv2d])
def test_the_factors_of_a_layer_are_chained(cls):
    x, rank = image(), (4, 4) if cls is lnn.TuckerConv2d else 4
    model = nn.Sequential(conv(4, 8), nn.ReLU(), conv(8, 8, seed=1), nn.Flatten(), nn.Linear(8 * 144, 5))
    small = quantized(model, x, lnn.Apply(cls, where="2", rank=rank))
    *first, last = (path for path, _ in small.named_modules() if path.startswith("2."))
    assert set(first) <= chained_in(small)
    assert "4" not in chained_in(small)
    assert last in chained_in(small)
    (found,), (expected,) = outputs_of(small, x), outputs_of(unchained(small), x)
    assert relative_error(found, expected) < 2e-2


class OptionA(nn.Module):
    """A shortcut without parameters where maps get smaller and channels more."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = conv(4, 8), conv(8, 16, seed=1), conv(16, 16, seed=2)
        self.one.stride = (2, 2)
        self.last, self.fc = conv(16, 8, seed=3), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.two(F.relu(self.one(x)))
        x = F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) + y)
        return self.fc(self.last(x).mean((2, 3)))


def test_shortcuts_of_option_a_stay_in_bytes_throughout(monkeypatch):
    x, floats = image(), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = quantized(OptionA(), x)
    assert chained_in(small) == {"stem", "one", "two", "last"}
    (found,), (expected,) = outputs_of(small, x), outputs_of(unchained(small), x)
    assert relative_error(found, expected) < 0.02
    encode, decode = CodeGrid.encode, CodeGrid.decode
    monkeypatch.setattr(CodeGrid, "encode", lambda grid, y: (floats.append(y), encode(grid, y))[1])
    monkeypatch.setattr(CodeGrid, "decode", lambda grid, y: (floats.append(y), decode(grid, y))[1])
    assert torch.equal(outputs_of(small, x)[0], found)
    assert [tuple(y.shape) for y in floats] == [x.shape, (2, 8)]  # the image, and what the linear layer is given


class TwoOutputs(nn.Module):
    """Returns what a quantized layer takes too, in a container; uses another output as integers and as floats."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = conv(4, 4), conv(4, 4, seed=1), conv(4, 4, seed=2), conv(4, 4, seed=3)

    def forward(self, x):
        features = F.relu(self.a(x))
        y = F.relu(self.b(features))
        z = self.c(y)
        return {"features": features, "rest": [self.d(z), y.sigmoid()]}


def test_outputs_and_floats_wanted_after_rounding_are_not_chained():
    x = image()
    small = quantized(TwoOutputs(), x)
    assert chained_in(small) == {"c"}
    assert all(type(tensor) is torch.Tensor for tensor in outputs_of(small, x))
    for found, expected in zip(outputs_of(small, x), outputs_of(unchained(small), x), strict=True):
        assert relative_error(found, expected) < 1e-2


def test_flags_are_all_that_changes():
    x = image()
    small = unchained(quantized(Residual(), x)).train()
    small.one.eval()
    hook = small.two.register_forward_hook(lambda *_: None)
    state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    before = [(dict(vars(module)), module.training) for module in small.modules()]
    paths = lnn.chain_quantized(small, x)
    assert set(paths) == chained_in(small) != set()
    for module, (attributes, training) in zip(small.modules(), before, strict=True):
        now = {name: value for name, value in vars(module).items() if name != "chained"}
        assert now == {name: value for name, value in attributes.items() if name != "chained"}
        assert module.training == training
    assert all(torch.equal(tensor, state[name]) for name, tensor in small.state_dict().items())
    hook.remove()


def test_layers_without_kernels_are_not_chained():
    x = image()
    model = nn.Sequential(conv(4, 8), nn.ReLU(), conv(8, 8, seed=1))
    recipe = lnn.Quantize("int8", activations="int8", scheme="affine")
    result = lnn.compress_model(model.eval(), x, recipe, calibration=[x], progress=False)
    assert chained_in(result.model) == set()
    assert lnn.chain_quantized(model, x) == ()
    reason = "Quantize: simulated in floating point: the kernels have no zero point for weights (scheme='affine')"
    assert result.report.remarks[reason] == ("0", "2")


def test_chains_are_saved(tmp_path):
    x = image()
    small = quantized(Residual(), x)
    lnn.save(small, tmp_path / "net.lrnn")
    loaded = lnn.load(tmp_path / "net.lrnn", Residual()).eval()
    assert chained_in(loaded) == chained_in(small)
    assert torch.equal(outputs_of(loaded, x)[0], outputs_of(small, x)[0])


def test_another_way_through_the_model_is_right_too():
    """Chained for what was seen; then the output of a chained layer is returned, and hooks look at others."""
    x = image()
    small = quantized(Residual(), x)
    seen = []
    small.one.register_forward_hook(lambda module, args, output: seen.append(output * 2))
    with torch.no_grad():
        features = small.stem(x)
        assert isinstance(features, Deferred)
        torch.testing.assert_close(features + 0, unchained(small).stem(x), rtol=1e-5, atol=1e-5)
        plain = unchained(small)
        torch.testing.assert_close(small(x), plain(x), rtol=0, atol=0.1 * float(plain(x).abs().max()))
    assert type(seen[0]) is torch.Tensor


def test_recorders_see_every_layer_return_its_output():
    x = image()
    small = quantized(Residual(), x)
    dense = lnn.compare(small, small, x)
    assert dense.rows
    assert torch.export.export(small, (x,)).module()(x).shape == (2, 5)


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_computes_the_same_in_chains(name):
    model, inputs = ZOO[name]()
    small = quantized(model, inputs, lnn.FoldBatchNorm())
    found, expected = outputs_of(small, inputs), outputs_of(unchained(small), inputs)
    assert [type(tensor) for tensor in found] == [type(tensor) for tensor in expected]
    for y, reference in zip(found, expected, strict=True):
        if reference.is_floating_point():
            assert relative_error(y, reference) < 0.05


def test_factors_that_somebody_watches_are_called():
    x, calls = image(), []
    model = nn.Sequential(conv(4, 8), nn.ReLU(), conv(8, 8, seed=1))
    small = quantized(model, x, lnn.Apply(lnn.TuckerConv2d, where="2", rank=(4, 4)))
    (expected,) = outputs_of(small, x)
    small[2].core.register_forward_hook(lambda *_: calls.append("core"))
    assert torch.equal(outputs_of(small, x)[0], expected)
    forward = small[2].reduce.forward
    small[2].reduce.forward = lambda x: (calls.append("reduce"), forward(x))[1]
    assert torch.equal(outputs_of(small, x)[0], expected)
    assert calls == ["core", "reduce", "core"]
