import copy
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from torch import nn

from lowrank_nn.errors import OptionError
from lowrank_nn.layers import LAYERS, PrunedConv2d, SVDConv2d, SVDLinear, TuckerConv2d
from lowrank_nn.layers.quant import QuantConv2d
from lowrank_nn.storage import load, packed_size, save, stored_bytes
from lowrank_nn.testing import CASES, refuses
from lowrank_nn.testing._tools import built
from tests.storage.forge import INDEX, take_apart
from tests.storage.models import (
    MaskedLinear,
    SmallNet,
    assert_same_state,
    compressed_net,
    masked_linear,
    registered,
    seeded,
)
from tests.zoo import ZOO

ROOT = Path(__file__).parent.parent.parent
CHILD = """
import sys
import torch
from lowrank_nn.storage import load
from tests.storage.models import SmallNet
model = load(sys.argv[1], SmallNet().eval())
torch.save(model(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
"""


def structure_of(path):
    return take_apart(path.read_bytes())[2]


def layer_cases():
    for name, cls in LAYERS.items():
        for case in CASES:
            if case.kind is cls.replaces and not refuses(cls, case):
                yield pytest.param(cls, case, id=f"{name}-{case.name}")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("cls", "case"), list(layer_cases()))
def test_every_layer_at_its_usual_options(cls, case, tmp_path):
    layer = built(cls, case)
    model = nn.Sequential(layer)
    size = save(model, tmp_path / "a.lrnn")
    assert size == (tmp_path / "a.lrnn").stat().st_size == packed_size(model)
    back = load(tmp_path / "a.lrnn", nn.Sequential(case.layer()))
    assert type(back[0]) is cls
    assert back[0].config() == layer.config()
    assert torch.equal(back[0].dense_weight(), layer.dense_weight())
    assert back[0].training is case.training
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [p.stride() for p in back.parameters()] == [p.stride() for p in model.parameters()]
    x = case.input()
    assert torch.equal(back.eval()(x), copy.deepcopy(model).eval()(x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("cls", "case"), list(layer_cases()))
def test_cost_counts_the_bytes_of_the_file(cls, case):
    layer = built(cls, case)
    plain = stored_bytes(layer, coding="none")
    assert sum(plain.values()) == layer.cost(case.input_shape).bytes
    assert all(size <= plain[key] for key, size in stored_bytes(layer).items())


def test_a_new_process_computes_the_same(tmp_path):
    net, x = compressed_net(), seeded(lambda: torch.randn(4, 3, 8, 8))
    save(net, tmp_path / "a.lrnn")
    torch.save(x, tmp_path / "x.pt")
    arguments = [str(tmp_path / name) for name in ("a.lrnn", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", CHILD, *arguments], check=True, cwd=ROOT)
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), net(x))


def test_load_fills_and_returns_the_instance_given(tmp_path):
    net, fresh = compressed_net(), seeded(SmallNet, 1)
    save(net, tmp_path / "a.lrnn")
    before = torch.get_rng_state()
    back = load(tmp_path / "a.lrnn", fresh)
    assert back is fresh
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_state(back, net)
    assert all(module.training for module in back.modules())  # as the fresh model


def test_saving_changes_nothing_and_is_deterministic(tmp_path):
    net = compressed_net()
    expected = copy.deepcopy(net)
    save(net, tmp_path / "a.lrnn")
    save(net, tmp_path / "b.lrnn")
    assert_same_state(net, expected)
    assert (tmp_path / "a.lrnn").read_bytes() == (tmp_path / "b.lrnn").read_bytes()


def test_the_file_is_a_plain_safetensors_file(tmp_path):
    net = compressed_net()
    net.fc = SVDLinear.from_pretrained_layer(nn.Linear(1000, 10), rank=5)
    save(net, tmp_path / "a.lrnn")
    with safetensors.safe_open(tmp_path / "a.lrnn", "pt") as file:
        assert set(file.keys()) == {"fc.reduce.weight", INDEX}  # and what is small
        assert torch.equal(file.get_tensor("fc.reduce.weight"), net.fc.reduce.weight)
    structure = structure_of(tmp_path / "a.lrnn")
    assert list(structure["tensors"]) == list(net.state_dict())
    assert [(entry["path"], entry["class"]) for entry in structure["layers"]] == [
        ("conv2", "TuckerConv2d"),
        ("fc", "SVDLinear"),
    ]


def test_layers_inside_layers(tmp_path):
    net = compressed_net()
    net.conv2.core = SVDConv2d.from_pretrained_layer(net.conv2.core, rank=2)
    net.conv2.core.expand = SVDConv2d.from_pretrained_layer(net.conv2.core.expand, rank=1)
    save(net, tmp_path / "a.lrnn")
    back = load(tmp_path / "a.lrnn", SmallNet().eval())
    assert_same_state(back, net)
    assert type(back.conv2.core.expand) is SVDConv2d
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(back(x), net(x))


CHAINS = {
    "pruned": [(PrunedConv2d, {"sparsity": 0.6})],
    "pruned in rows": [(PrunedConv2d, {"sparsity": 0.5, "granularity": "row"})],
    "int8": [(QuantConv2d, {"bits": 8})],
    "3 bits": [(QuantConv2d, {"bits": 3})],
    "affine, inputs too": [
        (QuantConv2d, {"bits": 5, "scheme": "affine", "activation_bits": 8, "input_range": (-1.0, 3.0)}),
    ],
    "still training": [(QuantConv2d, {"bits": 4, "frozen": False})],
    "pruned, then 4 bits": [(PrunedConv2d, {"sparsity": 0.6}), (QuantConv2d, {"bits": 4})],
    "pruned, then int8": [(PrunedConv2d, {"sparsity": 0.6}), (QuantConv2d, {"bits": 8})],
    "pruned, still training": [(PrunedConv2d, {"sparsity": 0.6}), (QuantConv2d, {"bits": 4, "frozen": False})],
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_pruned_and_quantized_stages(chain, tmp_path):
    net = compressed_net()
    for cls, options in chain:
        for stage in ("reduce", "core", "expand"):
            layer = getattr(net.conv2, stage)
            setattr(net.conv2, stage, cls.from_pretrained_layer(layer, **options))
    net.eval()
    save(net, tmp_path / "a.lrnn")
    back = load(tmp_path / "a.lrnn", SmallNet().eval())
    assert type(back.conv2.core) is chain[-1][0]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(back(x), net(x))
    written = stored_bytes(net, coding="none")
    assert sum(size for key, size in written.items() if key.startswith("conv2.")) == net.conv2.cost((8, 8, 8)).bytes


def test_the_bytes_of_packed_layers():
    conv = nn.Conv2d(16, 20, 3)
    pruned = PrunedConv2d.from_pretrained_layer(conv, sparsity=0.9)
    assert stored_bytes(pruned, coding="none") == {"kernel": 288 * 4, "bias": 80, "mask": 360}
    quantized = stored_bytes(QuantConv2d.from_pretrained_layer(conv, bits=4), coding="none")
    assert quantized == {"bias": 80, "weight_int": 1440, "weight_scale": 80}
    both = stored_bytes(QuantConv2d.from_pretrained_layer(pruned, bits=4), coding="none")
    assert both == {"bias": 80, "weight_int": 144, "weight_scale": 80, "mask": 360}


@pytest.mark.parametrize("coding", ["auto", "max", "huffman", "none"])
def test_coding_changes_the_size_and_nothing_else(coding, tmp_path):
    def make():
        return nn.Sequential(nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3))

    model = seeded(make).eval()
    model[0] = PrunedConv2d.from_pretrained_layer(model[0], sparsity=0.8)
    model[2] = QuantConv2d.from_pretrained_layer(PrunedConv2d.from_pretrained_layer(model[2], sparsity=0.7), bits=4)
    size = save(model, tmp_path / "a.lrnn", coding=coding)
    assert size == packed_size(model, coding=coding) == (tmp_path / "a.lrnn").stat().st_size
    back = load(tmp_path / "a.lrnn", seeded(make, 1).eval())
    assert_same_state(back, model)
    x = torch.randn(2, 32, 9, 9)
    assert torch.equal(back(x), model(x))
    written = stored_bytes(model, coding=coding)
    ways = {key: set(entry) for key, entry in structure_of(tmp_path / "a.lrnn")["tensors"].items() if "bits" in entry}
    if coding == "none":
        assert written["0.mask"] == 32 * 64 * 9 / 8
        assert all(not {"gaps", "coder"} & fields for fields in ways.values())
    else:
        assert written["0.mask"] < 0.76 * 32 * 64 * 9 / 8  # entropy of one in five: 0.72 bits
        assert "gaps" in ways["0.mask"]
        assert "coder" in ways["2.weight_int"]
        assert packed_size(model, coding="max") <= size <= packed_size(model, coding="huffman")
        assert size < 0.95 * packed_size(model, coding="none")


def test_a_coding_that_there_is_not(tmp_path):
    for function in (packed_size, stored_bytes, lambda model, coding: save(model, tmp_path / "a.lrnn", coding=coding)):
        with pytest.raises(OptionError, match="coding='zip' is not one of 'auto', 'max', 'huffman', 'none'"):
            function(nn.Linear(2, 2), coding="zip")


def test_the_model_itself_may_be_a_layer(tmp_path):
    layer = SVDLinear.from_pretrained_layer(nn.Linear(20, 10), rank=3)
    save(layer, tmp_path / "a.lrnn")
    back = load(tmp_path / "a.lrnn", nn.Linear(20, 10))
    assert type(back) is SVDLinear
    assert_same_state(back, layer)


@pytest.mark.parametrize("name", list(ZOO))
def test_models_without_compressed_layers(name, tmp_path):
    model, _ = ZOO[name]()
    size = save(model, tmp_path / "a.lrnn")
    assert size == packed_size(model)
    fresh, _ = ZOO[name]()
    with torch.no_grad():
        for tensor in (*fresh.parameters(), *fresh.buffers()):
            tensor.zero_()
    assert_same_state(load(tmp_path / "a.lrnn", fresh), model)


@pytest.mark.parametrize("name", list(ZOO))
def test_models_with_every_linear_layer_compressed(name, tmp_path):
    model, _ = ZOO[name]()
    for parent in list(model.modules()):
        for child, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, child, SVDLinear.from_pretrained_layer(layer, rank=1))
    save(model, tmp_path / "a.lrnn")
    assert_same_state(load(tmp_path / "a.lrnn", ZOO[name]()[0]), model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, tmp_path):
    net = compressed_net().to(dtype)
    save(net, tmp_path / "a.lrnn")
    assert_same_state(load(tmp_path / "a.lrnn", SmallNet().to(dtype)), net)


