"""Plan and result count the same, also where the model's own code reads the weights of layers."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank_nn as lnn
from tests.storage.models import seeded

X = torch.linspace(-1, 1, 40 * 24).reshape(40, 24)


class Beside(nn.Module):
    """Calls its layers, and reads their weights besides: once in a product, once for the dtype."""

    def __init__(self):
        super().__init__()
        self.fc, self.conv, self.unread = nn.Linear(24, 16), nn.Conv2d(1, 12, 3), nn.Linear(24, 16)

    def forward(self, x):
        x = x.to(self.fc.weight.dtype)
        y = self.fc(x) + nn.functional.linear(x, self.fc.weight) + self.unread(x)
        image = x.reshape(len(x), 1, 4, 6)
        return y.sum() + self.conv(image).sum() + nn.functional.conv2d(image, self.conv.weight).sum()


class Instead(nn.Module):
    """Never calls one of its layers, only reads its weight."""

    def __init__(self):
        super().__init__()
        self.fc, self.last = nn.Linear(24, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.last(nn.functional.linear(x, self.fc.weight, self.fc.bias))


RECIPES = {
    "svd": [lnn.Apply([lnn.SVDLinear, lnn.SVDConv2d], rank=1)],
    "kronecker": [lnn.Apply([lnn.KroneckerLinear, lnn.KroneckerConv2d], rank=1)],
    "tucker, then masks": [lnn.Apply([lnn.TuckerConv2d, lnn.SVDLinear], rank=1), lnn.Prune(0.5)],
    "integers": [lnn.Quantize("int8")],
    "codebook": [lnn.Codebook(3)],
    "factors in integers": [lnn.Apply([lnn.SVDLinear, lnn.SVDConv2d], rank=1), lnn.Quantize("int8")],
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model_class", [Beside, Instead])
def test_plan_and_result_count_the_same(model_class, recipe):
    model = seeded(model_class).eval()
    planned = lnn.plan(model, X, RECIPES[recipe])
    result = lnn.compress_model(model, X, RECIPES[recipe])
    assert planned.after == result.report.after == result.plan.after
    assert [row.after for row in planned.rows] == [row.after for row in result.report.rows]
    assert planned.before == result.report.before


def test_what_reading_a_weight_takes_is_counted_as_it_runs():
    small = lnn.compress_model(seeded(Beside).eval(), X, RECIPES["svd"])
    assert {type(small.model.fc), type(small.model.conv)} == {lnn.SVDLinear, lnn.SVDConv2d}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        small.model(X)
    assert small.report.after.macs == counter.get_total_flops() / 2
    read = {row.path: row.after.macs for row in small.report.rows}
    assert read["fc"] - read["unread"] == 2 * 24 * 16


def test_the_planner_counts_reads():
    model = seeded(Beside).eval()
    step, budget = lnn.LowRank(formats=[lnn.SVDLinear, lnn.SVDConv2d]), lnn.Budget(params=0.7)
    for inputs in (X, X[:8]):
        result = lnn.compress_model(model, inputs, step, budget=budget)
        rows = {row.path: row for row in result.report.rows}
        assert all(row.after.macs <= row.before.macs for row in rows.values())
        (dense, *others) = next(found for found in result.plan.choices if found.path == "fc").candidates
        assert others
        for candidate in others:
            rank = candidate.options["rank"]
            assert candidate.cost.macs == len(inputs) * rank * 40 + 2 * rank * 24 * 16 <= dense.cost.macs
    few = lnn.plan(model, X[:2], step, budget=budget).left
    assert any("fc" in paths and "reads its weight" in reason for reason, paths in few.items())


def test_a_layer_stays_whose_factors_would_be_multiplied_at_every_read():
    model = seeded(Beside).eval()
    left = lnn.plan(model, X[:8], lnn.Apply(lnn.SVDLinear, rank=4)).left
    (why,) = [reason for reason, paths in left.items() if "fc" in paths and "MACs" in reason]
    assert f"would take {8 * 4 * 40 + 2 * 4 * 24 * 16:,} MACs in place of {8 * 24 * 16:,}" in why
    assert not any("unread" in paths for paths in left.values())
