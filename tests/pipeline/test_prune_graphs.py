"""Prune(granularity="filter") on networks whose channels branch, join and turn: found, removed, proven, saved."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowrank_nn as lnn
from lowrank_nn.graph import find_groups, model_cost, record
from lowrank_nn.layers import NarrowMultiheadAttention
from tests.zoo import ZOO
from tests.zoo._seeded import seeded

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def shrink(model, inputs, *steps, **options):
    return lnn.compress_model(model, inputs, list(steps), progress=False, **options)


def half(model, inputs, **options):
    result = shrink(model, inputs, lnn.Prune(0.5, granularity="filter", **options))
    assert model_cost(result.model, record(result.model, inputs)) == result.report.after
    return result


class Residual(nn.Module):
    """A residual sum, a concatenation, depthwise, grouped and transposed convolutions, squeeze-excite, PReLU."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.back = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.squeeze, self.excite = nn.Linear(12, 4), nn.Linear(4, 12)
        self.prelu = nn.PReLU(12)
        self.up, self.group_norm = nn.ConvTranspose2d(20, 8, 2, stride=2), nn.GroupNorm(4, 8)
        self.head = nn.Linear(8 * 256, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.back(F.relu(self.inner(x)))
        x = F.relu(self.depth(x))
        y = self.prelu(self.grouped(x))
        y = y * self.excite(F.relu(self.squeeze(y.mean((2, 3))))).sigmoid()[..., None, None]
        z = self.group_norm(self.up(torch.cat([x, y], 1)))
        return self.head(z.flatten(1))


def test_everything_that_is_tied_shrinks_together(tmp_path):
    model, _ = seeded(lambda: (Residual(), None))()
    result = half(model, X)
    small = result.model
    assert small.stem.out_channels == small.norm.num_features == small.back.out_channels == small.depth.groups
    assert small.stem.out_channels < 8
    assert small.inner.out_channels == small.back.in_channels == 6
    assert (small.squeeze.out_features, small.excite.in_features) == (2, 2)
    assert small.squeeze.in_features == small.prelu.num_parameters == small.grouped.out_channels < 12
    assert small.up.in_channels == small.stem.out_channels + small.grouped.out_channels
    assert small.group_norm.num_groups == small.group_norm.num_channels // 2 == small.head.in_features // 512 == 2
    assert result.report.left == {}
    lnn.save(small, tmp_path / "small.lrnn")
    assert torch.equal(lnn.load(tmp_path / "small.lrnn", Residual().eval())(X), small(X))


def test_the_smaller_network_is_the_masked_one():
    """What is removed is found from the weights that are left; the same is set to zero in the given network."""
    model, _ = seeded(lambda: (Residual(), None))()
    small = half(model, X, where="inner").model
    kept = [int((model.inner.bias == bias).nonzero()) for bias in small.inner.bias]
    gone = [unit for unit in range(12) if unit not in kept]
    with torch.no_grad():
        model.inner.weight[gone], model.inner.bias[gone] = 0, 0
    torch.testing.assert_close(small(X), model(X))


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("resnet20", 0.6),
        ("mobilenet_v2", 0.4),
        ("inception", 0.4),
        ("unet", 0.4),
        ("transformer", 0.65),
        ("vgg16", 0.4),
    ],
)
def test_half_of_the_filters_of_the_zoo(name, share, tmp_path):
    model, inputs = ZOO[name]()
    result = half(model, inputs)
    assert result.report.after.params < share * result.report.before.params
    lnn.save(result.model, tmp_path / "small.lrnn")
    with torch.no_grad():
        assert torch.equal(lnn.load(tmp_path / "small.lrnn", ZOO[name]()[0])(inputs), result.model(inputs))


def test_the_report_says_which_channels_stay():
    model, inputs = ZOO["resnet20"]()
    remarks = lnn.compress_model(model, inputs, lnn.Prune(0.3, granularity="filter"), progress=False).report.remarks
    some = {path for text, paths in remarks.items() for path in paths if "some output channels stay" in text}
    every = {path for text, paths in remarks.items() for path in paths if "all output channels stay" in text}
    # Where channels of the stage before are padded with zeros, those that meet zeros stay.
    assert some == {f"layer{stage}.{block}.conv2" for stage in (2, 3) for block in (0, 1, 2)}
    assert every == {"linear"}


def test_heads_of_torchs_attention_go():
    model, inputs = ZOO["transformer"]()
    result = half(model, inputs, where="*self_attn")
    layers = [module for module in result.model.modules() if isinstance(module, nn.MultiheadAttention)]
    assert [type(layer) for layer in layers] == [NarrowMultiheadAttention] * len(layers)
    assert [layer.num_heads for layer in layers] == [2, 2]
    again = half(result.model, inputs, where="*self_attn").model
    assert [layer.num_heads for layer in again.modules() if isinstance(layer, nn.MultiheadAttention)] == [1, 1]


