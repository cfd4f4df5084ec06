"""Networks that lost channels: saved, and rebuilt on a fresh model of the full size."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.errors import FileFormatError, OptionError
from lowrank_nn.graph.attributes import register_attributes
from lowrank_nn.graph.groups import ChannelGroup, Member
from lowrank_nn.graph.surgery import Removal, remove_units
from tests.graph.hand_groups import chain_groups, each
from tests.storage.forge import forged
from tests.zoo._seeded import seeded

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make_net():
    layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 24, 3, stride=2), nn.Flatten(), nn.Linear(216, 20), nn.Linear(20, 4))


def dense(seed=0):
    return seeded(lambda: (make_net(), None))()[0]


def pruned():
    model = dense()
    remove_units(model, [Removal(group, (0, 3, 5)) for group in chain_groups(model) if not group.frozen])
    return model


def same(one, two):
    states = one.state_dict(), two.state_dict()
    return states[0].keys() == states[1].keys() and all(states[0][key].equal(states[1][key]) for key in states[0])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "small.lrnn"


def fresh_net():
    torch.manual_seed(1)
    return make_net().eval()


def test_a_smaller_network_comes_back(path):
    model = pruned()
    lnn.save(model, path)
    fresh = fresh_net().to(memory_format=torch.channels_last)
    fresh[3].weight.requires_grad_(False)
    loaded = lnn.load(path, fresh)
    assert loaded is fresh
    assert same(loaded, model)
    assert torch.equal(loaded(X), model(X))
    assert (loaded[3].in_channels, loaded[3].out_channels, loaded[1].num_features) == (13, 21, 13)
    assert loaded[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert [p.requires_grad for p in loaded[3].parameters()] == [False, True]
    lnn.save(loaded, path)
    assert same(lnn.load(path, fresh_net()), model)


def test_into_a_model_without_memory(path):
    lnn.save(pruned(), path)
    assert torch.equal(lnn.load(path, fresh_net().to("meta")).eval()(X), pruned()(X))


def test_in_a_fresh_process(path):
    model = pruned()
    lnn.save(model, path)
    torch.save({"x": X, "y": model(X)}, path.with_suffix(".pt"))
    code = f"""
