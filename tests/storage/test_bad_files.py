import copy
import json
import random
import struct
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lowrank_nn.errors import FileFormatError, OptionError
from lowrank_nn.layers import SVDLinear
from lowrank_nn.storage import load, packed_size, save
from lowrank_nn.storage._container import make_file
from lowrank_nn.storage._json import MAX_DEPTH, deflate, inflate
from tests.storage.forge import INDEX, forged, header_end, put_together, take_apart
from tests.storage.models import (
    EveryEncoding,
    MaskedLinear,
    SmallNet,
    assert_same_state,
    compressed_net,
    every_encoding,
    masked_linear,
    registered,
    seeded,
)


@pytest.fixture(scope="module")
def net():
    return compressed_net()


@pytest.fixture(scope="module")
def good(net, tmp_path_factory):
    """The bytes of a whole file."""
    path = tmp_path_factory.mktemp("good") / "a.lrnn"
    save(net, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "bad.lrnn"


def refusal(path, data, fresh):
    """The message with which `data` is refused; the model stays as it was."""
    path.write_bytes(data)
    before, modules = copy.deepcopy(fresh), [*fresh.modules()]
    with pytest.raises(FileFormatError) as caught:
        load(path, fresh)
    assert all(a is b for a, b in zip(fresh.modules(), modules, strict=True))
    assert_same_state(fresh, before)
    return str(caught.value)


def test_truncated_anywhere(good, scratch):
    end = header_end(good)
    cuts = {*range(24), *range(24, len(good), 97), *range(end - 3, end + 25), len(good) - 1}
    for cut in sorted(cuts):
        refusal(scratch, good[:cut], SmallNet())
    refusal(scratch, good + b"\0", SmallNet())


@given(seed=st.integers(0, 2**32), flips=st.integers(1, 4))
def test_flipped_bits(good, scratch, net, seed, flips):
    broken = bytearray(good)
    for position in random.Random(seed).sample(range(len(good) * 8), flips):  # anywhere, not mostly in front
        broken[position // 8] ^= 1 << position % 8
    scratch.write_bytes(broken)
    fresh = SmallNet()
    try:
        back = load(scratch, fresh)
    except FileFormatError:
        return
    assert_same_state(back, net)


def test_bytes_of_the_header_flipped(good, scratch):
    for position in range(0, header_end(good) + 20, 5):
        refusal(scratch, good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :], SmallNet())


@given(data=st.binary(max_size=200))
def test_random_bytes(scratch, data):
    refusal(scratch, data, nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too short"),
        (b"PK\3\4 this is a zip file, perhaps", "truncated or was not written by save"),
        (struct.pack("<Q", 2) + b"[]", "no structure of this library"),
        (struct.pack("<Q", 2) + b"{]", "not valid JSON"),
        (struct.pack("<Q", 40000) + b"[" * 40000, "lists no tensors"),
        (struct.pack("<Q", 30000) + b'"a",' * 7500, "lists no tensors"),
        (struct.pack("<Q", 13) + b'{"a":1,"a":2}', "occurs twice"),
        (safetensors.torch.save({"weight": torch.zeros(2, 2)}), "no structure of this library"),
        (safetensors.torch.save({"weight": torch.zeros(2)}, {"format": "lowrank_nn"}), "format version None"),
        (safetensors.torch.save({"weight": torch.zeros(2)}, {"format": "lowrank_nn", "version": "1"}), "the last one"),
        (safetensors.torch.save({INDEX: torch.zeros(2)}, {"format": "lowrank_nn", "version": "1"}), "checksum"),
    ],
)
def test_files_of_other_kinds(data, message, scratch):
    assert message in refusal(scratch, data, nn.Linear(2, 2))


def test_a_newer_version(good, scratch):
    def edit(header, structure):
        header["__metadata__"]["version"] = "2"

    assert "version '2', expected '1'" in refusal(scratch, forged(good, edit), SmallNet())


def test_a_payload_that_changed(good, scratch):
    assert "checksum: the file is damaged" in refusal(scratch, good[:-1] + bytes([good[-1] ^ 1]), SmallNet())


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.lrnn", SmallNet())