def test_a_rebuilt_layer_keeps_the_dtype_it_was_saved_with(tmp_path):
    net = compressed_net()
    net.fc.to(torch.bfloat16)
    save(net, tmp_path / "a.lrnn")
    back = load(tmp_path / "a.lrnn", SmallNet())
    assert_same_state(back, net)
    assert isinstance(back.fc.expand.weight, nn.Parameter)


def test_tied_parameters_are_stored_once_and_stay_tied(tmp_path):
    def make(tie):
        model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
        if tie:
            model[1].weight = model[0].weight
        return model

    model = make(True)
    assert sum(stored_bytes(model).values()) == (900 + 30 + 30) * 4
    save(model, tmp_path / "a.lrnn")
    assert structure_of(tmp_path / "a.lrnn")["tied"] == {"1.weight": "0.weight"}
    back = load(tmp_path / "a.lrnn", make(True))
    assert back[0].weight is back[1].weight
    assert_same_state(back, model)
    assert_same_state(load(tmp_path / "a.lrnn", make(False)), model)


def test_shared_layers_are_rebuilt_as_one(tmp_path):
    def make():
        block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        return nn.ModuleDict({"a": block, "b": block, "c": nn.Linear(8, 8)})

    model = make()
    model["a"][0] = SVDLinear.from_pretrained_layer(model["a"][0], rank=2)
    save(model, tmp_path / "a.lrnn")
    back = load(tmp_path / "a.lrnn", make())
    assert type(back["a"][0]) is SVDLinear
    assert back["a"][0] is back["b"][0]
    assert_same_state(back, model)


