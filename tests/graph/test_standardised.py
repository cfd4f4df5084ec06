"""Convolutions that standardise their weights lose input channels; what is left is standardised."""

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.graph import find_groups
from lowrank_nn.graph.proof import prove
from lowrank_nn.graph.surgery import Removal
from tests.graph.removal import assert_removable
from tests.zoo._seeded import seeded
from tests.zoo.nfnet import ByStatistics, InSteps, NFNet, StandardisedConv2d

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SPELLINGS = [StandardisedConv2d, ByStatistics, InSteps]


def make(conv, groups=2):
    return seeded(lambda: (NFNet(conv, groups=groups), None))()[0]


def free(groups):
    return {group.name: group.size for group in groups if not group.frozen}


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("conv", SPELLINGS)
def test_groups(conv, groups):
    model = make(conv, groups).double()
    found = find_groups(model, X.double())
    inner = {1: {"reduce": 8, "spatial": 8}, 2: {"reduce": 4, "spatial": 4}, 8: {"reduce": 8}}[groups]
    blocks = {f"blocks.{index}.{name}": size for index in range(2) for name, size in inner.items()}
    assert free(found) == {"stem": 16, "last": 32, **blocks}
    assert_removable(model, X.double(), found)


@pytest.mark.parametrize("conv", SPELLINGS)
def test_everything_is_proven_in_both_modes(conv):
    model = make(conv)
    removals = [Removal(group, (0, 2)) for group in find_groups(model, X) if not group.frozen]
    proof = prove(model, removals, X)
    assert proof.proven == tuple(removals)
    assert (proof.refused, proof.untested) == ({}, "")


def test_a_smaller_network_computes_what_its_weights_say():
    """Of two layers, against weights standardised in numpy."""
    model = seeded(lambda: (nn.Sequential(StandardisedConv2d(3, 8, 1), nn.ReLU(), StandardisedConv2d(8, 4, 1)), None))()
    model = model[0].double()
    given = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    scales = [3**-0.5, 8**-0.5]
    result = lnn.compress_model(model, X.double(), [lnn.Prune(0.25, granularity="filter")], progress=False)
    one, _, two = result.model
    assert (one.out_channels, two.in_channels) == (6, 6)
    kept = [row for row in range(8) if any(torch.equal(given["0.weight"][row], other) for other in one.weight)]
    x = X.double().numpy().reshape(2, 3, 64)
    for layer, scale, rows, columns in (("0", scales[0], kept, [0, 1, 2]), ("2", scales[1], range(4), kept)):
        weight, gain, bias = (given[f"{layer}.{name}"].numpy() for name in ("weight", "gain", "bias"))
        weight = weight[list(rows), :, 0, 0][:, columns]
        weight = (weight - weight.mean(1, keepdims=True)) / (weight.var(1, keepdims=True) + 1e-6) ** 0.5
        x = (weight * gain[list(rows), :, 0, 0] * scale) @ x + bias[list(rows), None]
        x = x.clip(0) if layer == "0" else x
    torch.testing.assert_close(result.model(X.double()).detach().flatten(2), torch.from_numpy(x))


class FanInOfTheMoment(StandardisedConv2d):
    """Reads the number of inputs in the forward: with fewer, all weights grow."""

    def standardised(self):
        return super().standardised() * self.weight[0].numel() ** -0.5


class OfChannelsOfOtherKinds(StandardisedConv2d):
    """Statistics of something that was computed by a function without a rule."""

    def standardised(self):
        return self.weight - torch.fft.fft(self.weight, dim=1).real.mean(1, keepdim=True)


@pytest.mark.parametrize("conv", [FanInOfTheMoment, OfChannelsOfOtherKinds])
def test_weights_that_depend_otherwise_on_how_many_channels_there_are_keep_them(conv):
    model = seeded(lambda: (nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), conv(8, 4, 1)), None))()[0]
    result = lnn.compress_model(model, X, [lnn.Prune(0.25, granularity="filter")], progress=False)
    assert result.model[0].out_channels == 8


def test_statistics_of_a_batch_are_not_meant():
    class Centred(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) - x.mean((1, 2, 3), keepdim=True)

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Centred(8, 4, 1))
    (first, *_) = find_groups(model, X)
    assert "mixed by mean" in first.frozen


class Flattened(StandardisedConv2d):
    """The same by hand, with kernel and channels as one dimension."""

    def standardised(self):
        flat = self.weight.flatten(1).float()
        flat = (flat - flat.mean(dim=1, keepdim=True)) / (flat.var(1, False, keepdim=True) + 1e-6).sqrt()
        return flat.to(self.weight).view(self.weight.shape) * self.gain * self.scale


class AlongAxis(StandardisedConv2d):
    """The same by hand, channels last."""

    def standardised(self):
        weight = self.weight.permute(0, 2, 3, 1)
        weight = weight - torch.mean(weight, axis=(1, 2, 3), keepdim=True)
        weight = weight / (weight.reshape(len(weight), -1).std(-1, False)[:, None, None, None] + 1e-5)
        return weight.permute(0, 3, 1, 2) * self.gain * self.scale


class OfOneScale(StandardisedConv2d):
    """All filters share their statistics."""

    def standardised(self):
        return (self.weight - self.weight.mean()) / (self.weight.std(False) + 1e-3) * self.gain


@pytest.mark.parametrize("conv", [Flattened, AlongAxis, OfOneScale])
def test_further_spellings(conv):
    model = make(conv)
    result = lnn.compress_model(model, X, [lnn.Prune(0.3, granularity="filter")], progress=False)
    assert result.model.stem.out_channels == 11
    assert result.model.blocks[0].spatial.in_channels == 6


@pytest.mark.parametrize("criterion", ["lasso", "thinet", "obs", "similar"])
def test_criteria_that_multiply_by_stored_weights_leave_standardised_ones_alone(criterion):
    model = make(StandardisedConv2d).eval()
    groups = [group for group in find_groups(model, X) if not group.frozen]
    scores = lnn.unit_importance(model, groups, criterion, calibration=[X], progress=False)
    assert {"stem", "last", "blocks.0.reduce", "blocks.1.spatial"} <= {group.name for group in groups}
    assert set(scores) == (set() if criterion == "similar" else {"last"})  # the head reads it, a plain layer


def test_the_report_says_which_weights_a_criterion_leaves_alone():
    recipe = [lnn.Prune(0.25, granularity="filter", criterion="lasso")]
    result = lnn.compress_model(make(StandardisedConv2d).eval(), X, recipe, calibration=[X], progress=False)
    widths = {path: layer.out_channels for path, layer in result.model.named_modules() if hasattr(layer, "gain")}
    assert (widths["last"], widths["stem"], widths["blocks.0.reduce"], widths["blocks.1.spatial"]) == (24, 16, 8, 8)
    said = {path for reason, paths in result.report.left.items() if "'lasso' says nothing" in reason for path in paths}
    assert said >= {"stem", "blocks.0.reduce", "blocks.1.spatial", "blocks.1.expand"}


def test_standardised_weights_are_not_refitted():
    model = make(StandardisedConv2d).eval()
    recipe = [lnn.Prune(0.25, granularity="filter", where="blocks.0.reduce")]
    result = lnn.compress_model(model, X, recipe, calibration=[X], progress=False)
    kept = [
        row
        for row in range(8)
        if any(model.blocks[0].reduce.weight[row].equal(w) for w in result.model.blocks[0].reduce.weight)
    ]
    assert len(kept) == 6
    assert result.report.remarks["Prune: not refitted: StandardisedConv2d overrides forward"] == ("blocks.0.spatial",)