class OtherNet(SmallNet):
    """Differs from SmallNet in everything that can differ."""

    def __init__(self):
        super().__init__(width=6)
        self.conv2 = nn.Conv2d(6, 12, 3, stride=1, padding=(1, 0), bias=False)
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.fc = nn.Identity()
        self.extra = nn.Linear(2, 2)


def test_all_that_is_wrong_is_listed_at_once(good, scratch):
    message = refusal(scratch, good, OtherNet().to(torch.float64))
    for line in [
        "'conv2' (TuckerConv2d) has in_channels=8 in the file, 6 in the model; stride=(2, 2) in the file, (1, 1)",
        "'fc' is a SVDLinear in the file, which replaces Linear; the model has Identity.",
        "'extra.weight' is in the model, but missing in the file.",
        "'norm.weight' is in the file, but not in the model.",
        "'conv1.weight' has shape (8, 3, 3, 3) in the file, (6, 3, 3, 3) in the model.",
        "'conv1.bias' is torch.float32 in the file, torch.float64 in the model.",
    ]:
        assert line in message
    assert "'conv2.core" not in message  # it follows from the first line


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"class": "NoSuchLayer"}, "'fc' is a NoSuchLayer, which is not registered. Import the module"),
        ({"class": "os.system"}, "not registered"),
        ({"class": "SVDConv2d"}, "replaces Conv2d; the model has Linear"),
        ({"path": "head.fc"}, "the model has no module there"),
        ({"aliases": ["fc2"]}, "is shared with ['fc2'] in the file, with no other path in the model"),
        ({"config": {"in_features": 12, "out_features": 10, "rank": 99, "bias": True}}, "rank must be"),
        ({"config": {"in_features": 12, "out_features": 10, "rank": "5", "bias": True}}, "refuses"),
        ({"config": {"in_features": 12, "rank": 2}}, "refuses"),
        ({"config": {"in_features": 2**70, "out_features": 2**70, "rank": 5}}, "refuses"),
        ({"config": {"in_features": 12, "out_features": 10, "rank": 5, "device": "cpu"}}, "refuses"),
        ({"config": {"in_features": 12, "out_features": 10, "rank": 5, "bias": False}}, "bias=False in the file, True"),
        ({"config": {"in_features": 12, "out_features": 10, "rank": 4, "bias": True}}, "shape (10, 5) in the file"),
    ],
)
def test_layers_that_do_not_fit(edit, message, good, scratch):
    data = forged(good, lambda header, structure: structure["layers"][1].update(edit))
    assert message in refusal(scratch, data, SmallNet())


def set_tensor(**fields):
    def edit(header, structure):
        structure["tensors"]["fc.expand.bias"] = {"dtype": "F32", "shape": [10], "bytes": 40, **fields}

    return edit


def drop(*path):
    def edit(header, structure):
        for name in path[:-1]:
            structure = structure[name]
        del structure[path[-1]]

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        drop("layers"),
        drop("tied"),
        drop("layers", 0, "config"),
        lambda header, structure: structure.update(tied={"fc.bias": "nowhere"}),
        lambda header, structure: structure.update(tied=[]),
        lambda header, structure: structure.update(layers={"path": ""}),
        lambda header, structure: structure["layers"][0].update(path=3),
        lambda header, structure: structure["tensors"].update({"fc.expand.bias": "470277479c881627"}),
        lambda header, structure: structure["tensors"].update({"fc.expand.bias": [40]}),
        drop("tensors", "fc.expand.bias", "bytes"),
        set_tensor(bytes=-40),
        set_tensor(bytes="40"),
        set_tensor(bits=3),
        set_tensor(bits=3, offset=0),
        set_tensor(dtype="I8", bits=-1, offset=0),
        set_tensor(dtype="I64", bits=2**40, offset=0),
        set_tensor(dtype="I8", bits=True, offset=0),
        set_tensor(mask="fc.expand.bias"),
        set_tensor(mask="nowhere"),
        set_tensor(mask="norm.num_batches_tracked"),
        set_tensor(bitmap=1),
        set_tensor(bitmap=True, dtype="Q7"),
        set_tensor(bitmap=True, shape=[-10]),
        set_tensor(bitmap=True, shape=[2.0, 5]),
        set_tensor(bitmap=True, shape=[2**40, 2**40]),
        set_tensor(shape=[1] * 100),
        set_tensor(coder="rans"),
        set_tensor(gaps="rans", bitmap=True),
        set_tensor(gaps="rans", mask="norm.bias"),
    ],
)
def test_structures_that_no_model_has(edit, good, scratch):
    assert "malformed" in refusal(scratch, forged(good, edit), SmallNet())