def test_buffers_that_are_not_persistent_are_left_out_and_kept(tmp_path):
    model, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    model.register_buffer("cache", torch.ones(10**4), persistent=False)
    fresh.register_buffer("cache", torch.full((3,), 7.0), persistent=False)
    assert save(model, tmp_path / "a.lrnn") < 10**4
    assert torch.equal(load(tmp_path / "a.lrnn", fresh).cache, torch.full((3,), 7.0))


def test_flags_and_hooks_stay_those_of_the_fresh_model(tmp_path):
    save(compressed_net(), tmp_path / "a.lrnn")
    fresh = SmallNet().train()
    fresh.fc.eval()
    fresh.fc.bias.requires_grad_(False)
    fresh.conv1.requires_grad_(False)
    calls = []
    fresh.fc.register_forward_hook(lambda *_: calls.append("fc"))
    back = load(tmp_path / "a.lrnn", fresh)
    assert (back.fc.training, back.fc.expand.training, back.conv2.core.training) == (False, False, True)
    assert {name for name, p in back.named_parameters() if not p.requires_grad} == {
        "conv1.weight",
        "conv1.bias",
        "fc.expand.bias",
    }
    back(torch.randn(2, 3, 8, 8))
    assert calls == ["fc"]


def test_onto_a_model_on_the_meta_device(tmp_path):
    net = compressed_net()
    save(net, tmp_path / "a.lrnn")
    with torch.device("meta"):
        fresh = SmallNet()
    back = load(tmp_path / "a.lrnn", fresh, device="cpu")
    assert_same_state(back, net)
    assert_same_state(load(tmp_path / "a.lrnn", SmallNet().to("meta")), net)


