"""The code in README and docs runs as it stands."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.testing import layer_checks, run_check

ROOT = Path(__file__).parent.parent


class MyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        self.fc = nn.Linear(32, 40)

    def forward(self, x):
        return self.fc(self.layer1(self.conv1(x).relu()).mean((2, 3)))


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    names = {
        "lnn": lnn,
        "MyNet": MyNet,
        "model": MyNet(),
        "example_inputs": images,
        "train_loader": [(images, labels)],
        "batches": torch.randn(16, 3, 8, 8).split(8),
        "dense_conv": nn.Conv2d(64, 32, 3),
        "dense_fc": nn.Linear(64, 32),
    }
    for block in blocks("README.md"):
        exec(block.replace("import lowrank_nn as lnn", ""), names)
    assert "TuckerConv2d" in repr(names["conv"])
    recipe = names["recipe"]  # the last one: layers by hand
    small = lnn.compress_model(MyNet(), images, recipe, progress=False).model
    assert isinstance(small.layer1[0], lnn.TuckerConv2d)
    assert isinstance(small.fc, nn.Linear)  # rank 32 of a 32 x 40 weight would save nothing
    assert "compression rate" in capsys.readouterr().out


def test_the_page_on_filters_runs():
    torch.manual_seed(0)
    images = torch.randn(200, 3, 8, 8)
    names = {"lnn": lnn, "model": MyNet(), "images": images, "train_loader": [(images, torch.arange(200) % 40)]}
    result, recipe = blocks("docs/filters_on_data.md")
    exec(result, names)
    assert names["result"].report.compression_rate["macs"] >= 2
    exec(recipe, names)
    trained = lnn.compress_model(names["model"], images[:1], names["recipe"], progress=False)
    assert trained.report.compression_rate["params"] > 1.3


@pytest.fixture
def scaled_linear():
    module = types.ModuleType("layer_of_the_guide")  # pickle looks classes up by module
    sys.modules[module.__name__] = module
    exec(blocks("docs/write_your_own_layer.md")[0], vars(module))
    yield module.ScaledLinear
    del lnn.LAYERS["ScaledLinear"], sys.modules[module.__name__]


def test_the_layer_of_the_guide_keeps_the_contract(scaled_linear):
    kept = sum(run_check(cls, case, check) for cls, case, check in layer_checks([scaled_linear]))
    assert kept > 100


def test_the_layer_of_the_guide_is_walked_and_saved(scaled_linear, tmp_path):
    images = torch.randn(2, 3, 8, 8)
    small = lnn.compress_model(MyNet(), images, [lnn.Apply(scaled_linear, where="fc")], progress=False).model
    assert isinstance(small.fc, scaled_linear)
    lnn.save(small, tmp_path / "small.lrnn")
    loaded = lnn.load(tmp_path / "small.lrnn", MyNet())
    torch.testing.assert_close(loaded(images), small(images), rtol=0, atol=0)
