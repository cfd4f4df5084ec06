"""Models and places that save refuses, and writes that fail half-way."""

import os

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from lowrank_nn.errors import OptionError
from lowrank_nn.layers import QuantLinear, SVDLinear
from lowrank_nn.storage import load, packed_size, save


class Unregistered(SVDLinear):
    pass


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


def unwritable_models():
    yield nn.Linear(2, 2, device="meta"), ["'weight' is on the meta device", "'bias' is on the meta device"]
    yield nn.Sequential(weight_norm(nn.Linear(2, 2))), ["'0' has parametrized tensors", "remove_parametrizations"]
    yield Unregistered(4, 4, rank=2), ["'' is a Unregistered, which is not registered"]
    yield Stateful(2, 2), ["'_extra_state' is extra state"]
    odd = SVDLinear(4, 4, rank=2)
    odd.rank = float("nan")
    yield odd, ["config that is not JSON"]
    yield nn.LazyLinear(3), ["no values yet"]
    yield nn.Sequential(pruned_by_torch(SVDLinear(4, 4, rank=2))), ["'0' (SVDLinear) was changed", "expand.weight_mask"]
    extended = SVDLinear(4, 4, rank=2)
    extended.register_buffer("scale", torch.ones(3))
    yield nn.Sequential(extended), ["'0' (SVDLinear) was changed: scale"]
    other = SVDLinear(4, 4, rank=2)
    other.reduce = nn.Linear(4, 3, bias=False)
    yield nn.Sequential(other), ["was changed: reduce.weight"]


def pruned_by_torch(layer):
    prune.l1_unstructured(layer.expand, "weight", amount=0.5)
    return layer


def test_layers_changed_back_can_be_written(tmp_path):
    layer = pruned_by_torch(SVDLinear(4, 4, rank=2))
    prune.remove(layer.expand, "weight")
    layer.expand = QuantLinear.from_pretrained_layer(layer.expand)
    save(nn.Sequential(layer), tmp_path / "a.lrnn")
    back = load(tmp_path / "a.lrnn", nn.Sequential(nn.Linear(4, 4)))
    assert torch.equal(back[0].weight, layer.weight)


@pytest.mark.parametrize(("model", "messages"), list(unwritable_models()))
@pytest.mark.parametrize("function", [packed_size, lambda model: save(model, "never.lrnn")])
def test_models_that_cannot_be_written(function, model, messages):
    with pytest.raises(OptionError) as caught:
        function(model)
    assert all(message in str(caught.value) for message in messages)


def test_a_missing_folder_and_a_folder(net, tmp_path):
    with pytest.raises(OptionError, match="no folder"):
        save(net, tmp_path / "none" / "a.lrnn")
    with pytest.raises(OptionError, match="is a folder"):
        save(net, tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_pipes_and_devices_are_not_replaced(net, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OptionError, match="is a device or a pipe"):
        save(net, pipe)
    assert pipe.is_fifo()
    assert [*tmp_path.iterdir()] == [pipe]


def test_a_write_that_fails_leaves_the_old_file(net, tmp_path, monkeypatch):
    path = tmp_path / "a.lrnn"
    path.write_bytes(b"the old file")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        save(net, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.lrnn"]
    assert path.read_bytes() == b"the old file"


def test_links_and_permissions(net, tmp_path):
    real, link, plain = tmp_path / "real.lrnn", tmp_path / "link.lrnn", tmp_path / "plain"
    plain.touch()
    real.touch()
    link.symlink_to(real)
    save(net, link)
    assert link.is_symlink()
    assert real.stat().st_size == packed_size(net)
    assert real.stat().st_mode == plain.stat().st_mode
