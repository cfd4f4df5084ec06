"""The code in README and docs runs as it stands."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.graph import attributes
from lowrank_nn.graph.rules import _call
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


def stand_ins():
    """What the pages take for granted, by the names that they use."""
    images = torch.randn(16, 3, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10)
    )
    return {
        "lnn": lnn,
        "torch": torch,
        "model": model,
        "SplitBlock": MyNet,
        "example_inputs": images[:1],
        "x": images[:1],
        "images": images,
        "batches": images.split(8),
        "train_loader": [(images, torch.arange(16) % 10)],
        "validation": images,
        "accuracy": lambda small, data: 100.0 - float((small(data) - model(data)).square().mean()),
        "rows": [{"method": "low rank", "accuracy": 90.0 - share, "params": 1 / share} for share in (2, 3)],
    }


def pages():
    """The pages with code that have no test of their own below."""
    own = ("filters_on_data", "troubleshooting", "write_your_own_layer")
    return sorted(path.stem for path in (ROOT / "docs").glob("*.md") if path.stem not in own and blocks(path))


@pytest.mark.parametrize("page", pages())
def test_the_code_of_every_page_runs(page, tmp_path, monkeypatch):
    if page == "planner":
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_call, "RULES", dict(_call.RULES))
    monkeypatch.setattr(attributes, "_UPDATES", dict(attributes._UPDATES))
    monkeypatch.setattr(torch.ops, "my_library", types.SimpleNamespace(gate=lambda x, y: x * y), raising=False)
    torch.manual_seed(0)
    names = stand_ins()
    lnn.save(names["model"], "small.lrnn")
    for block in blocks(f"docs/{page}.md"):
        exec(block, names)
        if "result" in names:
            names["report"] = names["result"].report
    if page == "planner":
        assert {path.name for path in tmp_path.glob("*.png")} == {"candidates.png", "spectra.png", "sweep.png"}
    if page == "distillation":
        assert torch.isfinite(names["loss"])
        assert not any(module._forward_hooks for module in names["student"].modules())


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


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile imports what says so
def test_the_page_on_troubles_quotes_the_errors_that_its_code_raises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    names = {"lnn": lnn, "torch": torch, "model": MyNet(), "images": images, "labels": labels, "example_inputs": images}
    names["result"] = types.SimpleNamespace(model=names["model"])
    page = (ROOT / "docs/troubleshooting.md").read_text()
    pairs = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, flags=re.DOTALL)
    assert len(pairs) == page.count("```python")
    for code, quoted in pairs:
        with pytest.raises(lnn.LowRankError) as caught:
            exec(code, names)
        assert f"{caught.typename}: {caught.value}".startswith(quoted.strip())


def test_the_page_on_troubles_lists_every_error_with_its_parent():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    errors = {name: value for name, value in vars(lnn).items() if name.endswith("Error")}
    listed = dict(re.findall(r"^\| `(\w+Error)` \|.*\| `(\w+)` \|$", page, flags=re.MULTILINE))
    assert set(listed) == set(errors) - {"LowRankError"}
    for name, parent in listed.items():
        assert parent in [base.__name__ for base in errors[name].__bases__]


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s:]+)\)", (ROOT / page).read_text())
    for target in targets:
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_the_recipes_to_choose_from_can_be_made():
    page = (ROOT / "docs/choosing.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| (.+?) \| [^|]+ \| [^|]+ \|$", page, flags=re.MULTILINE)
    codes = [code for row in rows for code in re.findall(r"`(.+?)`", row) if "..." not in code and code != "nn.Linear"]
    names = {**vars(lnn), "loader": [torch.zeros(1)], "metric": lambda model: 0.0}
    made = [eval(code, names) for code in codes]
    assert len(made) > 15


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