def test_ranks_inside_low_rank_layers_are_filters_too():
    model, _ = seeded(lambda: (nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)), None))()
    recipe = [lnn.Apply(lnn.TuckerConv2d, where="2", rank=(8, 8)), lnn.Prune(0.25, granularity="filter")]
    result = shrink(model, X, *recipe)
    tucker = result.model[2]
    assert (tucker.in_channels, tucker.out_channels, tucker.rank) == (12, 16, (6, 6))
    assert type(tucker)(**tucker.config()).rank == (6, 6)
    assert [(row.options, row.became) for row in result.report.rows] == [
        ("out=12/16", "Conv2d"),
        ("rank=(6, 6) in=12/16", "TuckerConv2d"),
    ]
    assert [row.after for row in result.plan.rows] == [row.after for row in result.report.rows]


def test_norms_without_tensors(tmp_path):
    layers = [nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8, affine=False)]
    model, _ = seeded(lambda: (nn.Sequential(*layers, nn.Conv2d(8, 2, 1)), None))()
    small = half(model, X).model
    assert [small[0].out_channels, small[1].num_features, small[3].out_channels] == [4, 4, 4]
    assert (small[4].num_groups, small[4].num_channels) == (2, 4)
    lnn.save(small, tmp_path / "small.lrnn")
    assert torch.equal(lnn.load(tmp_path / "small.lrnn", model)(X), small(X))


def test_a_pruned_network_trains_and_is_pruned_again():
    model, _ = seeded(lambda: (Residual(), None))()
    tune = lnn.FineTune([(X, torch.tensor([0, 1]))], epochs=1)
    steps = [lnn.Prune(0.25, granularity="filter"), tune, lnn.Prune(0.25, granularity="filter"), lnn.Quantize("int8")]
    result = shrink(model, X, *steps)
    assert result.model.inner.out_channels == 7
    assert torch.isfinite(result.model(X)).all()
    again = shrink(model, X, *steps)
    assert all(
        a.equal(b) for a, b in zip(result.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    )


def test_groups_of_the_smaller_network_are_those_of_the_whole_one():
    model, inputs = ZOO["resnet20"]()
    before, after = (find_groups(net, inputs) for net in (model, half(model, inputs).model))
    assert [group.name for group in before] == [group.name for group in after]
    assert all(a.size == b.size if b.frozen else a.size == b.size // 2 for a, b in zip(after, before, strict=True))


class GroupedQueries(nn.Module):
    """Two heads of keys and values, each for two heads of queries; sizes as attributes, as such modules keep them."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.inner_dim = 4, 2, 3, 12
        self.query, self.key, self.value = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)
        self.out = nn.Linear(12, 8)

    def forward(self, x):
        q = self.query(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = (
            layer(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2).repeat_interleave(2, 1)
            for layer in (self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(y.reshape(*x.shape[:2], self.inner_dim))


def test_heads_of_grouped_queries():
    model, x = GroupedQueries().eval(), torch.randn(2, 5, 8)
    small = half(model, x).model
    assert (small.num_heads, small.num_kv_heads, small.inner_dim) == (2, 1, 6)
    assert [layer.out_features for layer in (small.query, small.key, small.value)] == [6, 3, 3]
    assert small(x).shape == x.shape


def test_a_language_model_loses_width_heads_and_neurons(tmp_path):
    model, tokens = ZOO["language"]()
    result = half(model, tokens)
    block = result.model.blocks[1]
    assert result.model.embed.embedding_dim == result.model.norm.weight.numel() == block.gate.in_features == 16
    assert (block.attention.query.out_features, block.attention.key.out_features) == (16, 8)
    assert block.gate.out_features == block.down.in_features == 32
    lnn.save(result.model, tmp_path / "net.lrnn")
    loaded = lnn.load(tmp_path / "net.lrnn", ZOO["language"]()[0])
    assert torch.equal(loaded(tokens).logits, result.model(tokens).logits)


def test_what_is_returned_beside_the_logits_stays():
    model, tokens = ZOO["language"]()
    attention = half(model, (tokens, True)).model.blocks[1].attention
    assert attention.query.out_features == 32


def test_a_budget_that_cannot_be_met_says_what_the_criterion_cannot_judge():
    net = nn.Sequential(nn.Conv1d(1, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU(), nn.Conv1d(8, 2, 3)).eval()
    x = torch.randn(4, 1, 20, generator=torch.Generator().manual_seed(0))
    step = lnn.Prune(granularity="filter", criterion="obs")
    with pytest.raises(lnn.BudgetError, match=r"cannot touch 0, 2: criterion='obs' says nothing .* not only nn.Conv2d"):
        lnn.compress_model(net, x, [step], budget=lnn.Budget(params=0.5), calibration=[x], progress=False)
