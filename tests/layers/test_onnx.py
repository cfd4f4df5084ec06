"""Every layer exports to ONNX and computes the same there."""

import collections
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.layers import LAYERS
from lowrank_nn.layers._onednn import is_exact

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def export(model, x, path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(model, (x,), str(path), dynamo=True, verbose=False, **options)


class SideBySide(nn.Module):
    """Layers on the same input: an export takes a second, however small it is."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers)


def reference_outputs(layers, x, folder):
    """Return what onnx's reference implementation computes for each layer, from one file."""
    export(SideBySide(layers), x, folder / "layers.onnx")
    reference = onnx.reference.ReferenceEvaluator(str(folder / "layers.onnx"))
    return reference.run(None, {reference.input_names[0]: x.numpy()})


@pytest.mark.parametrize(
    ("dense", "shape"),
    [(nn.Linear(12, 8), (2, 12)), (nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 9, 9))],
    ids=["linear", "conv"],
)
def test_every_layer_computes_the_same_in_onnx(dense, shape, tmp_path):
    torch.manual_seed(0)
    dense.reset_parameters()
    x, classes = torch.randn(shape), [cls for cls in LAYERS.values() if cls.replaces is type(dense)]
    layers = [cls.from_pretrained_layer(dense.eval(), **cls.usual_options(dense)) for cls in classes]
    for cls, layer, found in zip(classes, layers, reference_outputs(layers, x, tmp_path), strict=True):
        expected = layer(x).detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=cls.__name__)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.fc = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Linear(256, 5),
        )

    def forward(self, x):
        x = self.stem(x).relu()
        return self.fc(self.body(x).relu().flatten(1))


def test_onnxruntime_runs_quantized_factors_in_integers_with_equal_predictions(tmp_path):
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(16, 3, 4, 4)
    small = quantized(model, x, lnn.Apply(lnn.TuckerConv2d, where="body", rank=(8, 8)))
    run, operators = started(small, x, tmp_path)
    found = run(x)
    with torch.no_grad():
        expected = small.requires_grad_(True)(x)
    tolerance = 0.03 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    first, second = expected.topk(2).values.unbind(1)
    clear = first - second > 2 * tolerance
    assert clear.sum() >= 8
    assert torch.equal(found[clear].argmax(1), expected[clear].argmax(1))
    assert operators["QLinearConv"] == 4
    stored = {
        tensor.data_type for tensor in onnx.load(str(tmp_path / "net.onnx")).graph.initializer if len(tensor.dims) > 1
    }
    assert stored == {onnx.TensorProto.INT8}


