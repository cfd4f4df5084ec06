"""Proofs of removals: what is equal passes, what is not is refused with a reason, the model is left alone."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_nn.errors import PlanError
from lowrank_nn.graph.groups import ChannelGroup, Member, find_groups
from lowrank_nn.graph.proof import prove
from lowrank_nn.graph.surgery import Removal
from tests.graph.hand_groups import chain_groups, each
from tests.zoo._seeded import seeded

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def build(*layers):
    return seeded(lambda: (nn.Sequential(*layers), None))()[0]


def plain(width=8):
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.5)]
    layers += [nn.Conv2d(width, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 10), nn.Sigmoid()]
    return build(*layers, nn.Linear(10, 4))


def removals_of(model, *units):
    return [Removal(group, units) for group in chain_groups(model) if not group.frozen]


def test_everything_is_proven_at_once_and_nothing_is_touched():
    model = plain()
    model[0].weight.requires_grad_(False)
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    torch.manual_seed(3)
    random = torch.get_rng_state()
    removals = removals_of(model, 1, 2)
    proof = prove(model, removals, X)
    assert proof.proven == tuple(removals)
    assert (proof.refused, proof.untested) == ({}, "")
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_that_want_gradients_get_none():
    inputs = X.clone().requires_grad_()
    model = plain()
    assert prove(model, removals_of(model, 1, 2), inputs).refused == {}
    assert inputs.grad is None


class BagOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.hidden = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, words):
        return self.out(F.relu(self.hidden(self.words(words).mean(1))))


def test_sparse_gradients_are_compared():
    model = seeded(lambda: (BagOfWords(), None))()[0]
    words = torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(0))
    removals = [Removal(group, (1, 2)) for group in find_groups(model, words) if not group.frozen]
    assert {member.name for removal in removals for member in removal.group.members} >= {"words.weight", "out.weight"}
    proof = prove(model, removals, words)
    assert (proof.proven, proof.untested) == (tuple(removals), "")


class MeanOverChannels(nn.Module):
    def forward(self, x):
        return x * x.mean(1, keepdim=True)


class BakedConstant(nn.Module):
    def forward(self, x):
        return x.view(len(x), 8, 64).reshape(x.shape)


class Scaled(nn.Module):
    """Reads the number of channels in a way that no shape error shows."""

    def forward(self, x):
        return x / x.shape[1]


class OnlyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.shape[1]


class WrongGradient(nn.Module):
    def forward(self, x):
        return OnlyBackward.apply(x)


@pytest.mark.parametrize(
    ("mixer", "reason"),
    [
        (MeanOverChannels(), "the outputs in eval mode differ"),
        (Scaled(), "the outputs in eval mode differ"),
        (BakedConstant(), "without these channels the forward fails in eval mode: RuntimeError: shape"),
        (WrongGradient(), "the gradients in train mode differ"),
    ],
)
def test_one_bad_group_among_many_is_refused(mixer, reason):
    layers = []
    for index in range(7):
        layers += [nn.Conv2d(8 if index else 3, 8, 3, padding=1), mixer if index == 4 else nn.ReLU()]
    model = build(*layers, nn.Flatten(), nn.Linear(512, 3))
    removals = removals_of(model, 3)
    proof = prove(model, removals, X)
    assert list(proof.refused) == ["8"]
    assert reason in proof.refused["8"]
    assert [removal.group.name for removal in proof.proven] == ["0", "2", "4", "6", "10", "12"]


class Block(nn.Module):
    """Five layers, one of them in front of what keeps it from losing channels."""

    runs = 0

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "abcde"})
        for layer in self.layers.values():
            nn.init.uniform_(layer.weight, 0.1, 0.15)

    def forward(self, x):
        Block.runs += 1
        for name, layer in self.layers.items():
            x = layer(x) * 8 / x.shape[1] if name == "d" else layer(x)
        return x


def test_bad_groups_at_the_same_place_of_every_block_cost_few_runs():
    model = build(*(Block() for _ in range(6)), nn.Linear(8, 3))
    inputs = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    removals = [Removal(group, (3,)) for group in find_groups(model, inputs) if not group.frozen]
    Block.runs = 0
    proof = prove(model, removals, inputs)
    assert list(proof.refused) == [f"{index}.layers.c" for index in range(6)]
    assert len(proof.proven) == 24
    assert Block.runs / 6 <= 42  # halving in the order of execution takes 84, one group after the other 66


def test_a_missing_member_is_found():
    model = plain()
    group = chain_groups(model)[0]
    forgotten = ChannelGroup("0", 8, tuple(m for m in group.members if m.name != "4.weight"))
    proof = prove(model, [Removal(forgotten, (0,))], X)
    assert "without these channels the forward fails" in proof.refused["0"]


def test_a_member_that_does_not_belong_is_found():
    """The second layer's rows cut in the places of the first one's channels: shapes fit, values do not."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.out = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(F.relu(self.one(x)) + F.relu(self.two(x)))

    model, x = Sum(), torch.randn(3, 5)
    right = [Member(f"{name}.{p}", 0, each(6), "out") for name in ("one", "two") for p in ("weight", "bias")]
    shifted = tuple((unit + 1) % 6 for unit in range(6))
    wrong = [m if m.name.startswith("one") else Member(m.name, 0, tuple((p,) for p in shifted), "out") for m in right]
    reads = Member("out.weight", 1, each(6), "in")
    assert prove(model, [Removal(ChannelGroup("one", 6, (*right, reads)), (2,))], x).refused == {}
    refused = prove(model, [Removal(ChannelGroup("one", 6, (*wrong, reads)), (2,))], x).refused
    assert "the outputs in eval mode differ" in refused["one"]


