"""Codebook layers: what is shared, what trains, what a file takes."""

import copy
import math

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.decompose import kmeans_1d
from lowrank_nn.layers._shared import look_up
from lowrank_nn.planning import diagonal_fisher
from lowrank_nn.storage import stored_bytes


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(60, 40)


@pytest.fixture
def conv():
    torch.manual_seed(0)
    return nn.Conv2d(6, 8, 3, padding=1)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_every_weight_becomes_its_nearest_centroid(linear, bits):
    layer = lnn.CodebookLinear.from_pretrained_layer(linear, bits=bits)
    centroids = kmeans_1d(linear.weight, 2**bits)
    nearest = centroids[(linear.weight[..., None] - centroids).abs().argmin(-1)]
    torch.testing.assert_close(layer.weight, nearest, rtol=0, atol=0)
    assert layer.weight.unique().numel() <= 2**bits


def test_the_gradient_of_a_centroid_is_the_sum_over_its_cluster(conv):
    layer = lnn.CodebookConv2d.from_pretrained_layer(conv, bits=2)
    x, cotangent = torch.randn(2, 6, 5, 5), torch.randn(2, 8, 5, 5)
    layer(x).backward(cotangent)
    dense = layer.to_dense_layer()
    dense(x).backward(cotangent)
    sums = [dense.weight.grad[layer.indices == i].sum() for i in range(4)]
    torch.testing.assert_close(layer.codebook.grad, torch.stack(sums), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


def test_sums_of_many_half_precision_gradients_do_not_stall():
    table = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    look_up(table, torch.zeros(10_000, dtype=torch.uint8)).sum().backward()
    assert table.grad.tolist() == [9984.0, 0.0]  # 10,000 in bfloat16; a sum in bfloat16 ends at 256


@pytest.mark.parametrize("granularity", ["element", "filter"])
def test_zeros_of_a_pruned_layer_take_no_index(linear, granularity):
    pruned = lnn.PrunedLinear.from_pretrained_layer(linear, sparsity=0.7, granularity=granularity)
    layer = lnn.CodebookLinear.from_pretrained_layer(pruned, bits=3)
    assert torch.equal(layer.weight == 0, pruned.weight == 0)
    torch.testing.assert_close(layer.codebook, kmeans_1d(pruned.weight[pruned.mask], 8))
    layer.codebook.data += 1
    assert torch.equal(layer.weight == 0, pruned.weight == 0)
    kept = int(pruned.mask.sum())
    assert layer.cost((1, 60)).bytes == math.ceil(kept * 3 / 8) + 300 + 8 * 4 + 40 * 4
    assert layer.cost((1, 60)).nonzeros == kept + 40


def test_a_window_stays_the_smaller_kernel(conv):
    pruned = lnn.PrunedConv2d.from_pretrained_layer(conv, sparsity=1 / 3, granularity="window")
    layer = lnn.CodebookConv2d.from_pretrained_layer(pruned, bits=4)
    assert layer.window == pruned.window
    assert layer.indices.shape == pruned.kernel.shape
    x = torch.randn(2, 6, 7, 7)
    torch.testing.assert_close(layer(x), layer.to_dense_layer()(x))


def test_fisher_information_keeps_the_weights_that_matter(linear):
    linear.weight.data[:3] *= 0.2
    fisher = torch.zeros(40, 60)
    fisher[:3] = 1.0
    plain = lnn.CodebookLinear.from_pretrained_layer(linear, bits=3)
    weighted = lnn.CodebookLinear.from_pretrained_layer(linear, bits=3, fisher=fisher)

    def loss(layer):
        return float((fisher * (layer.weight - linear.weight).square()).sum().detach())

    torch.testing.assert_close(weighted.codebook, kmeans_1d(linear.weight[:3], 8))
    assert loss(weighted) < 0.1 * loss(plain)
    uniform = lnn.CodebookLinear.from_pretrained_layer(linear, bits=3, fisher=torch.full((40, 60), 0.3))
    torch.testing.assert_close(uniform.codebook, plain.codebook)


def test_fisher_information_lowers_the_loss_after_clustering():
    torch.manual_seed(0)
    # Inputs of very different size: what the plain squares do not see.
    x = torch.randn(200, 30) * torch.logspace(-2, 1, 30)
    model = nn.Sequential(nn.Linear(30, 5))
    target = model(x).detach()
    noisy = target + 0.1 * torch.randn_like(target)

    def loss(net, batch):
        return (net(batch[0]) - batch[1]).square().sum() / 2

    fisher = diagonal_fisher(model, [(x, noisy)], loss)["0"]
    errors = []
    for importance in (None, fisher):
        layer = lnn.CodebookLinear.from_pretrained_layer(model[0], bits=2, fisher=importance)
        errors.append(float((layer(x).detach() - target).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_starts_of_k_means_reach_the_layer(linear):
    found = {
        init: lnn.CodebookLinear.from_pretrained_layer(linear, bits=3, init=init, seed=1).codebook
        for init in ("optimal", "linear", "density", "random")
    }
    for init, codebook in found.items():
        torch.testing.assert_close(codebook, kmeans_1d(linear.weight, 8, init=init, seed=1), rtol=0, atol=0)


def test_factors_of_low_rank_layers_take_codebooks(conv):
    tucker = lnn.TuckerConv2d.from_pretrained_layer(conv, rank=(4, 3))
    tucker.core = lnn.CodebookConv2d.from_pretrained_layer(tucker.core, bits=3)
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(tucker(x), tucker.to_dense_layer()(x), rtol=1e-4, atol=1e-5)
    assert tucker.core.weight.unique().numel() == 8


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_files_hold_indices_in_their_bits(linear, sparsity, tmp_path):
    pruned = lnn.PrunedLinear.from_pretrained_layer(linear, sparsity=sparsity) if sparsity else linear
    model = nn.Sequential(lnn.CodebookLinear.from_pretrained_layer(pruned, bits=3))
    plain = stored_bytes(model, coding="none")
    kept = round(2400 * (1 - sparsity))
    assert plain["0.indices"] == math.ceil(kept * 3 / 8)
    assert plain["0.codebook"] == 32
    coded = stored_bytes(model)
    assert coded["0.indices"] <= plain["0.indices"]
    if sparsity:
        assert coded["0.mask"] < plain["0.mask"] == 300
    lnn.save(model, tmp_path / "small.lrnn")
    loaded = lnn.load(tmp_path / "small.lrnn", nn.Sequential(nn.Linear(60, 40)))
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_trained_centroids_need_not_stay_in_order(linear):
    layer = lnn.CodebookLinear.from_pretrained_layer(linear, bits=2)
    layer.codebook.data = layer.codebook.data.flip(0)
    weight = layer.weight.detach().clone()
    again = copy.deepcopy(layer)
    again.approximate_(weight)
    assert torch.equal(again.weight, weight)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 0}, lnn.OptionError, "CodebookLinear: bits must be a whole number from 1 to 8, got 0"),
        ({"bits": 9}, lnn.OptionError, "got 9"),
        ({"bits": True}, lnn.OptionError, "got True"),
        ({"init": "best"}, lnn.OptionError, "init one of"),
        (
            {"fisher": torch.ones(3)},
            lnn.CalibrationError,
            r"CodebookLinear: fisher .* \(40, 60\), got \(3,\)",
        ),
        ({"fisher": -torch.ones(40, 60)}, lnn.CalibrationError, "negative"),
    ],
)
def test_what_cannot_be(linear, options, error, message):
    with pytest.raises(error, match=message):
        lnn.CodebookLinear.from_pretrained_layer(linear, **options)


def test_masks_have_as_many_entries_as_they_say():
    layer = lnn.CodebookLinear(10, 4, bits=2, nonzeros=7)
    assert int((layer.weight != 0).sum()) == 7
    for nonzeros in (0, 41):
        with pytest.raises(lnn.OptionError, match="nonzeros must be from 1 to the 40 entries"):
            lnn.CodebookLinear(10, 4, nonzeros=nonzeros)


def test_quantized_layers_are_refused(linear):
    quantized = lnn.QuantLinear.from_pretrained_layer(linear)
    with pytest.raises(lnn.UnsupportedLayerError, match="QuantLinear already, expected Linear or PrunedLinear"):
        lnn.CodebookLinear.from_pretrained_layer(quantized)
