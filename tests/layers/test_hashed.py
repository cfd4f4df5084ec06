"""Hashed layers: the hash, what is shared, what a file takes."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.layers.hashed import hash_buckets
from lowrank_nn.storage import stored_bytes

WORD = (1 << 64) - 1


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(60, 40)


def mixed(state):
    """The output function of SplitMix64, in whole numbers of any size."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & WORD
    state = (state ^ state >> 27) * 0x94D049BB133111EB & WORD
    return state ^ state >> 31


def test_the_output_function_is_that_of_the_paper():
    # The first outputs of the reference implementation started at 1234567.
    states = [1234567 + i * 0x9E3779B97F4A7C15 & WORD for i in (1, 2, 3)]
    assert [mixed(s) for s in states] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize(("buckets", "seed"), [(1, 0), (7, 0), (1000, 12345)])
def test_buckets_and_signs_are_those_of_the_hash(buckets, seed):
    hashes = [mixed(place * 0x9E3779B97F4A7C15 + mixed(seed) & WORD) for place in range(1, 51)]
    ranks = [sorted(hashes).index(value) for value in hashes]
    expected = [rank % buckets + (value & 1) * buckets for rank, value in zip(ranks, hashes, strict=True)]
    assert hash_buckets(50, buckets, seed).tolist() == expected


def test_the_hash_of_saved_files_does_not_change():
    assert hash_buckets(8, 3, 0).tolist() == [3, 1, 3, 1, 4, 0, 5, 2]


def test_buckets_are_equally_full_and_signs_balanced():
    hashed = hash_buckets(100_001, 50, seed=1)
    assert set(np.bincount(hashed % 50)) == {2000, 2001}
    assert stats.binomtest(int((hashed < 50).sum()), 100_001).pvalue > 1e-3
    columns = np.histogram2d(np.arange(100_001) % 64, hashed % 50, bins=(64, 50))[0]
    assert stats.chi2_contingency(columns).pvalue > 1e-3  # buckets do not follow the place
    other = hash_buckets(100_001, 50, seed=2)
    table = np.histogram2d(hashed % 50, other % 50, bins=50)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3  # seeds are independent


def test_each_value_is_the_best_one_for_its_weights(linear):
    layer = lnn.HashedLinear.from_pretrained_layer(linear, buckets=100)
    hashed = torch.from_numpy(hash_buckets(2400, 100, 0)).long()
    design = torch.zeros(2400, 100, dtype=torch.float64)
    design[torch.arange(2400), hashed % 100] = torch.where(hashed < 100, 1.0, -1.0).double()
    weight = linear.weight.detach().double().flatten()
    best = torch.linalg.lstsq(design, weight[:, None]).solution
    torch.testing.assert_close(layer.values.double(), best[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.double().flatten(), (design @ best)[:, 0], rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_value_is_the_signed_sum(linear):
    layer = lnn.HashedLinear.from_pretrained_layer(linear, share=0.1)
    dense = layer.to_dense_layer()
    x, cotangent = torch.randn(5, 60), torch.randn(5, 40)
    layer(x).backward(cotangent)
    dense(x).backward(cotangent)
    hashed = torch.from_numpy(hash_buckets(2400, 240, 0)).long()
    signs = torch.where(hashed < 240, 1.0, -1.0)
    expected = torch.zeros(240).index_add(0, hashed % 240, signs * dense.weight.grad.flatten())
    torch.testing.assert_close(layer.values.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_file_holds_the_values_and_nothing_of_the_hash(linear, tmp_path):
    model = nn.Sequential(lnn.HashedLinear.from_pretrained_layer(linear, share=1 / 8, seed=7))
    assert stored_bytes(model) == {"0.values": 300 * 4, "0.bias": 40 * 4}
    assert model[0].cost((1, 60)).bytes == 300 * 4 + 40 * 4
    lnn.save(model, tmp_path / "small.lrnn")
    x = torch.randn(3, 60)
    for device in ("cpu", "meta"):
        fresh = nn.Sequential(nn.Linear(60, 40, device=device))
        assert torch.equal(lnn.load(tmp_path / "small.lrnn", fresh)(x), model(x))


def test_memory_that_comes_later_gets_its_indices(linear):
    layer = lnn.HashedLinear.from_pretrained_layer(linear, share=0.1)
    late = lnn.HashedLinear(60, 40, buckets=240, device="meta").to_empty(device="cpu")
    late.load_state_dict(layer.state_dict())
    assert torch.equal(late.weight, layer.weight)
    assert torch.equal(copy.deepcopy(layer).double().indices, layer.indices)


def test_factors_and_models_take_shares():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    recipe = lnn.Apply([lnn.HashedConv2d, lnn.HashedLinear], share=1 / 4)
    result = lnn.compress_model(model, torch.randn(2, 3, 6, 6), recipe, progress=False)
    assert [result.model[i].buckets for i in (0, 2)] == [54, 320]
    assert result.report.after.params == 54 + 8 + 320 + 10


def test_an_eighth_of_the_weights_learns_digits():
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(lnn.HashedLinear(64, 100, buckets=800), nn.ReLU(), lnn.HashedLinear(100, 10, buckets=125))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[:1200]), labels[:1200]).backward()
        optimizer.step()
    assert (model(images[1200:]).argmax(1) == labels[1200:]).float().mean() > 0.85


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass one of buckets and share, got None and None"),
        ({"buckets": 3, "share": 0.5}, "got 3 and 0.5"),
        ({"share": 0}, "share is above 0 and at most 1, got 0"),
        ({"share": 1.5}, "got 1.5"),
        ({"buckets": 0}, "buckets must be a whole number from 1 to 1073741823, got 0"),
        ({"buckets": 3, "seed": -1}, "seed must be a whole number from 0 to .* got -1"),
    ],
)
def test_what_cannot_be(linear, options, message):
    with pytest.raises(lnn.OptionError, match=f"HashedLinear: .*{message}"):
        lnn.HashedLinear.from_pretrained_layer(linear, **options)