def test_batches_of_one_are_doubled_for_batch_statistics():
    model = build(nn.Conv2d(3, 8, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    proof = prove(model, removals_of(model, 0), X[:1])
    assert (proof.refused, proof.untested) == ({}, "")


def test_what_cannot_be_tested_is_said():
    class NoTraining(nn.Module):
        def forward(self, x):
            if self.training:
                raise ValueError("targets are missing")
            return x

    model = build(nn.Conv2d(3, 8, 3), NoTraining(), nn.Conv2d(8, 4, 1))
    proof = prove(model, removals_of(model, 0), X)
    assert len(proof.proven) == 1
    assert proof.untested == "in train mode the model fails on the example inputs (ValueError: targets are missing)"


def test_models_that_only_run_in_their_own_dtype_are_tried_in_that():
    class Float(nn.Module):
        def forward(self, x):
            return (
                x * torch.ones(1, dtype=torch.float32).expand(x.shape).to(x.dtype) if x.dtype != torch.double else 1 / 0
            )

    model = build(nn.Conv2d(3, 8, 3), Float(), nn.Conv2d(8, 4, 1))
    proof = prove(model, removals_of(model, 0), X)
    assert len(proof.proven) == 1
    assert prove(model.bfloat16(), removals_of(model, 0), X.bfloat16()).refused == {}


def test_inputs_that_do_not_fit_are_an_error():
    model = plain()
    with pytest.raises(PlanError, match="Sequential: the forward fails on example_inputs: RuntimeError"):
        prove(model, removals_of(model, 0), X[:, :2])


@pytest.mark.parametrize("inputs", [X[:0], torch.full_like(X, torch.nan)], ids=["empty", "nan"])
def test_nothing_is_proven_where_nothing_can_be_compared(inputs):
    model = plain()
    with pytest.raises(PlanError, match="Sequential: the forward returns no finite numbers on example_inputs"):
        prove(model, removals_of(model, 0), inputs)


def test_dropout_and_dict_inputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, batch):
            y = F.dropout(self.one(batch["x"]).relu(), 0.5, self.training) * (torch.rand(len(batch["x"]), 1) + 0.5)
            return {"logits": self.two(y), "largest": y.sum(1).argmax()}

    members = [Member(f"one.{p}", 0, each(6), "out") for p in ("weight", "bias")]
    group = ChannelGroup("one", 6, (*members, Member("two.weight", 1, each(6), "in")))
    proof = prove(Net(), [Removal(group, (0, 4))], ({"x": torch.randn(3, 4)},))
    assert (proof.refused, proof.untested) == ({}, "")


def test_zeros_divided_by_zeros():
    """The weight of a filter over its own length (Salimans and Kingma 2016, written out), and knots of a spline."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.direction, self.length = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.rand(8, 1))
            self.register_buffer("knots", torch.arange(6.0).expand(8, 6) - 3)
            self.coefficients = nn.Parameter(torch.randn(3, 8, 5))

        def forward(self, x):
            x = F.linear(x, self.length * self.direction / self.direction.norm(dim=1, keepdim=True))
            away = (x[..., None] - self.knots[:, :-1]) / (self.knots[:, 1:] - self.knots[:, :-1])
            return F.linear(torch.relu(1 - away.abs()).flatten(1), self.coefficients.flatten(1))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(5, 4)
    (group,) = (group for group in find_groups(model, x) if not group.frozen)
    assert group.size == 8
    proof = prove(model, [Removal(group, (0, 4))], x)
    assert (proof.refused, proof.untested) == ({}, "")
    wrong = dataclasses.replace(group, members=tuple(m for m in group.members if m.name != "coefficients"))
    assert prove(model, [Removal(wrong, (0, 4))], x).refused


def test_no_removals_no_work():
    assert prove(plain(), [], X).proven == ()


@pytest.mark.cuda
def test_on_cuda(device):
    model = plain().to(device)
    assert len(prove(model, removals_of(model, 1), X.to(device)).proven) == 3


class Normalised(nn.Module):
    """``scaled`` computes the weight of the norm: then nobody knows which of its channels are gone."""

    def __init__(self, norm, scaled=False):
        super().__init__()
        self.first, self.norm, self.last, self.scaled = nn.Linear(3, 8), norm, nn.Linear(8, 4), scaled

    def forward(self, x):
        x = self.first(x)
        if isinstance(self.norm, nn.GroupNorm):
            return self.last(self.norm(x.mT).mT)
        y = torch.layer_norm(x, x.shape[-1:], self.norm.weight * 1) if self.scaled else self.norm(x)
        return self.last(y)


def normalised_groups(norm):
    names = [name for name in ("weight", "bias") if getattr(norm, name, None) is not None]
    members = [Member("first.weight", 0, each(8), "out"), Member("first.bias", 0, each(8), "out")]
    members += [Member(f"norm.{name}", 0, each(8), "through") for name in names]
    return ChannelGroup("first", 8, (*members, Member("last.weight", 1, each(8), "in")))


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.RMSNorm(8), nn.GroupNorm(1, 8)], ids=str
)
def test_layer_norms_normalise_what_is_left(norm):
    model = seeded(lambda: (Normalised(norm), None))()[0]
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    x = X[:, :, 0].permute(0, 2, 1)
    removal = Removal(normalised_groups(norm), (1, 4, 5))
    assert prove(model, [removal], x).proven == (removal,)
    other = Removal(ChannelGroup("first", 8, removal.group.members[:-1]), removal.units)  # the reader keeps its columns
    assert prove(model, [other], x).proven == ()


def test_a_layer_norm_with_a_computed_weight_is_refused():
    norm = nn.LayerNorm(8, bias=False)
    model = seeded(lambda: (Normalised(norm, scaled=True), None))()[0]
    proof = prove(model, [Removal(normalised_groups(norm), (1, 4, 5))], X[:, :, 0].permute(0, 2, 1))
    assert "differ" in proof.refused["first"]


def test_removals_that_only_work_together_are_tried_together():
    """Two halves of a product of fixed shape."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.c(self.a(x) * self.b(x))

    model = seeded(lambda: (Gate(), None))()[0]
    rows = [[Member(f"{n}.{t}", 0, each(6), "out") for t in ("weight", "bias")] for n in "ab"]
    one = Removal(ChannelGroup("a", 6, (*rows[0], Member("c.weight", 1, each(6), "in"))), (2,))
    two = Removal(ChannelGroup("b", 6, tuple(rows[1])), (2,))
    bad = Removal(ChannelGroup("bad", 6, (Member("a.bias", 0, each(6), "out"),)), (0,))
    x = X[:, :, 0, 0]
    assert set(prove(model, [one, bad, two], x).refused) == {"a", "b", "bad"}
    assert set(prove(model, [one, bad, two], x, together=[{"a", "b"}]).refused) == {"bad"}
