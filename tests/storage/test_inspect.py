import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.__main__ import main
from lowrank_nn.errors import FileFormatError
from lowrank_nn.layers import SVDLinear
from lowrank_nn.storage import inspect, save, stored_bytes
from tests.storage.models import MaskedLinear, compressed_net, every_encoding, masked_linear, registered, seeded

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def net():
    return every_encoding()


@pytest.fixture(scope="module")
def path(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "a.lrnn"
    save(net, path)
    return path


def test_all_that_is_in_a_file(net, path):
    found = lnn.inspect(path)
    assert [(layer.path, layer.name) for layer in found.layers] == [
        ("int8", "QuantLinear"),
        ("pruned", "PrunedConv2d"),
        ("both", "QuantConv2d"),
        ("factors", "TuckerConv2d"),
        ("factors.core", "QuantConv2d"),
    ]
    assert found.layers[3].config["rank"] == (4, 3)
    state = net.state_dict()
    assert [tensor.key for tensor in found.tensors] == [key for key in state if key != "tied"]
    for tensor in found.tensors:
        value = state[tensor.key]
        assert tensor.shape == tuple(value.shape)
        assert tensor.full_bytes == value.numel() * value.element_size()
    assert {tensor.key: tensor.stored_bytes for tensor in found.tensors} == stored_bytes(net)
    assert {tensor.key: tensor.tied for tensor in found.tensors if tensor.tied} == {"few": ("tied",)}
    assert found.file_bytes == path.stat().st_size == found.stored_bytes + found.overhead
    assert found.version == 1


def test_as_json(path):
    found = inspect(path)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["file_bytes"] == path.stat().st_size
    assert read["stored_bytes"] == sum(tensor["stored_bytes"] for tensor in read["tensors"])
    assert read["layers"][3]["config"]["rank"] == [4, 3]
    assert {tensor["encoding"] for tensor in read["tensors"]} >= {
        "whole",
        "gaps (rans)",
        "where the mask is, 4 bits (rans)",
    }


def test_as_text(path):
    text = str(inspect(path))
    lines = text.split("\n")
    assert max(map(len, lines)) <= 120
    assert lines[0].endswith(f"format 1, {path.stat().st_size:,} bytes, {inspect(path).overhead:,} of them no values")
    assert "factors         TuckerConv2d  rank=(4,3)" not in text  # columns are as wide as they must be
    assert "factors       TuckerConv2d  rank=(4,3)" in text
    size = next(tensor.stored_bytes for tensor in inspect(path).tensors if tensor.key == "wide")
    assert ["wide", "I32", "60x50", "12", "bits", "(rans)", f"{size:,}", "12,000"] in [line.split() for line in lines]
    assert "few = tied: one tensor" in text
    assert f"{inspect(path).stored_bytes:,}" in lines[-2]


def test_long_names_and_many_options_stay_within_120_columns(tmp_path):
    model = nn.Sequential(seeded(lambda: SVDLinear.from_pretrained_layer(nn.Linear(20, 20), rank=3)))
    for i in range(40):
        model = nn.ModuleDict({f"a_rather_long_name_{i}": model})
    save(model, tmp_path / "a.lrnn")
    lines = str(inspect(tmp_path / "a.lrnn")).split("\n")
    assert max(map(len, lines)) <= 120
    assert any("_0.0.reduce.weight " in line and "..." in line for line in lines)


def test_models_that_are_a_layer_share_layers_or_hold_nothing(tmp_path):
    layer = SVDLinear.from_pretrained_layer(nn.Linear(20, 10), rank=3)
    save(layer, tmp_path / "a.lrnn")
    assert "(model)  SVDLinear  rank=3" in str(inspect(tmp_path / "a.lrnn"))
    save(nn.ModuleList([layer, layer]), tmp_path / "a.lrnn")
    assert "0 = 1: one layer" in str(inspect(tmp_path / "a.lrnn"))
    save(nn.ReLU(), tmp_path / "a.lrnn")
    assert str(inspect(tmp_path / "a.lrnn")).split("\n")[-1].split() == ["total", "0", "0"]


def test_no_layer_class_is_needed(tmp_path):
    with registered(MaskedLinear):
        save(nn.Sequential(masked_linear(4, 4)), tmp_path / "a.lrnn")
    text = str(inspect(tmp_path / "a.lrnn"))
    assert "MaskedLinear  in_features=4 out_features=4 scale=0.5 bias=True" in text


def test_damaged_files(path, tmp_path):
    data = path.read_bytes()
    broken = bytearray(data)
    broken[1000] ^= 1
    (tmp_path / "a.lrnn").write_bytes(broken)
    with pytest.raises(
        FileFormatError, match=r"inspect: '.*' is damaged: no match with the checksums of 'whole.weight'"
    ):
        inspect(tmp_path / "a.lrnn")
    (tmp_path / "a.lrnn").write_bytes(data[:-1])
    with pytest.raises(FileFormatError, match=r"inspect: .*truncated"):
        inspect(tmp_path / "a.lrnn")


def test_names_that_a_terminal_cannot_show(tmp_path, monkeypatch):
    model = nn.ModuleDict({"\u00e4\x1b[31m": nn.Linear(3, 2)})
    model.register_buffer("\ud800", torch.ones(3))
    save(model, tmp_path / "odd.lrnn")
    assert str(inspect(tmp_path / "odd.lrnn")).isascii() is False
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert main(["inspect", str(tmp_path / "odd.lrnn")]) == 0
    sys.stdout.flush()
    assert all(name in printed.getvalue() for name in (rb"\xe4\x1b[31m.weight", rb"\ud800"))


def test_the_command_line(path, tmp_path, capsys):
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr() == (f"{inspect(path)}\n", "")
    assert main(["inspect", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(path)
    for bad in (ROOT / "README.md", tmp_path / "none.lrnn", tmp_path):
        assert main(["inspect", str(bad)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert str(bad) in err


def test_the_command_line_in_a_process_of_its_own(tmp_path):
    save(compressed_net(), tmp_path / "a.lrnn")
    command = [sys.executable, "-m", "lowrank_nn", "inspect", str(tmp_path / "a.lrnn")]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert "TuckerConv2d" in done.stdout
    (tmp_path / "a.lrnn").write_bytes(b"damaged, for sure")
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


@pytest.mark.cuda
def test_a_file_from_the_gpu(tmp_path, device):
    save(compressed_net().to(device), tmp_path / "a.lrnn")
    save(compressed_net(), tmp_path / "b.lrnn")
    assert str(inspect(tmp_path / "a.lrnn")).replace("a.lrnn", "b.lrnn") == str(inspect(tmp_path / "b.lrnn"))
