"""Every layer exports to ONNX and computes the same there."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

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
