"""Reconstruction in the order of execution: what it keeps, repairs and corrects, against numpy and linear networks."""

import copy

import pytest
import torch
from torch import nn

from lowrank_nn.graph import Link, find_links
from lowrank_nn.layers import CPConv2d, SVDConv2d, SVDLinear, TuckerConv2d
from lowrank_nn.pipeline import reconstruct as module
from lowrank_nn.pipeline.reconstruct import reconstruct
from tests.pipeline.reconstruction import Residual, chain, compressed, error, images
from tests.zoo import ZOO


def test_what_a_linear_network_does_on_a_subspace_is_kept_exactly():
    torch.manual_seed(0)
    dense = chain().double()
    x = torch.randn(64, 4, dtype=torch.float64) @ torch.randn(4, 12, dtype=torch.float64) + 2
    small = compressed(dense, {"0": (SVDLinear, 4), "1": (SVDLinear, 4), "2": (SVDLinear, 4)})
    before = error(dense, small, [x])
    assert reconstruct(dense, small, [x], ["0", "1", "2"], links=find_links(dense, x)) == {}
    assert error(dense, small, [x]) < 1e-6 * before


def test_a_later_layer_repairs_what_an_earlier_one_lost():
    # The first layer returns every value twice; a fit of low rank keeps some of each, and the second layer adds up.
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    x = 0.3 * torch.randn(256, 8)
    small = compressed(dense, {"0": (SVDLinear, 5), "2": (SVDLinear, 7), "3": (SVDLinear, 2)})
    links = find_links(dense, x)
    errors = [error(dense, small, [x])]
    for paths in (["0"], ["0", "2"], ["0", "2", "3"]):
        new = copy.deepcopy(small)
        reconstruct(dense, new, [x], paths, links=links)
        errors.append(error(dense, new, [x]))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_the_bias_makes_the_mean_output_right():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1))
    x = images(8, 4, 8)  # as many positions as are looked at
    small = compressed(dense, {"0": (TuckerConv2d, (2, 2)), "1": (SVDConv2d, 2)})
    reconstruct(dense, small, [x[:5], x[5:]], ["0", "1"], links=find_links(dense, x))
    with torch.no_grad():
        for got, want in zip((small[:1](x), small(x)), (dense[:1](x), dense(x)), strict=True):
            torch.testing.assert_close(got.mean((0, 2, 3)), want.mean((0, 2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_the_running_mean_makes_the_mean_behind_a_norm_right(bias):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(4, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU()).eval()
    with torch.no_grad():
        for tensor in (dense[1].running_mean, dense[1].running_var, dense[1].weight, dense[1].bias):
            tensor.uniform_(0.5, 1.5)
    x = images(8, 4, 8) + 1
    small = compressed(dense, {"0": (TuckerConv2d, (2, 2))})
    small[1].running_mean.add_(5)  # what it was set to before does not matter
    original = dense[1].running_mean.clone()
    reconstruct(dense, small, [x], ["0"], links=find_links(dense, x))
    with torch.no_grad():
        torch.testing.assert_close(small[:2](x).mean((0, 2, 3)), dense[:2](x).mean((0, 2, 3)), rtol=0, atol=1e-5)
    assert torch.equal(dense[1].running_mean, original)
    assert not torch.equal(small[1].running_mean, original)


def test_without_bias_and_norm_the_mean_counts():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False))
    x = images(16, 4, 10) + 2
    small = compressed(dense, {"0": (TuckerConv2d, (2, 2)), "2": (TuckerConv2d, (2, 2))})
    before = error(dense, small, [x])
    reconstruct(dense, small, [x], ["0", "2"], links=find_links(dense, x))
    assert error(dense, small, [x]) < 0.5 * before


def test_a_branch_repairs_what_the_shortcut_lost():
    torch.manual_seed(0)
    dense = Residual().eval()
    x = images(64, 3, 8)
    small = compressed(dense, {"one": (TuckerConv2d, (2, 2)), "two": (TuckerConv2d, (7, 7))})
    links = find_links(dense, x)
    assert [path for path, link in links.items() if link.shortcut] == ["one", "two"]
    unlinked = {path: Link(link.norm) for path, link in links.items()}
    errors = []
    for known in (unlinked, links):
        new = copy.deepcopy(small)
        reconstruct(dense, new, [x], ["one", "two"], links=known)
        errors.append(error(dense, new, [x]))
    assert errors[1] < 0.7 * errors[0] < 0.7 * error(dense, small, [x])


def test_of_very_wide_layers_only_the_mean_is_corrected(monkeypatch):
    monkeypatch.setattr(module, "MAX_FEATURES", 11)
    torch.manual_seed(0)
    dense, x = chain(), torch.randn(64, 12) + 2
    small = compressed(dense, {"1": (SVDLinear, 4)})
    weight = small[1].weight
    notes = reconstruct(dense, small, [x], ["1"], links=find_links(dense, x))
    assert notes == {"1": "only its mean output corrected: 12 inputs are too many for a covariance"}
    assert torch.equal(small[1].weight, weight)
    with torch.no_grad():
        torch.testing.assert_close(small[:2](x).mean(0), dense[:2](x).mean(0), rtol=0, atol=1e-5)


def test_a_refit_that_is_worse_is_taken_back(monkeypatch):
    torch.manual_seed(0)
    dense, x = chain(), torch.randn(64, 12)
    small = compressed(dense, {"1": (SVDLinear, 4)})
    weight = small[1].weight

    def ruin(layer, weight, metric):
        layer.reset_parameters()

    monkeypatch.setattr(SVDLinear, "refit_", ruin)
    reconstruct(dense, small, [x], ["1"], links=find_links(dense, x))
    assert torch.equal(small[1].weight, weight)


def test_the_curvature_decides_which_outputs_matter():
    torch.manual_seed(0)
    dense, x = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), torch.randn(256, 12)
    links, misses = find_links(dense, x), []
    for curvature in (None, torch.diag(torch.tensor([1.0] * 6 + [1e-6] * 6, dtype=torch.float64))[None]):
        small = compressed(dense, {"1": (SVDLinear, 6)})
        reconstruct(dense, small, [x], ["1"], links=links, curvature={"1": curvature})
        with torch.no_grad():
            misses.append((small(x) - dense(x)).square().mean(0)[:6].sum())
    assert misses[1] < 1e-3 * misses[0]


def test_the_same_seed_gives_the_same_bits_and_batches_may_hold_labels():
    dense, _ = ZOO["resnet20"]()
    batches = images(16, 3, 32).split(8)
    links = find_links(dense, batches[0])
    paths = ["layer1.0.conv1", "layer1.0.conv2", "layer2.1.conv2"]
    small = compressed(dense, dict.fromkeys(paths, (CPConv2d, 8)))
    state = torch.get_rng_state()
    results = []
    for data in (batches, [(x, torch.zeros(len(x))) for x in batches]):
        new = copy.deepcopy(small)
        reconstruct(dense, new, data, paths, links=links, seed=3)
        results.append(new.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key])
    assert any(not torch.equal(value, results[0][key]) for key, value in small.state_dict().items())
