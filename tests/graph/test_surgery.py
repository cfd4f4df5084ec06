"""Removing channels by hand-written groups: tensors against numpy, attributes, sharing, memory format, undo."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.errors import PlanError, UnsupportedLayerError
from lowrank_nn.graph.attributes import Cut, groups_left, register_attributes
from lowrank_nn.graph.groups import ChannelGroup, Member
from lowrank_nn.graph.surgery import Removal, masked_units, remove_units
from tests.graph.hand_groups import chain_groups, each
from tests.zoo._seeded import seeded

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make_net():
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(54, 10), nn.ReLU(), nn.Linear(10, 4))


@pytest.fixture
def net():
    model, _ = seeded(lambda: (make_net(), None))()
    return model


def group(*members, name="g"):
    return ChannelGroup(name, len(members[0][2]), tuple(Member(n, d, p, role) for n, d, p, role in members))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(now[name].equal(before[name]) for name in before)


def test_every_member_loses_its_slices(net):
    before = {name: tensor.numpy() for name, tensor in state(net).items()}
    first, second, third, _ = chain_groups(net)
    remove_units(net, [Removal(first, (0, 5)), Removal(second, (2,)), Removal(third, (9,))])
    one, two, flat = [1, 2, 3, 4, 6, 7], [0, 1, 3, 4, 5], [*range(18), *range(27, 54)]
    expected = {
        "0.weight": before["0.weight"][one],
        "1.running_var": before["1.running_var"][one],
        "3.weight": before["3.weight"][np.ix_(two, one)],
        "3.bias": before["3.bias"][two],
        "6.weight": before["6.weight"][np.ix_(range(9), flat)],
        "8.weight": before["8.weight"][:, :9],
        "8.bias": before["8.bias"],
    }
    now = net.state_dict()
    for name, values in expected.items():
        np.testing.assert_array_equal(now[name].numpy(), values)
    assert (net[0].out_channels, net[1].num_features, net[3].in_channels, net[3].out_channels) == (6, 6, 6, 5)
    assert (net[6].in_features, net[6].out_features, net[8].in_features) == (45, 9, 9)
    assert net(X).shape == (2, 4)


def test_masked_and_removed_agree_and_both_can_be_undone(net):
    first, second, third, _ = chain_groups(net)
    removals = [Removal(first, (1, 2)), Removal(second, (0, 3)), Removal(third, (4,))]
    before, output = state(net), net(X)
    with masked_units(net, removals):
        masked = net(X)
        assert not net[0].weight[1].any()
    assert same_state(net, before)
    assert not torch.allclose(masked, output)
    undo = remove_units(net, removals)
    torch.testing.assert_close(net(X), masked, rtol=1e-5, atol=1e-6)
    undo()
    assert same_state(net, before)
    assert net[3].in_channels == 8
    assert torch.equal(net(X), output)


def test_masking_writes_in_place_but_not_where_one_number_stands_for_many():
    layer = nn.BatchNorm1d(6)
    layer.running_mean = torch.full((1,), 2.0).expand(6)
    held = layer.weight.data_ptr()
    names = ("weight", "bias", "running_mean", "running_var")
    units = group(*((name, 0, each(6), "through") for name in names))
    with masked_units(layer, [Removal(units, (1, 4))]):
        assert layer.weight.data_ptr() == held
        assert layer.running_mean.tolist() == [2, 0, 2, 2, 0, 2]
    assert layer.weight.tolist() == [1] * 6
    assert (layer.running_mean.tolist(), layer.running_mean.stride()) == ([2] * 6, (0,))


def test_parameters_keep_identity_flags_dtype_and_memory_format(net):
    net = net.double().to(memory_format=torch.channels_last)
    net[0].bias.requires_grad_(False)
    parameters = dict(net.named_parameters())
    net(X.double()).sum().backward()
    first, second, _, _ = chain_groups(net)
    remove_units(net, [Removal(first, (0,)), Removal(second, (5,))])
    for name, parameter in net.named_parameters():
        assert parameter is parameters[name]
        assert parameter.dtype is torch.float64
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
    assert net[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert not net[3].weight.is_contiguous()
    assert [net[0].bias.requires_grad, net[0].weight.requires_grad] == [False, True]
    net(X.double()).sum().backward()
    assert net[3].weight.grad.shape == net[3].weight.shape


def test_shared_tensors_stay_shared():
    one, two = nn.Linear(4, 6), nn.Linear(4, 6)
    two.weight = one.weight
    model = nn.ModuleDict({"one": one, "two": two, "again": one})
    found = group(("one.weight", 0, each(6), "out"), ("one.bias", 0, each(6), "out"), ("two.bias", 0, each(6), "out"))
    remove_units(model, [Removal(found, (0, 1))])
    assert one.weight is two.weight
    assert one.weight.shape == (4, 4)
    assert [one.out_features, two.out_features] == [4, 4]


def test_works_on_the_meta_device(net):
    meta = copy.deepcopy(net).to("meta")
    removals = [Removal(chain_groups(net)[1], (0, 3))]
    remove_units(meta, removals)
    remove_units(net, removals)
    assert {n: t.shape for n, t in meta.state_dict().items()} == {n: t.shape for n, t in net.state_dict().items()}
    assert all(parameter.is_meta for parameter in meta.parameters())


@pytest.mark.parametrize(
    ("groups", "removed", "left"),
    [(1, (0, 3), 1), (4, (0, 1, 2), 3), (4, (0, 3, 6, 9), 4), (12, (1, 2), 10), (4, (0, 1, 2, 3, 6, 9), 3)],
)
def test_groups_left(groups, removed, left):
    assert groups_left(groups, Cut(12, removed)) == left


def test_groups_of_unequal_size_are_refused():
    model = nn.Sequential(nn.Conv2d(4, 8, 1, groups=2))
    before = state(model)
    with pytest.raises(PlanError, match=r"0: 2 groups of channels would keep \[3, 4\] channels each"):
        remove_units(model, [Removal(group(("0.weight", 0, each(8), "out")), (0,))])
    assert same_state(model, before)
    assert model[0].out_channels == 8


@pytest.mark.parametrize("transposed", [False, True])
def test_whole_groups_of_convolutions(transposed):
    cls = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = cls(6, 12, 3, groups=3, padding=1)
    members = [("weight", 0, each(3, 2 if transposed else 4), "through"), ("bias", 0, each(3, 4), "through")]
    dense = layer.weight.detach().clone()
    remove_units(layer, [Removal(group(*members), (1,))])
    assert (layer.groups, layer.in_channels, layer.out_channels) == (2, 4, 8)
    rows = [0, 1, 4, 5] if transposed else [0, 1, 2, 3, 8, 9, 10, 11]
    assert torch.equal(layer.weight, dense[rows])
    assert layer(torch.randn(1, 4, 5, 5)).shape == (1, 8, 5, 5)


def test_group_norm_and_others_follow():
    model = nn.ModuleDict({"n": nn.GroupNorm(4, 8), "p": nn.PReLU(8), "e": nn.Embedding(5, 8), "l": nn.LayerNorm(8)})
    pairs = each(4, 2)
    dims = {"n.weight": 0, "n.bias": 0, "p.weight": 0, "e.weight": 1, "l.weight": 0, "l.bias": 0}
    remove_units(model, [Removal(group(*((name, dim, pairs, "through") for name, dim in dims.items())), (3,))])
    assert (model["n"].num_groups, model["n"].num_channels, model["p"].num_parameters) == (3, 6, 6)
    assert (model["e"].embedding_dim, model["l"].normalized_shape) == (6, (6,))
    for key, shape in (("n", (2, 6, 3)), ("p", (2, 6, 3)), ("l", (2, 6))):
        assert model[key](torch.randn(shape)).shape == shape


def test_emptying_and_unknown_tensors_are_refused(net):
    found = chain_groups(net)[0]
    with pytest.raises(PlanError, match=r"nothing of dim 0 of '0.weight' would be left"):
        remove_units(net, [Removal(found, tuple(range(8)))])
    with pytest.raises(PlanError, match=r"'9.weight' has no positions"):
        remove_units(net, [Removal(group(("9.weight", 0, each(2), "out")), (0,))])


class Attention(nn.Module):
    def __init__(self, dim=12, num_heads=3):
        super().__init__()
        self.num_heads, self.inner_dim, self.dim = num_heads, dim, dim
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(*x.shape[:2], self.inner_dim))


def attention_heads():
    qkv = tuple(tuple(part * 12 + head * 4 + i for part in range(3) for i in range(4)) for head in range(3))
    tensors = [("qkv.weight", 0, qkv, "out"), ("qkv.bias", 0, qkv, "out"), ("proj.weight", 1, each(3, 4), "in")]
    return group(*tensors)


def test_numbers_of_heads_are_recognised():
    layer = Attention()
    x = torch.randn(2, 5, 12)
    removal = Removal(attention_heads(), (1,))
    with masked_units(layer, [removal]):
        expected = layer(x)
    undo = remove_units(layer, [removal])
    assert (layer.num_heads, layer.inner_dim, layer.dim) == (2, 8, 12)
    torch.testing.assert_close(layer(x), expected)
    undo()
    assert (layer.num_heads, layer.inner_dim) == (3, 12)


def test_a_class_of_the_users_own_can_be_registered():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.sizes = nn.Linear(4, 6), (2, 4)

    seen = {}

    def update(module, cuts):
        seen.update(cuts)
        module.sizes = (2, module.proj.out_features - 2)

    register_attributes(Split, update)
    layer = Split()
    members = [("proj.weight", 0, each(6), "out"), ("proj.bias", 0, each(6), "out")]
    undo = remove_units(layer, [Removal(group(*members), (3, 5))])
    assert layer.sizes == (2, 2)
    assert seen["proj.weight"][0] == Cut(6, (3, 5))
    undo()
    assert layer.sizes == (2, 4)


def low_rank(build, size):
    layer = build()
    first, *_, last = layer.stages()
    names = {child: name for name, child in layer.named_modules()}
    inner = [(f"{names[first]}.weight", 0, each(size), "out"), (f"{names[last]}.weight", 1, each(size), "in")]
    return layer, group(*inner)


@pytest.mark.parametrize(
    ("build", "rank"),
    [
        (lambda: lnn.SVDLinear(10, 12, rank=6), 4),
        (lambda: lnn.SVDConv2d(10, 12, 3, padding=1, rank=6), 4),
        (lambda: lnn.SpatialSVDConv2d(10, 12, 3, padding=1, rank=6), 4),
        (lambda: lnn.TuckerConv2d(10, 12, 3, padding=1, rank=(None, 6)), (None, 4)),
        (lambda: lnn.TuckerConv2d(10, 12, 3, padding=1, rank=(6, None)), (4, None)),
    ],
)
def test_inner_ranks_are_channels(build, rank):
    layer, found = low_rank(build, 6)
    x = torch.randn((2, 10) if isinstance(layer, lnn.SVDLinear) else (2, 10, 5, 5))
    removal = Removal(found, (0, 3))
    with masked_units(layer, [removal]):
        expected = layer(x)
    remove_units(layer, [removal])
    assert layer.rank == rank
    torch.testing.assert_close(layer(x), expected)
    twin = type(layer)(**layer.config())
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    assert layer.cost(x.shape) == twin.cost(x.shape)


def test_inner_rank_of_a_three_stage_cp():
    layer = lnn.CPConv2d(10, 12, 3, padding=1, rank=6)
    names = {child: name for name, child in layer.named_modules()}
    members = []
    for stage in layer.stages():
        dim, role = (1, "in") if stage is layer.expand else (0, "out")
        members.append((f"{names[stage]}.weight", dim, each(6), role))
    x = torch.randn(2, 10, 5, 5)
    removal = Removal(group(*members), (5,))
    with masked_units(layer, [removal]):
        expected = layer(x)
    remove_units(layer, [removal])
    assert layer.rank == 5
    torch.testing.assert_close(layer(x), expected)
    assert type(layer)(**layer.config()).rank == 5


def test_outer_channels_of_low_rank_layers():
    layer = lnn.TuckerConv2d(10, 12, 3, padding=1, rank=(5, 4))
    members = [("expand.weight", 0, each(12), "out"), ("expand.bias", 0, each(12), "out")]
    undo = remove_units(layer, [Removal(group(*members), (0, 7))])
    assert (layer.out_channels, layer.expand.out_channels, layer.weight_shape) == (10, 10, (10, 10, 3, 3))
    assert layer.dense_weight().shape == (10, 10, 3, 3)
    undo()
    with pytest.raises(lnn.RankError, match=r"rank_out \(rank\[0\]\) must be from 1 to 4, got 5"):
        remove_units(layer, [Removal(group(*members), tuple(range(8)))])
    assert layer.out_channels == 12


def test_masked_layers_are_refused():
    model = nn.Sequential(lnn.PrunedLinear(4, 6, sparsity=0.5))
    with pytest.raises(UnsupportedLayerError, match="0: PrunedLinear: channels cannot be removed from a layer"):
        remove_units(model, [Removal(group(("0.kernel", 0, each(6), "out")), (0,))])


@pytest.mark.parametrize("fast", [False, True])
def test_heads_of_torchs_encoder_layers(fast):
    layer, _ = seeded(lambda: (nn.TransformerEncoderLayer(12, 3, 16, batch_first=True), None))()
    qkv = tuple(tuple(part * 12 + head * 4 + i for part in range(3) for i in range(4)) for head in range(3))
    names = [
        ("in_proj_weight", 0, qkv, "out"),
        ("in_proj_bias", 0, qkv, "out"),
        ("out_proj.weight", 1, each(3, 4), "in"),
    ]
    heads = group(*((f"self_attn.{name}", *rest) for name, *rest in names))
    x = torch.randn(2, 5, 12)
    with torch.set_grad_enabled(not fast):  # without gradients torch runs the layer in one fused kernel
        before = layer(x)
        with masked_units(layer, [Removal(heads, (1,))]):
            expected = layer(x)
        undo = remove_units(layer, [Removal(heads, (1,))])
        assert (layer.self_attn.num_heads, layer.self_attn.embed_dim) == (2, 12)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
        undo()
        assert type(layer.self_attn) is nn.MultiheadAttention
        assert torch.equal(layer(x), before)


class Strict(nn.Sequential):
    """Takes no attribute that it does not know."""

    def __setattr__(self, name, value):
        if name not in (*vars(self), *vars(nn.Module())):
            raise AttributeError(name)
        super().__setattr__(name, value)


def test_modules_that_guard_their_attributes_are_put_back(net):
    strict = Strict(*net)
    before = state(strict)
    remove_units(strict, [Removal(chain_groups(strict)[0], (0, 5))])()
    assert same_state(strict, before)
    assert strict(X).equal(net(X))
