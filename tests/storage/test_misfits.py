"""Whole files that do not fit the model: all that is wrong is listed, and the model stays as it was."""

import pytest
import torch
from torch import nn

from lowrank_nn.errors import FileFormatError
from lowrank_nn.layers import SVDLinear
from lowrank_nn.storage import load, save
from tests.storage.forge import forged
from tests.storage.models import (
    MaskedLinear,
    SmallNet,
    masked_linear,
    registered,
)
from tests.storage.refusals import refusal


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