import torch, lowrank_nn as lnn
from tests.storage.test_resized import make_net
data = torch.load({str(path.with_suffix(".pt"))!r})
assert torch.equal(lnn.load({str(path)!r}, make_net().eval())(data["x"]), data["y"])
"""
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=root, env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    )


FILTERS = lnn.Prune(0.25, granularity="filter", but_not="6")


@pytest.mark.parametrize(
    "recipe",
    [
        [FILTERS, lnn.LowRank(rank=lnn.Energy(0.6))],
        [lnn.LowRank(rank=lnn.Energy(0.6)), FILTERS],
        [FILTERS, lnn.FoldBatchNorm()],
        [lnn.FoldBatchNorm(), FILTERS],
        [FILTERS, lnn.Prune(0.5)],
        [FILTERS, lnn.Quantize("int8")],
    ],
)
def test_with_other_steps(path, recipe):
    result = lnn.compress_model(dense(), X, recipe, progress=False)
    assert result.report.after.params < 0.8 * result.report.before.params
    lnn.save(result.model, path)
    loaded = lnn.load(path, fresh_net())
    assert same(loaded, result.model)
    assert torch.equal(loaded(X), result.model(X))


def test_heads(path):
    def make():
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(12, 3, 16, batch_first=True).eval()

    qkv = tuple(tuple(part * 12 + head * 4 + i for part in range(3) for i in range(4)) for head in range(3))
    members = [
        ("in_proj_weight", 0, qkv, "out"),
        ("in_proj_bias", 0, qkv, "out"),
        ("out_proj.weight", 1, each(3, 4), "in"),
    ]
    heads = ChannelGroup("a", 3, tuple(Member(f"self_attn.{name}", *rest) for name, *rest in members))
    model = make()
    remove_units(model, [Removal(heads, (1,))])
    lnn.save(model, path)
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        assert torch.equal(lnn.load(path, make())(x), model(x))
    other = make()
    other.self_attn.add_zero_attn = True
    with pytest.raises(FileFormatError, match=r"'self_attn' has lost heads in the file: nn.MultiheadAttention: heads"):
        lnn.load(path, other)


@pytest.mark.parametrize("then", [lnn.Quantize("int8"), lnn.LowRank(rank=lnn.Params(0.7))])
def test_heads_whose_projection_another_step_replaced(path, then):
    def make():
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(64, 4, 64, batch_first=True).eval()

    x = torch.randn(2, 5, 64)
    model = lnn.compress_model(make(), x, [lnn.Prune(0.25, granularity="filter"), then], progress=False).model
    assert isinstance(model.self_attn.out_proj, lnn.CompressedLayer)
    assert model.self_attn.num_heads == 3
    lnn.save(model, path)
    with torch.no_grad():
        assert torch.equal(lnn.load(path, make())(x), model(x))


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.sizes, self.gain = nn.Linear(4, 6), (2, 4), nn.Parameter(torch.ones(6))
        self.register_buffer("table", torch.arange(6.0), persistent=False)

    def forward(self, x):
        return torch.cat(((self.proj(x) * self.gain + self.table).split(self.sizes, -1)), -1)


def split_without(units, update):
    register_attributes(Split, update)
    members = [("proj.weight", "out"), ("proj.bias", "out"), ("gain", "through"), ("table", "through")]
    group = ChannelGroup("proj", 6, tuple(Member(name, 0, each(6), role) for name, role in members))
    model = Split()
    remove_units(model, [Removal(group, units)])
    return model


def test_attributes_and_tensors_of_the_users_own_modules(path):
    def update(module, cuts):
        module.sizes = (2, module.proj.out_features - 2)

    model = split_without((3, 5), update)
    lnn.save(model, path)
    loaded = lnn.load(path, Split())
    assert loaded.sizes == (2, 2)
    assert loaded.table.tolist() == [0, 1, 2, 4]
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), model(x))


def test_attributes_that_no_file_holds_are_refused(path):
    def update(module, cuts):
        module.sizes = {"first": 2}

    with pytest.raises(
        OptionError, match="sizes of '' changed when channels were removed, and is neither a whole number"
    ):
        lnn.save(split_without((3,), update), path)


def test_other_architectures_are_refused(path):
    lnn.save(pruned(), path)
    other = fresh_net()
    other[3] = nn.Conv2d(16, 20, 3, stride=2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(FileFormatError, match=r"'3' has lost channels in the file, and does not fit: out_channels=21"):
        lnn.load(path, other)
    assert all(before[key].equal(tensor) for key, tensor in other.state_dict().items())
    with pytest.raises(FileFormatError, match="'0' has lost channels in the file, but the model has no module there"):
        lnn.load(path, nn.Module())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda s: s["resized"]["3"].update(out_channels=10**9),
            "out_channels=1000000000 in the file, 24 in the model",
        ),
        (lambda s: s["resized"]["3"].update(out_channels=-1), "malformed"),
        (lambda s: s["resized"]["3"].update(out_channels=True), "malformed"),
        (lambda s: s["resized"]["3"].update(out_channels="8"), "malformed"),
        (lambda s: s["resized"]["3"].update(stride=[1, 1, 1]), r"stride=\[1, 1, 1\] in the file"),
        (lambda s: s["resized"]["3"].update(stride=1), r"the model's stride is \(2, 2\)"),
        (lambda s: s["resized"]["3"].update(forward=1), "the model's forward is None"),
        (lambda s: s["resized"]["3"].update(training=0), "the model's training is False"),
        (lambda s: s["resized"]["3"].update(weight=1), "the model's weight is None"),
        (lambda s: s.update(resized=[]), "malformed"),
        (lambda s: s["resized"].update({"3": []}), "malformed"),
        (lambda s: s["resized"].pop("3"), "has shape"),
    ],
)
def test_forged_sizes_are_refused(path, edit, message):
    lnn.save(pruned(), path)
    path.write_bytes(forged(path.read_bytes(), lambda header, structure: edit(structure)))
    with pytest.raises(FileFormatError, match=message):
        lnn.load(path, fresh_net())


def test_a_network_that_lost_nothing_says_nothing_of_it(path):
    lnn.save(dense(), path)
    assert b"resized" not in path.read_bytes()
    lnn.save(pruned(), path)
    structures = []
    forged(path.read_bytes(), lambda header, structure: structures.append(structure))
    assert json.dumps(structures[0]["resized"]["3"]) == '{"in_channels": 13, "out_channels": 21}'
