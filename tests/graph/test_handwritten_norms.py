"""Norms that a forward writes out: channels go as with torch's own norms; other means over channels keep them."""

import copy

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.graph.groups import find_groups
from lowrank_nn.graph.proof import prove
from lowrank_nn.graph.surgery import Removal
from tests.zoo._seeded import seeded

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
RECIPE = [lnn.Prune(0.4, granularity="filter")]


class ByHand(nn.Module):
    """The same parameters as torch's norm of ``width`` channels along dim 1."""

    def __init__(self, width, *, bias):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.rand(width, generator=generator) + 0.5)
        self.bias = nn.Parameter(torch.randn(width, generator=generator)) if bias else None


class RootMeanSquare(ByHand):
    def forward(self, x):
        wide = x.to(torch.float64)
        wide = wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + 1e-5)
        return self.weight[:, None, None] * wide.to(x.dtype)


class MeanAndDeviation(ByHand):
    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        squares = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(squares + 1e-5)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class VarMean(ByHand):
    def forward(self, x):
        var, mean = torch.var_mean(x, dim=(1, 2, 3), unbiased=False)
        x = (x - mean[:, None, None, None]) * (var + 1e-5).rsqrt().view(-1, 1, 1, 1)
        return torch.addcmul(self.bias.view(1, -1, 1, 1), x, self.weight.view(1, -1, 1, 1))


class AlongLast(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class Residual(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 10, 3), first, second
        self.body, self.head = nn.Conv2d(10, 10, 3, padding=1), nn.Linear(10, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.body(self.first(x).relu())
        return self.head(self.second(x).mean((2, 3)))


def copied(norm, like):
    with torch.no_grad():
        norm.weight.copy_(like.weight)
        if like.bias is not None:
            norm.bias.copy_(like.bias)
    return norm


@pytest.mark.parametrize(
    ("by_hand", "bias", "build"),
    [
        (RootMeanSquare, False, lambda: nn.RMSNorm(10, eps=1e-5)),
        (MeanAndDeviation, True, lambda: nn.LayerNorm(10, eps=1e-5)),
        (VarMean, True, lambda: nn.GroupNorm(1, 10, eps=1e-5)),
    ],
    ids=["rms_norm", "layer_norm", "group_norm_of_one"],
)
def test_channels_go_as_with_the_norm_of_torch(by_hand, bias, build):
    mine = seeded(lambda: (Residual(by_hand(10, bias=bias), by_hand(10, bias=bias)), None))()[0]
    theirs = copy.deepcopy(mine)
    for name in ("first", "second"):
        norm = copied(build(), getattr(mine, name))
        setattr(theirs, name, norm if isinstance(norm, nn.GroupNorm) else AlongLast(norm))
    torch.testing.assert_close(mine(X), theirs(X))
    small, expected = (lnn.compress_model(model, X, RECIPE, progress=False).model for model in (mine, theirs))
    assert (small.stem.out_channels, small.first.weight.numel(), small.head.in_features) == (6, 6, 6)
    assert torch.equal(small.stem.weight, expected.stem.weight)
    torch.testing.assert_close(small(X), expected(X))


class SpatialAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.head = nn.Conv2d(3, 10, 3), nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(10, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x * self.gate(x.mean(1, keepdim=True)).sigmoid())


class Returned(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        mean = x.mean(1, keepdim=True)
        return self.head(x - mean), mean


class OtherChannels(nn.Module):
    """The mean of some channels shifts others."""

    def __init__(self):
        super().__init__()
        self.stem, self.side, self.head = nn.Conv2d(3, 10, 3), nn.Conv2d(3, 10, 3), nn.Conv2d(10, 4, 1)

    def forward(self, x):
        return self.head(self.stem(x) - self.side(x).mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("model", "layer", "reason"),
    [
        (SpatialAttention, "stem", "mixed by mean in the model itself"),
        (Returned, "stem", "mixed by mean in the model itself"),
        (OtherChannels, "side", "mixed by mean in the model itself"),
    ],
)
def test_means_that_are_used_otherwise_keep_their_channels(model, layer, reason):
    groups = {group.name: group for group in lnn.find_groups(model(), X)}
    assert groups[layer].frozen == reason


class MoreInTraining(Residual):
    def forward(self, x):
        if self.training:
            x = x - x.mean()
        return super().forward(x)


def test_other_statistics_in_training_refuse_what_they_renumber():
    norms = (MeanAndDeviation(10, bias=True) for _ in range(2))
    model = seeded(lambda: (MoreInTraining(*norms), None))()[0]
    result = lnn.compress_model(model, X, RECIPE, progress=False)
    assert result.model.stem.out_channels == 10
    assert "differ from those with the same channels held at zero" in str(result.report)


def test_a_filter_that_never_fires_is_not_taken_for_a_removed_one():
    model = seeded(lambda: (Residual(RootMeanSquare(10, bias=False), RootMeanSquare(10, bias=False)), None))()[0]
    with torch.no_grad():
        for layer in (model.stem, model.body):
            layer.weight[0], layer.bias[0] = 0, 0
    group = next(group for group in lnn.find_groups(model, X) if group.name == "stem")

    def dead_filter_first(model, group):
        return torch.arange(group.size, 0.0, -1)

    step = lnn.Prune(0.4, granularity="filter", criterion=dead_filter_first)
    result = lnn.compress_model(model, X, [step], progress=False)
    assert result.model.stem.out_channels == group.size


class Unbatched(nn.Module):
    """Gated by its own mean, given by keyword; in train mode another mean comes first, of a tensor without channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(5, 10), nn.Linear(10, 4)
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.calls += self.calls.mean()
        x = self.stem(x)
        return self.head(x * torch.rsqrt(torch.mean(input=x.pow(2), dim=-1, keepdim=True) + 1e-5))


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 7, 5)])
def test_means_by_keyword_of_any_number_of_dims(shape):
    model = seeded(lambda: (Unbatched(), None))()[0].eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    groups = find_groups(model, x)
    assert not next(group for group in groups if group.name == "stem").frozen
    proof = prove(model, [Removal(group, (1, 4)) for group in groups if group.name == "stem"], x)
    # In train mode it is the second mean: the first one is taken for it, and nothing can be proven.
    assert "in train mode differ" in proof.refused["stem"]
    model.train = lambda mode=True: model  # the same forward in both modes
    assert prove(model, [Removal(group, (1, 4)) for group in groups if group.name == "stem"], x).refused == {}


class OverTwoDims(nn.Module):
    """A mean over channels and tokens, both of which are of the network's making."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix = nn.Linear(5, 10), nn.Linear(7, 6, bias=False)
        self.head, self.pool = nn.Linear(10, 4), nn.Linear(6, 1)

    def forward(self, x):
        x = self.mix(self.stem(x).mT).mT
        x = (x - x.mean((1, 2), keepdim=True)) * (x.var((1, 2), keepdim=True) + 1e-5).rsqrt()
        return self.pool(self.head(x).mT)


def test_a_mean_over_channels_and_tokens_leaves_out_both():
    model = seeded(lambda: (OverTwoDims(), None))()[0]
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    removals = [Removal(group, (1, 4)) for group in find_groups(model, x) if not group.frozen]
    assert [removal.group.name for removal in removals] == ["stem", "mix"]
    assert prove(model, removals, x).proven == tuple(removals)
