"""Allocation rules, rank multiples and bounds on single layers, through whole calls."""

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.layers import read_layer
from lowrank_nn.planning.rules import ALLOCATIONS
from tests.zoo.resnet import ResNet

MATRICES = (lnn.SVDConv2d, lnn.SVDLinear, lnn.TuckerConv2d)


@pytest.fixture(scope="module")
def case():
    model, inputs = ResNet(depth=8), torch.zeros(2, 3, 16, 16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # low-rank structure in noise, as after training
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                out, size = layer.weight.shape[0], layer.weight[0].numel()
                low = torch.randn(out, 3, generator=generator) @ torch.randn(3, size, generator=generator)
                noise = 0.2 * torch.randn(out, size, generator=generator)
                layer.weight.copy_(0.05 * (low + noise).reshape(layer.weight.shape))
    return model.eval(), inputs


def low_rank(**options):
    if options.get("allocation", "knapsack") in ("knapsack", "uniform"):
        options = {"formats": MATRICES} | options  # the others come with formats of their own
    return lnn.LowRank(**options)


def plan(case, share=0.5, **options):
    return lnn.plan(*case, low_rank(**options), budget=lnn.Budget(params=share))


def kept(report):
    return {row.path: row.after.params / row.before.params for row in report.rows}


@pytest.mark.parametrize("name", list(ALLOCATIONS))
def test_every_rule_meets_the_budget(case, name):
    model, inputs = case
    result = lnn.compress_model(model, inputs, low_rank(allocation=name), budget=lnn.Budget(params=0.6))
    report = result.report
    assert 0.4 * report.before.params < report.after.params <= 0.6 * report.before.params
    assert report.after == result.plan.after
    for row, planned in zip(report.rows, result.plan.rows, strict=True):
        if row.replaced:
            assert row.error <= planned.error * 1.1 + 1e-6


def test_the_knapsack_loses_least(case):
    def lost(name):
        formats = (lnn.SVDConv2d, lnn.SVDLinear)
        rows = plan(case, 0.4, allocation=name, formats=formats).rows
        return sum(-torch.tensor(1 - (row.error or 0) ** 2).log().item() for row in rows)

    assert lost("knapsack") < min(lost("uniform"), lost("alds"))


def test_uniform_shares_are_alike(case):
    report = plan(case, 0.5, allocation="uniform")
    large = [share for path, share in kept(report).items() if report.rows[0].path != path]
    assert max(large) - min(large) < 0.25


def test_one_share_of_weakening_for_all(case):
    model, _ = case
    report = plan(case, 0.6, allocation="musco", formats=(lnn.SVDConv2d, lnn.SVDLinear))
    possible = set(range(1, 101))
    for row, rank in zip((row for row in report.rows if row.replaced), ranks_of(report), strict=True):
        problem = lnn.LAYERS[row.became].rank_problem(read_layer(model.get_submodule(row.path), lnn.LAYERS[row.became]))
        possible &= {w for w in possible if lnn.VBMF(w / 100).choose(problem) == (rank,)}
    assert possible


def test_a_budget_that_no_rule_meets(case):
    with pytest.raises(lnn.BudgetError, match="least possible"):
        plan(case, 0.001, allocation="uniform")
    with pytest.raises(lnn.BudgetError, match="least possible"):
        plan(case, 0.02, allocation="musco")  # not below its VBMF ranks


def ranks_of(report):
    for row in report.rows:
        if row.replaced:
            text = row.options.split("rank=")[1].split(" order")[0].split(" factors")[0]
            yield from (int(part) for part in text.strip("()").split(", ") if part != "None")


@pytest.mark.parametrize("name", ["knapsack", "uniform", "alds", "musco"])
def test_ranks_are_multiples(case, name):
    ranks = list(ranks_of(plan(case, 0.6, allocation=name, multiple_of=4)))
    assert ranks
    assert all(rank % 4 == 0 for rank in ranks)


def test_bounds_hold_and_the_rest_pays(case):
    free, bound = plan(case, 0.25), plan(case, 0.25, at_least={"layer2.*": 0.8}, at_most={"layer3.*conv1": 0.05})
    for report in (free, bound):
        assert report.after.params <= 0.25 * report.before.params
    shares = kept(bound)
    assert all(share >= 0.8 for path, share in shares.items() if path.startswith("layer2"))
    assert shares["layer3.0.conv1"] <= 0.05 < kept(free)["layer3.0.conv1"]
    assert any(share < 0.8 for path, share in kept(free).items() if path.startswith("layer2"))


def test_the_strictest_of_several_bounds_counts(case):
    shares = kept(plan(case, at_least={"*": 0.1, "layer1.*": 0.8, "layer1.0.*": 0.3}))
    assert all(share >= 0.8 for path, share in shares.items() if path.startswith("layer1"))


def test_bounds_that_cannot_hold(case):
    with pytest.raises(lnn.BudgetError, match=r"least possible 0\.9"):
        plan(case, at_least={"*": 0.95})
    with pytest.raises(lnn.PlanError, match=r"is to keep from 0 to 0\.0001"):
        plan(case, at_most={"layer1.*": 1e-4})
    with pytest.raises(lnn.PlanError, match="'nowhere' matches no layer"):
        plan(case, at_least={"nowhere": 0.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "best"}, "allocation must be one of knapsack, uniform, alds, musco, got 'best'"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"formats": [lnn.LowRankLayer]}, "formats must be classes of low-rank layers"),
        ({"at_least": {"fc": 2}}, "at_least"),
        ({"at_most": {"fc": "0.5"}}, "at_most gives the share"),
        ({"rank": lnn.VBMF(), "multiple_of": 8}, "need a budget"),
        ({"rank": lnn.VBMF(), "allocation": "alds"}, "need a budget"),
        ({"rank": lnn.VBMF(), "at_most": {"fc": 0.5}}, "need a budget"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(lnn.OptionError, match=message):
        lnn.LowRank(**options)
