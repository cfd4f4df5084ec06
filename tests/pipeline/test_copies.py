"""The copy that is compressed calls its own layers, and none that was replaced."""

import functools

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from tests.storage.models import seeded
from tests.untouched import assert_untouched, snapshot

X = torch.linspace(-1, 1, 48).reshape(4, 12)


class Net(nn.Module):
    """Calls its second layer by way of ``self.reach``."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Linear(24, 24)
        self.reach = self.way()

    def way(self):
        return self.second.forward

    def forward(self, x):
        return self.reach(torch.relu(self.norm(self.first(x))))


class ByLambda(Net):
    def way(self):
        return lambda x: self.second(self.norm(x))


class ByPartial(Net):
    def way(self):
        return functools.partial(torch.nn.Module.__call__, self.second)


@pytest.mark.parametrize("train", [False, True])
def test_layers_of_the_given_model_behind_a_lambda_are_refused_before_they_are_trained(train):
    model = seeded(ByLambda).train(train)
    before = snapshot(model)
    recipe = [lnn.Apply(lnn.SVDLinear, where="first", rank=2), lnn.FineTune([X], epochs=1)]
    with pytest.raises(lnn.PlanError, match=r"copy.deepcopy\(model\) calls layers of the given model: norm, second\."):
        lnn.compress_model(model, X, recipe, progress=False)
    assert_untouched(model, before)


def test_a_replaced_layer_that_is_still_called_is_named():
    model = seeded(ByPartial)
    with pytest.raises(lnn.PlanError, match="still calls the layers that were replaced: second"):
        lnn.compress_model(model, X, lnn.Apply(lnn.SVDLinear, rank=2), progress=False)
    small = lnn.compress_model(model, X, lnn.Apply(lnn.SVDLinear, but_not="second", rank=2), progress=False).model
    assert type(small.first) is lnn.SVDLinear


def test_a_layer_whose_forward_is_called_directly_stays():
    result = lnn.compress_model(seeded(Net), X, lnn.Apply(lnn.SVDLinear, rank=2), progress=False)
    assert result.report.left == {"Apply: the model never calls it": ("second",)}
