"""Damaged and forged files: each is refused, and the model stays as it was."""

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

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage import load, save
from lowrank_nn.storage._container import make_file
from lowrank_nn.storage._json import MAX_DEPTH, deflate, inflate
from tests.storage.forge import INDEX, forged, header_end, put_together, take_apart
from tests.storage.models import (
    EveryEncoding,
    MaskedLinear,
    SmallNet,
    assert_same_state,
    every_encoding,
    masked_linear,
    registered,
    seeded,
)
from tests.storage.refusals import refusal


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


def test_a_large_tensor_that_changed(scratch):
    save(SmallNet(width=64), scratch)
    data = scratch.read_bytes()
    header, *_ = take_apart(data)
    assert list(header) == ["__metadata__", "conv2.weight", INDEX]
    start, end = (header_end(data) + offset for offset in header["conv2.weight"]["data_offsets"])
    for at in (start, (start + end) // 2, end - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        message = refusal(scratch, bytes(changed), SmallNet(width=64))
        assert "'conv2.weight' does not match its checksum: the file is damaged." in message


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.lrnn", SmallNet())


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


def test_a_mask_that_is_damaged(tmp_path):
    with registered(MaskedLinear):
        save(nn.Sequential(seeded(lambda: masked_linear(20, 20))), tmp_path / "a.lrnn")
        data = (tmp_path / "a.lrnn").read_bytes()
        for position in range(8, len(data), 11):
            broken = data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :]
            refusal(tmp_path / "a.lrnn", broken, nn.Sequential(nn.Linear(20, 20)))


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