@pytest.mark.cuda
def test_devices(tmp_path, device):
    net = compressed_net()
    size = save(net, tmp_path / "a.lrnn")
    on_gpu = load(tmp_path / "a.lrnn", SmallNet().to(device))
    assert {t.device for t in on_gpu.state_dict().values()} == {device}
    assert_same_state(on_gpu, net)
    assert_same_state(load(tmp_path / "a.lrnn", SmallNet(), device=device), net)
    assert save(on_gpu, tmp_path / "b.lrnn") == size
    assert (tmp_path / "a.lrnn").read_bytes() == (tmp_path / "b.lrnn").read_bytes()


def test_a_layer_registered_by_others(tmp_path):
    with registered(MaskedLinear):
        layer = seeded(lambda: masked_linear(40, 30))
        model = nn.Sequential(layer, nn.ReLU())
        kept = int(layer.mask.sum())
        assert stored_bytes(model, coding="none") == {
            "0.kernel": kept * 4,
            "0.bias": 30 * 4,
            "0.mask": 150,
            "0.levels": 450,
        }
        save(model, tmp_path / "a.lrnn")
        fresh = nn.Sequential(nn.Linear(40, 30), nn.ReLU())
        before = torch.get_rng_state()
        back = load(tmp_path / "a.lrnn", fresh)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(back[0].steps, layer.steps)
        assert torch.equal(back[0].mask, layer.mask)
        assert torch.equal(back[0].kernel, torch.where(layer.mask, layer.kernel, 0))
        x = torch.randn(3, 40)
        assert torch.equal(back(x), model(x))


def test_a_model_that_is_defined_with_compressed_layers(tmp_path):
    def make(rank):
        return nn.Sequential(TuckerConv2d(4, 4, 3, rank=rank), nn.Flatten())

    model = make((2, 2))
    save(model, tmp_path / "a.lrnn")
    fresh = make((2, 2))
    layer = fresh[0]
    assert load(tmp_path / "a.lrnn", fresh)[0] is layer
    assert_same_state(fresh, model)
    assert_same_state(load(tmp_path / "a.lrnn", make((3, 1))), model)


def test_the_header_stays_small(tmp_path):
    net = compressed_net()
    overhead = save(net, tmp_path / "a.lrnn") - sum(stored_bytes(net).values())
    assert overhead < 500 + 25 * len(net.state_dict())
