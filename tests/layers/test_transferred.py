"""Convolutions of transferred filters: options, files, training."""

import math

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.storage import stored_bytes


@pytest.fixture
def conv():
    torch.manual_seed(0)
    return nn.Conv2d(6, 16, 3, padding=1)


def test_filters_are_transformed_bases(conv):
    layer = lnn.TransferredConv2d.from_pretrained_layer(conv, base_filters=5)
    for filter_, scale, index in zip(layer.weight, layer.scale, layer.indices.tolist(), strict=True):
        base = layer.bases[index // 8]
        images = [torch.rot90(plane, k, (1, 2)) for plane in (base, base.flip(1)) for k in range(4)]
        assert min(float((filter_ - scale * image).detach().abs().max()) for image in images) < 1e-6


def test_depthwise_filters_share_bases_over_groups():
    torch.manual_seed(0)
    bases = torch.randn(2, 1, 3, 3)
    filters = [bases[0], -bases[0].flip(2), 3 * bases[1], bases[1].mT, bases[1].rot90(1, (1, 2)), bases[0].flip(1)]
    depthwise = nn.Conv2d(6, 6, 3, groups=6)
    with torch.no_grad():
        depthwise.weight.copy_(torch.stack(filters))
    layer = lnn.TransferredConv2d.from_pretrained_layer(depthwise, base_filters=2)
    assert layer.bases.shape == (2, 1, 3, 3)
    torch.testing.assert_close(layer.weight, depthwise.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("transforms", "bits"), [("dihedral", 6), ("flips", 5), ("none", 3)])
def test_files_take_few_bits_for_indices(conv, transforms, bits, tmp_path):
    layer = lnn.TransferredConv2d.from_pretrained_layer(conv, base_filters=5, transforms=transforms)
    cost = layer.cost((1, 6, 8, 8))
    assert cost.params == 5 * 54 + 16 + 16
    assert cost.bytes == 4 * cost.params + math.ceil(16 * bits / 8)
    assert cost.macs == 64 * 16 * 54
    model = nn.Sequential(layer)
    assert stored_bytes(model)["0.indices"] <= math.ceil(16 * bits / 8)
    lnn.save(model, tmp_path / "small.lrnn")
    x = torch.randn(2, 6, 8, 8)
    for device in ("cpu", "meta"):
        fresh = nn.Sequential(nn.Conv2d(6, 16, 3, padding=1, device=device))
        assert torch.equal(lnn.load(tmp_path / "small.lrnn", fresh)(x), model(x))


def test_fresh_layers_use_every_transform_of_every_base():
    torch.manual_seed(0)
    layer = lnn.TransferredConv2d(3, 40, 3, base_filters=2)
    distinct = {(index, scale) for index, scale in zip(layer.indices.tolist(), layer.scale.tolist(), strict=True)}
    assert len(distinct) == 2 * 8 * 2
    late = lnn.TransferredConv2d(3, 40, 3, base_filters=2, device="meta").to_empty(device="cpu")
    late.load_state_dict(layer.state_dict())
    assert torch.equal(late.weight, layer.weight)


def test_steps_take_shares():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3))
    recipe = lnn.Apply(lnn.TransferredConv2d, share=1 / 4, transforms="flips")
    result = lnn.compress_model(model, torch.randn(2, 3, 8, 8), recipe, progress=False)
    assert [result.model[i].base_filters for i in (0, 2)] == [2, 3]
    assert result.report.after.params == 2 * 27 + 16 + 3 * 72 + 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass one of base_filters and share, got None and None"),
        ({"base_filters": 3, "share": 0.5}, "got 3 and 0.5"),
        ({"share": 0}, "share is above 0 and at most 1, got 0"),
        ({"share": "half"}, "share is above 0 and at most 1, got 'half'"),
        ({"base_filters": 17}, "base_filters must be a whole number from 1 to 16, got 17"),
        ({"base_filters": 3, "transforms": "turns"}, "transforms is one of 'dihedral', 'flips', 'none', got 'turns'"),
    ],
)
def test_what_cannot_be(conv, options, message):
    with pytest.raises(lnn.OptionError, match=f"TransferredConv2d: .*{message}"):
        lnn.TransferredConv2d.from_pretrained_layer(conv, **options)
