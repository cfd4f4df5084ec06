"""Tensors in whatever a model is called with and returns."""

import dataclasses
import types

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.graph.inputs import call_model, map_tensors, tensors

A, B, C = torch.zeros(1), torch.ones(2), torch.ones(3)


@dataclasses.dataclass
class Fields:
    first: torch.Tensor
    second: object = None


class Loop:
    """An object that knows itself."""

    def __init__(self, value):
        self.value, self.me = value, self


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (A, [A]),
        (None, []),
        ([A, (B, {"c": C})], [A, B, C]),
        (Fields(A, Fields(B)), [A, B]),
        (types.SimpleNamespace(a=A, b=[B], c="text"), [A, B]),
        ((A, Loop(B)), [A, B]),
        (torch.distributions.Normal(B, C[0]), [B, C[0].expand(2)]),
        ((A, nn.Linear(2, 2), nn.Linear, torch, print), [A]),
    ],
)
def test_tensors(value, expected):
    found = list(tensors(value))
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_change_of_tensors_in_an_object():
    value = types.SimpleNamespace(a=A, b=[B])
    changed = map_tensors(lambda tensor: tensor + 1, value)
    assert changed.a.equal(A + 1)
    assert changed.b[0].equal(B + 1)
    assert value.a is A


class Record(nn.Module):
    """Returns its classes in an object of a class that nobody else knows, beside features."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x):
        features = self.b(self.a(x).relu()).relu()
        return features, types.SimpleNamespace(logits=self.head(features))


def test_outputs_inside_of_objects_keep_their_channels():
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    groups = {group.name: group.frozen for group in lnn.find_groups(Record(), x)}
    assert groups == {"a": "", "b": "reaches the output of the model", "head": "reaches the output of the model"}
    small = lnn.compress_model(Record(), x, lnn.Prune(0.5, granularity="filter"), progress=False).model
    assert small.a.out_features == 8
    assert small(x)[1].logits.shape == (4, 10)


class InPlace(nn.Module):
    def forward(self, x, y, more):
        x.mul_(2)
        more["z"].add_(1)
        return x, x is y, more["z"]


def test_what_a_forward_does_to_its_inputs_they_never_see():
    x, z = torch.ones(2), torch.zeros(3)
    for inputs in ((x, x, {"z": z}), {"x": x, "y": x, "more": {"z": z}}):
        doubled, same, added = call_model(InPlace(), inputs)
        assert same
        assert doubled.equal(2 * torch.ones(2))
        assert added.equal(torch.ones(3))
        assert x.equal(torch.ones(2))
        assert z.equal(torch.zeros(3))


def test_calibration_data_stay_as_they_are():
    class Normalising(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            x -= 1
            return self.b(self.a(x).relu())

    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    before = x.clone()
    recipe = [lnn.LowRank(formats=[lnn.SVDLinear]), lnn.Quantize("int4", activations="int8")]
    lnn.compress_model(Normalising(), x, recipe, budget=lnn.Budget(params=0.8), calibration=[x], progress=False)
    assert x.equal(before)


class Stages(nn.Module):
    """Yields what every layer gives."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.first(x).relu()
        yield x
        yield self.second(x)


def test_a_generator_is_gone_through():
    model, x = seeded_stages(), torch.linspace(-1, 1, 24).reshape(3, 8)
    assert all(map(torch.equal, call_model(model, x), model(x)))
    result = lnn.compress_model(model, x, [lnn.Apply(lnn.SVDLinear, rank=2), lnn.Prune(0.5, granularity="filter")])
    assert result.report.after.macs < result.report.before.macs / 2
    assert [tuple(part.shape) for part in result.model(x)] == [(3, 16), (3, 4)]


def seeded_stages():
    torch.manual_seed(0)
    return Stages()