def conv(inner, outer, kernel_size=3, **options):
    return nn.Conv2d(inner, outer, kernel_size, padding=kernel_size // 2, **options)


class Residual(nn.Module):
    """Shortcuts with and without a convolution, a pooling."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = conv(3, 16), conv(16, 16), conv(16, 16)
        self.three, self.short, self.fc = conv(16, 32, stride=2), conv(16, 32, 1, stride=2), nn.Linear(32, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        y = self.two(F.relu(self.one(x)))
        y += x
        x = F.relu(y)
        return self.fc(F.relu(self.three(x) + self.short(x)).mean((2, 3)))


class Joined(nn.Module):
    """Branches that are joined, and joined again with what went into them."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = conv(3, 16), conv(16, 8, 1), conv(16, 8)
        self.last, self.fc = conv(32, 16, 1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = torch.cat([x, torch.cat([self.left(x).relu(), F.relu(self.right(x))], 1)], 1)
        return self.fc(self.last(x).relu().mean((2, 3)))


class OptionA(nn.Module):
    """Shortcuts without parameters where maps get smaller and channels more, as in ResNets for CIFAR."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = conv(3, 8), conv(8, 16, stride=2), conv(16, 16)
        self.three, self.four, self.fc = conv(16, 32, stride=2), conv(32, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.two(F.relu(self.one(x)))
        x = F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0) + y)
        y = self.four(F.relu(self.three(x)))
        return self.fc(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))).mean((2, 3)))


class Inverted(nn.Module):
    """A MobileNet's block: depthwise convolutions, a shortcut without activation behind it, other activations."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = conv(3, 8), nn.Linear(8, 5)
        self.clip, self.act = nn.ReLU6(inplace=True), nn.Hardswish()
        self.expand, self.depthwise, self.project = conv(8, 16, 1), conv(16, 16, groups=16), conv(16, 8, 1)
        self.last = conv(8, 8, 1)

    def forward(self, x):
        x = self.clip(self.stem(x))
        x = x + self.project(self.clip(self.depthwise(self.act(self.expand(x)))))
        return self.fc(self.act(self.last(x)).mean((2, 3)))


class Dense(nn.Module):
    """Linear layers, one with an activation that no engine computes in integers."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(48, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.three(F.silu(self.two(self.one(x.flatten(1)).relu())))


def quantized(model, x, *steps):
    recipe = [*steps, lnn.Quantize("int8", activations="int8")]
    return lnn.compress_model(model.eval(), x, recipe, calibration=[x], progress=False).model.eval()


def started(model, x, folder):
    """Return a function that runs the model in onnxruntime, for batches of any size, and how many operators it has."""
    runtime = pytest.importorskip("onnxruntime")
    export(model, x, folder / "net.onnx", dynamic_shapes=({0: torch.export.Dim("batch")},))
    options = runtime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    session = runtime.InferenceSession(str(folder / "net.onnx"), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(str(folder / "optimized.onnx")).graph.node
    name = session.get_inputs()[0].name

    def run(x):
        return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    return run, collections.Counter(node.op_type for node in nodes)


NETS = {
    "residual": (Residual, {"QLinearConv": 5, "QLinearAdd": 1, "QGemm": 1}),
    "option a": (OptionA, {"QLinearConv": 5, "QLinearAdd": 1, "QGemm": 1, "Pad": 2}),
    "joined": (Joined, {"QLinearConv": 4, "Concat": 2, "QGemm": 1, "Relu": 1}),
    "inverted": (Inverted, {"QLinearConv": 5, "QLinearAdd": 1, "QGemm": 1}),
    "dense": (Dense, {"QGemm": 3}),
}


@pytest.mark.skipif(not is_exact(255, 127), reason="layers are chained only where this machine has exact kernels")
@pytest.mark.parametrize("net", NETS)
def test_onnxruntime_computes_whole_networks_in_integers(net, tmp_path):
    make, expected = NETS[net]
    torch.manual_seed(0)
    x = torch.randn(16, 3, 4, 4) if net == "dense" else torch.randn(4, 3, 16, 16)
    model = make()
    small = quantized(model, x)
    run, operators = started(small, x, tmp_path)
    found = run(x)
    assert {name: operators[name] for name in expected} == expected
    assert not operators["Conv"] + operators["Gemm"]
    with torch.no_grad():
        eager, dense = small(x), model(x)
    error = (eager - dense).norm()
    assert (found - eager).norm() < 2 * error
    assert (found - dense).norm() < 2 * error
    torch.testing.assert_close(run(x[:1]), found[:1], rtol=0, atol=0.01 * float(found.abs().max()))


def test_biases_of_channels_that_are_nearly_zero_do_not_overflow(tmp_path):
    torch.manual_seed(0)
    x, model = torch.randn(16, 3, 4, 4), Block()
    with torch.no_grad():
        for layer, scale, bias in ((model.stem, 0, 0.5), (model.body, 1e-6, 0.5), (model.fc, 1e-12, 30.0)):
            layer.weight[0] *= scale
            layer.bias[0] = bias
    small = quantized(model, x)
    found = started(small, x, tmp_path)[0](x)
    with torch.no_grad():
        expected = small(x)
    torch.testing.assert_close(found[:, 0], torch.full((16,), 30.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], rtol=0, atol=0.03 * float(expected[:, 1:].abs().max()))


def test_other_schemes_are_exported_too(tmp_path):
    torch.manual_seed(0)
    dense, x = nn.Conv2d(4, 6, 3).eval(), torch.randn(2, 4, 7, 7)
    schemes = [{"scheme": "affine"}, {"activation_bits": 5}, {"frozen": False}, {"bits": 3}]
    options = [{"activation_bits": 8, "inputs": x} | scheme for scheme in schemes]
    layers = [lnn.QuantConv2d.from_pretrained_layer(dense, **chosen) for chosen in options]
    for scheme, layer, found in zip(schemes, layers, reference_outputs(layers, x, tmp_path), strict=True):
        expected = layer.simulate(x).detach().numpy()
        atol = 1e-4 if layer.bits == 8 else 1e-2
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=atol, err_msg=str(scheme))