@pytest.mark.parametrize(
    "fields", [{"coder": "lz77", "dtype": "I8", "bits": 3, "offset": 0}, {"gaps": "lz77"}, {"coder": []}, {"huge": 1}]
)
def test_encodings_of_a_newer_version(fields, good, scratch):
    message = refusal(scratch, forged(good, set_tensor(**fields)), SmallNet())
    assert "in a way that this version does not know" in message
    assert "Update lowrank_nn" in message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("data_offsets", [0, 10**12], "lies at"),
        ("data_offsets", [4, 44], "lies at"),
        ("data_offsets", None, "lies at"),
        ("shape", [10**15], "lies at"),
        ("shape", [10, -1], "no tensor's"),
        ("shape", "ten", "no tensor's"),
        ("dtype", "F31", "no tensor's"),
        ("dtype", ["F32"], "no tensor's"),
    ],
)
def test_entries_that_lie(name, value, message, scratch):
    save(nn.Linear(80, 100), scratch)
    data = forged(scratch.read_bytes(), lambda header, structure: header["weight"].update({name: value}))
    assert message in refusal(scratch, data, nn.Linear(80, 100))


@pytest.mark.parametrize(
    "fields",
    [
        {"bitmap": True},
        {"bitmap": True, "shape": [2**40]},
        {"dtype": "I8", "bits": 0, "offset": 5},
        {"dtype": "I8", "bits": 0, "offset": 5, "shape": [2**40]},
    ],
)
def test_packed_tensors_that_lie(fields, good, scratch):
    message = refusal(scratch, forged(good, set_tensor(**fields)), SmallNet())
    assert "'fc.expand.bias'" in message


def test_sharing_that_differs(tmp_path):
    def make(shared):
        first = nn.Linear(4, 4)
        return nn.Sequential(first, first if shared else nn.Linear(4, 4))

    shared, apart = make(True), make(False)
    shared[0] = shared[1] = SVDLinear.from_pretrained_layer(shared[0], rank=2)
    apart[0], apart[1] = (SVDLinear.from_pretrained_layer(layer, rank=2) for layer in apart)
    save(shared, tmp_path / "shared.lrnn")
    save(apart, tmp_path / "apart.lrnn")
    message = refusal(tmp_path / "copy.lrnn", (tmp_path / "shared.lrnn").read_bytes(), make(False))
    assert "'0' is shared with ['1'] in the file, with no other path in the model." in message
    message = refusal(tmp_path / "copy.lrnn", (tmp_path / "apart.lrnn").read_bytes(), make(True))
    assert "'0' is shared with no other path in the file, with ['1'] in the model." in message


def test_ties_that_the_file_contradicts(tmp_path):
    save(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tmp_path / "a.lrnn")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    message = refusal(tmp_path / "a.lrnn", (tmp_path / "a.lrnn").read_bytes(), tied)
    assert "'1.weight' and '0.weight' are one tensor in the model, but differ in the file." in message


def test_a_compressed_layer_where_the_file_has_a_dense_one(tmp_path):
    save(nn.Sequential(nn.Linear(4, 4)), tmp_path / "a.lrnn")
    message = refusal(tmp_path / "a.lrnn", (tmp_path / "a.lrnn").read_bytes(), nn.Sequential(SVDLinear(4, 4, rank=2)))
    assert "'0' is a SVDLinear in the model, and no compressed layer in the file." in message


def test_a_mask_that_is_damaged(tmp_path):
    with registered(MaskedLinear):
        save(nn.Sequential(seeded(lambda: masked_linear(20, 20))), tmp_path / "a.lrnn")
        data = (tmp_path / "a.lrnn").read_bytes()
        for position in range(8, len(data), 11):
            broken = data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :]
            refusal(tmp_path / "a.lrnn", broken, nn.Sequential(nn.Linear(20, 20)))


