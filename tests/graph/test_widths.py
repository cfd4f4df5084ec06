"""Heads and the channels that they read go together, so that code can go on computing one from the other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowrank_nn as lnn
from lowrank_nn.graph import find_groups
from lowrank_nn.graph.surgery import named_tensors
from lowrank_nn.graph.widths import SharedWidth, shared_widths
from lowrank_nn.planning.unit_choice import KeepRule
from tests.zoo._seeded import seeded
from tests.zoo.coat import CoaT

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Computes the width of a head from that of its input."""

    def __init__(self, dim, heads, joined):
        super().__init__()
        self.num_heads = heads
        parts = [3] if joined else [1, 1, 1]
        self.projections = nn.ModuleList(nn.Linear(dim, part * dim) for part in parts)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, length, dim = x.shape
        qkv = torch.cat([layer(x) for layer in self.projections], -1)
        qkv = qkv.reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, length, dim))


class Transformer(nn.Module):
    def __init__(self, dim=24, heads=(4, 4), joined=True):
        super().__init__()
        self.embed, self.head = nn.Linear(6, dim), nn.Linear(dim, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in heads)
        self.attentions = nn.ModuleList(Attention(dim, count, joined) for count in heads)

    def forward(self, x):
        x = self.embed(x)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x))
        return self.head(x.mean(1))


def make(**options):
    return seeded(lambda: (Transformer(**options), None))()[0]


def widths_of(model):
    groups = [group for group in find_groups(model, X) if not group.frozen]
    return shared_widths(groups, named_tensors(model))


@pytest.mark.parametrize("joined", [True, False])
def test_one_width_is_found(joined):
    (width,) = widths_of(make(joined=joined))
    assert width.channels == 24
    assert sorted(tuple(side.values()) for side in width.sides) == [(1,), (6,), (6,)]


class Pyramid(nn.Module):
    """The second stage has the channels of the first one twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 24), nn.Linear(48, 4)
        self.first, self.second = Attention(24, 4, True), Attention(48, 8, True)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.first(x)
        x = torch.cat([x, x], -1)
        return self.head((x + self.second(x)).mean(1))


def test_widths_that_follow_from_each_other_are_counted_alike():
    model = seeded(lambda: (Pyramid(), None))()[0]
    (width,) = widths_of(model)
    assert width.channels == 48
    assert sorted(tuple(side.values()) for side in width.sides) == [(2,), (6,), (12,)]
    small = lnn.compress_model(model, X, [lnn.Prune(0.25, granularity="filter")]).model
    assert (small.embed.out_features, small.first.num_heads, small.second.num_heads) == (18, 3, 6)


def test_linear_layers_of_the_same_width_do_not_share_it():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    assert widths_of(model) == []


@pytest.mark.parametrize(
    ("heads", "share", "channels"),
    [((4, 4), 0.3, 18), ((4, 4), 0.5, 12), ((4, 2), 0.3, 12), ((4, 4), 0.1, 24), ((3, 3), 0.3, 16)],
)
def test_heads_go_on_filling_the_width(heads, share, channels):
    model = make(heads=heads)
    result = lnn.compress_model(model, X, [lnn.Prune(share, granularity="filter")], progress=False)
    assert result.model.embed.out_features == channels
    for attention, count in zip(result.model.attentions, heads, strict=True):
        assert type(attention) is Attention
        assert attention.num_heads * 24 == channels * count
        assert attention.proj.weight.shape == (channels, channels)
    assert not any("the forward fails" in reason for reason in result.report.left)
    assert result.model(X).shape == (2, 4)


@pytest.mark.parametrize(
    ("parts", "share", "left"),
    [((2, 2), 0.3, (1, 1)), ((2, 3, 3), 0.3, (1, 2, 2)), ((2, 3, 3), 0.1, (2, 3, 3)), ((2, 6), 0.2, (2, 5))],
)
def test_heads_that_go_several_ways_fill_the_width_together(parts, share, left):
    windows = dict(zip((1, 3, 5), parts, strict=False))
    model, image = seeded(lambda: (CoaT(windows), torch.randn(2, 3, 8, 8)))()
    result = lnn.compress_model(model, image, [lnn.Prune(share, granularity="filter")], progress=False)
    small = result.model
    assert small.embed.out_channels == 4 * sum(left)
    for attention in small.attentions:
        assert attention.num_heads == sum(left)
        assert attention.qkv.weight.shape == (12 * sum(left), 4 * sum(left))
        assert tuple(conv.groups for conv in attention.shared.convolutions) == tuple(4 * heads for heads in left)
    assert not any("the forward fails" in reason for reason in result.report.left)
    assert small(image).shape == (2, 5)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_under_a_budget(scope):
    step = lnn.Prune(granularity="filter", scope=scope)
    result = lnn.compress_model(make(), X, [step], budget=lnn.Budget(params=0.5), progress=False)
    assert result.report.after.params <= 0.5 * result.report.before.params
    (one, two) = result.model.attentions
    assert one.num_heads == two.num_heads == result.model.embed.out_features // 6


@pytest.mark.parametrize(
    ("keep", "share", "stream"),
    [
        (KeepRule(), 0.4, 6),  # of 12 channels 7.2 would stay
        (KeepRule(), 0.2, 9),
        (KeepRule(), 1.0, 3),  # a head stays
        (KeepRule(min_keep=0.6), 1.0, 9),
        (KeepRule(round_to=2), 0.6, 6),
    ],
)
def test_how_many_stay_of_groups_that_share_a_width(keep, share, stream):
    scores = {"stream": torch.arange(12.0), "heads": torch.arange(4.0)}
    chosen = keep.choose(scores, share, [SharedWidth(12, ({"stream": 1}, {"heads": 3}))])
    assert (12 - len(chosen["stream"]), 4 - len(chosen["heads"])) == (stream, stream // 3)


def test_parts_keep_one_head_each():
    scores = {"stream": torch.arange(24.0), "one": torch.arange(2.0), "other": torch.arange(6.0)}
    chosen = KeepRule(min_keep=0).choose(scores, 1.0, [SharedWidth(24, ({"stream": 1}, {"one": 3, "other": 3}))])
    assert {name: len(scores[name]) - len(units) for name, units in chosen.items()} == {
        "stream": 6,
        "one": 1,
        "other": 1,
    }


def test_without_scores_for_one_of_them_the_others_are_free():
    chosen = KeepRule().choose({"stream": torch.arange(12.0)}, 0.4, [SharedWidth(12, ({"stream": 1}, {"heads": 3}))])
    assert len(chosen["stream"]) == 5
