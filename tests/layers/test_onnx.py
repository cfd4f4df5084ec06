"""Every layer exports to ONNX and computes the same there."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.layers import LAYERS

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("cls", LAYERS.values(), ids=LAYERS)
def test_onnx_runtime_agrees(cls, tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(12, 8) if cls.replaces is nn.Linear else nn.Conv2d(8, 12, 3, stride=2, padding=1)
    x = torch.randn(2, 12) if cls.replaces is nn.Linear else torch.randn(2, 8, 9, 9)
    small = cls.from_pretrained_layer(layer.eval(), **cls.usual_options(layer))
    path = tmp_path / "layer.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(small, (x,), str(path), dynamo=True, verbose=False)
    reference = onnx.reference.ReferenceEvaluator(str(path))
    (found,) = reference.run(None, {reference.input_names[0]: x.numpy()})
    np.testing.assert_allclose(found, small(x).detach().numpy(), rtol=1e-4, atol=1e-5)


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


def export(model, x, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(model, (x,), str(path), dynamo=True, verbose=False)


@pytest.mark.parametrize("tucker", [False, True], ids=["dense", "tucker"])
def test_onnxruntime_runs_quantized_models_in_integers_with_equal_predictions(tucker, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(16, 3, 4, 4)
    first = [lnn.Apply(lnn.TuckerConv2d, where="body", rank=(8, 8))] if tucker else []
    step = lnn.Quantize("int8", activations="int8")
    small = lnn.compress_model(model, x, [*first, step], calibration=[x], progress=False).model.eval()
    export(small, x, tmp_path / "net.onnx")
    options = runtime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = small.requires_grad_(True)(x).numpy()
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))
    np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())
    operators = [node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    assert operators.count("QLinearConv") == (4 if tucker else 2)
    stored = {
        tensor.data_type for tensor in onnx.load(str(tmp_path / "net.onnx")).graph.initializer if len(tensor.dims) > 1
    }
    assert stored == {onnx.TensorProto.INT8}


@pytest.mark.parametrize("options", [{"scheme": "affine"}, {"activation_bits": 5}, {"frozen": False}, {"bits": 3}])
def test_other_schemes_are_exported_too(options, tmp_path):
    torch.manual_seed(0)
    dense, x = nn.Conv2d(4, 6, 3).eval(), torch.randn(2, 4, 7, 7)
    layer = lnn.QuantConv2d.from_pretrained_layer(dense, **{"activation_bits": 8, "inputs": x} | options)
    export(layer, x, tmp_path / "layer.onnx")
    reference = onnx.reference.ReferenceEvaluator(str(tmp_path / "layer.onnx"))
    (found,) = reference.run(None, {reference.input_names[0]: x.numpy()})
    np.testing.assert_allclose(found, layer.simulate(x).detach().numpy(), rtol=1e-4, atol=1e-4)