def test_a_layer_whose_module_was_not_imported(tmp_path):
    with registered(MaskedLinear):
        save(nn.Sequential(masked_linear(4, 4)), tmp_path / "a.lrnn")
    message = refusal(tmp_path / "a.lrnn", (tmp_path / "a.lrnn").read_bytes(), nn.Sequential(nn.Linear(4, 4)))
    assert "'0' is a MaskedLinear, which is not registered. Import the module that registers it" in message


def test_a_meta_model_with_buffers_that_no_file_holds(tmp_path):
    model = nn.Linear(2, 2)
    save(model, tmp_path / "a.lrnn")
    model.register_buffer("cache", torch.ones(3), persistent=False)
    with pytest.raises(FileFormatError, match=r"'cache' is a non-persistent buffer on the meta device"):
        load(tmp_path / "a.lrnn", model.to("meta"))


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


def test_a_file_of_made_up_parts():
    listed = {"a": (("F32", (2, 3)), np.zeros(24, np.uint8)), "b": (("U8", ()), np.ones(1, np.uint8))}
    data = b"".join(part.tobytes() for part in make_file({"layers": []}, listed, [np.full(3, 7, np.uint8)]))
    header, in_between, structure, gathered = take_apart(data)
    assert header["b"]["data_offsets"] == [24, 25]
    assert in_between == bytes(24) + b"\1"
    assert structure == {"layers": []}
    assert gathered == b"\7\7\7"
    deflated = zlib.compress(b'{"layers":[]}', 9)
    text = data[8 : header_end(data)]
    assert put_together(text, in_between, deflated, gathered) == data  # its own checksum


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (b"no zlib", "cannot be inflated"),
        (zlib.compress(b"{}")[:-3], "cut short"),
        (zlib.compress(b"{}") + b"more", "followed by something else"),
        (zlib.compress(bytes(10**6)), "too long"),
        (zlib.compress(b"[" * 60000), "not valid JSON"),
        (zlib.compress(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1)), "nested more than"),
        (zlib.compress(b'{"layers":NaN,"layers":1}'), "occurs twice"),
    ],
)
def test_structures_that_do_not_inflate(structure, message, good, scratch):
    header, listed, _, gathered = take_apart(good)
    assert message in refusal(scratch, put_together(header, listed, structure, gathered), SmallNet())


def test_gathered_tensors_of_another_length(good, scratch):
    header, listed, structure, gathered = take_apart(good)
    for wrong in (gathered[:-1], gathered + b"\0", b""):
        message = refusal(scratch, put_together(header, listed, structure, wrong), SmallNet())
        assert "the small tensors take" in message


def test_an_index_that_is_cut_short(good, scratch):
    header, _, _, _ = take_apart(good)
    for length in (0, 15, 19):
        header[INDEX] = {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}
        text = json.dumps(header).encode()
        message = refusal(scratch, struct.pack("<Q", len(text)) + text + bytes(length), SmallNet())
        assert "checksum" in message


def test_a_structure_that_repeats_itself_endlessly_is_written_so_that_it_can_be_read():
    value = {"layers": [0] * 10**6}
    assert len(deflate(value)) > 10**6
    assert inflate(deflate(value), "structure") == value


@pytest.mark.parametrize("offset", [4096, -(2**70), 10**400])
def test_offsets_outside_of_the_dtype_are_refused(scratch, offset):
    save(every_encoding(), scratch)
    data = scratch.read_bytes()
    structures = []
    forged(data, lambda header, structure: structures.append(structure))
    keys = [
        key
        for key, tensor in structures[0]["tensors"].items()
        if "bits" in tensor and tensor["dtype"] in ("I8", "BOOL")
    ]
    assert len(keys) > 3
    for key in keys:
        bad = forged(data, lambda header, structure, key=key: structure["tensors"][key].update(bits=0, offset=offset))
        scratch.write_bytes(bad)
        with pytest.raises(FileFormatError, match="malformed"):
            load(scratch, EveryEncoding())
