"""Prune(granularity="filter"): smaller layers, proven, planned, within budgets; the given model is left alone."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowrank_nn as lnn
from lowrank_nn.errors import BudgetError, CalibrationError, OptionError, PlanError
from lowrank_nn.graph import model_cost, record
from lowrank_nn.graph.proof import prove
from tests.graph.hand_groups import chain_groups
from tests.zoo._seeded import seeded

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _by_hand(monkeypatch):
    monkeypatch.setattr("lowrank_nn.pipeline.filters.find_groups", lambda model, inputs: chain_groups(model))


def make_net():
    layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(216, 20), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(20, 4))


@pytest.fixture
def net():
    return seeded(lambda: (make_net(), None))()[0]


def run(model, recipe, **options):
    return lnn.compress_model(model, X, recipe, progress=False, **options)


def widths(model):
    return [model.get_submodule(name).weight.shape[0] for name in ("0", "3", "6", "8")]


def columns(report):
    return [(row.path, row.was, row.became, row.options, row.after) for row in report.rows]


def check(model, result):
    assert result.model(X).shape == model(X).shape
    assert torch.isfinite(result.model(X)).all()
    assert model_cost(result.model, record(result.model, X)) == result.report.after
    assert columns(result.plan) == columns(result.report)
    assert (result.plan.rest, result.plan.left) == (result.report.rest, result.report.left)


def test_layers_become_smaller_and_the_report_says_so(net):
    before = copy.deepcopy(net.state_dict())
    result = run(net, lnn.Prune(0.5, granularity="filter"))
    assert widths(result.model) == [8, 12, 10, 4]
    assert widths(net) == [16, 24, 20, 4]
    assert all(before[name].equal(tensor) for name, tensor in net.state_dict().items())
    check(net, result)
    rows = {row.path: row for row in result.report.rows}
    assert [rows[name].options for name in ("0", "3", "8")] == ["out=8/16", "in=8/16 out=12/24", "in=10/20"]
    assert result.report.left == {}
    assert result.report.remarks == {"Prune: all output channels stay: reaches the output": ("8",)}
    assert result.report.compression_rate["params"] > 3
    assert "in=8/16 out=12/24" in str(result.report)


def test_the_least_important_go(net):
    with torch.no_grad():
        for layer in (net[0], net[3], net[6], net[8]):
            layer.weight.fill_(0.1)
        net[0].weight[[2, 5, 11]] *= 0.01
        net[3].weight[:, [2, 5, 11]] *= 0.01
    result = run(net, lnn.Prune(3 / 16, granularity="filter", where="0"))
    kept = [index for index in range(16) if index not in (2, 5, 11)]
    assert torch.equal(result.model[0].weight, net[0].weight[kept])
    assert torch.equal(result.model[1].running_mean, net[1].running_mean[kept])
    assert result.report.left == {"no step of the recipe acts on them": ("6", "8")}


def test_masked_and_pruned_network_agree(net):
    result = run(net, lnn.Prune(0.5, granularity="filter", where="3"))
    kept = [int((net[3].weight == row).flatten(1).all(1).nonzero()) for row in result.model[3].weight]
    masked = copy.deepcopy(net)
    gone = [index for index in range(24) if index not in kept]
    with torch.no_grad():
        for tensor in (masked[3].weight, masked[3].bias):
            tensor[gone] = 0
    torch.testing.assert_close(result.model(X), masked(X))


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_scale", "geometric_median", "random", "activation", "apoz"])
def test_every_criterion_prunes(net, criterion):
    result = run(net, lnn.Prune(0.25, granularity="filter", criterion=criterion), calibration=[X])
    expected = [12, 24, 20, 4] if criterion == "bn_scale" else [12, 18, 15, 4]
    assert widths(result.model) == expected
    check(net, result)
    if criterion == "bn_scale":
        assert "Prune: the criterion says nothing about it" in str(result.report.left) + str(result.report.remarks)


@pytest.mark.parametrize("criterion", ["taylor", "obd"])
def test_criteria_that_need_a_loss(net, criterion):
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    batches = [(X, torch.arange(4))]
    step = lnn.Prune(0.25, granularity="filter", criterion=criterion, batches=batches, loss=loss)
    assert widths(run(net, step).model) == [12, 18, 15, 4]
    with pytest.raises(OptionError, match=f"criterion='{criterion}' needs batches"):
        lnn.Prune(0.25, granularity="filter", criterion=criterion)


def test_a_criterion_of_the_users_own(net):
    step = lnn.Prune(0.5, granularity="filter", criterion=lambda model, group: torch.arange(group.size), where="0")
    assert torch.equal(run(net, step).model[0].weight, net[0].weight[8:])
    wrong = lnn.Prune(0.5, granularity="filter", criterion=lambda model, group: torch.ones(3))
    with pytest.raises(OptionError, match=r"shape \(16,\), a number for each unit of 0; it returned a tensor"):
        run(net, wrong)


def test_activations_need_data(net):
    with pytest.raises(CalibrationError, match="there are no calibration batches"):
        run(net, lnn.Prune(0.5, granularity="filter", criterion="apoz"))


def test_rounding_and_least_shares(net):
    assert widths(run(net, lnn.Prune(0.4, granularity="filter", round_to=8)).model) == [16, 16, 16, 4]
    assert widths(run(net, lnn.Prune(0.4, granularity="filter", min_keep=0.6)).model) == [10, 15, 12, 4]
    assert widths(run(net, lnn.Prune(0.99, granularity="filter")).model) == [1, 1, 1, 4]


def test_global_scope_takes_what_matters_least_anywhere(net):
    with torch.no_grad():
        net[3].weight[:12] *= 1e-3
        net[6].weight.unflatten(1, (24, 9))[:, :12] *= 1e-3
    result = run(net, lnn.Prune(0.2, granularity="filter", scope="global"))
    assert widths(result.model) == [16, 12, 20, 4]


@pytest.mark.parametrize("budget", [{"params": 0.3}, {"macs": 0.4}, {"bytes": 0.5}, {"params": 0.5, "macs": 0.3}])
def test_budgets_are_met_and_used(net, budget):
    result = run(net, lnn.Prune(granularity="filter"), budget=lnn.Budget(**budget))
    spent = [getattr(result.report.after, name) / getattr(result.report.before, name) / budget[name] for name in budget]
    assert 0.85 < max(spent) <= 1
    check(net, result)


def test_budgets_that_cannot_be_met(net):
    with pytest.raises(BudgetError, match=r"cannot be met by removing filters: with 0.5 of each group kept"):
        run(net, lnn.Prune(granularity="filter", min_keep=0.5), budget=lnn.Budget(params=0.1))
    with pytest.raises(PlanError, match="there is neither an amount nor a budget"):
        run(net, lnn.Prune(granularity="filter"))


def test_plans_compute_the_same_and_change_nothing(net):
    before = copy.deepcopy(net.state_dict())
    plan = lnn.plan(net, X, lnn.Prune(0.5, granularity="filter"), progress=False)
    assert str(plan.after) == str(run(net, lnn.Prune(0.5, granularity="filter")).report.after)
    assert all(before[name].equal(tensor) for name, tensor in net.state_dict().items())


def test_what_cannot_be_proven_stays(net):
    class Baked(nn.Module):
        def forward(self, x):
            return x.reshape(len(x), 24, -1).reshape(x.shape[0], -1)

    net[5] = Baked()
    result = run(net, lnn.Prune(0.5, granularity="filter"))
    assert widths(result.model) == [8, 24, 10, 4]
    check(net, result)
    remarks = str(result.report.remarks)
    assert (
        "Prune: all output channels stay: without these channels the forward fails in eval mode: RuntimeError"
        in remarks
    )


def test_patterns(net):
    assert widths(run(net, lnn.Prune(0.5, granularity="filter", but_not="3")).model) == [8, 24, 10, 4]
    with pytest.raises(PlanError, match="the pattern 'layer9' matches no layer"):
        run(net, lnn.Prune(0.5, granularity="filter", where="layer9"))


def test_deterministic(net):
    first, second = (run(net, lnn.Prune(0.5, granularity="filter", criterion="random"), seed=3).model for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_with_other_steps(net):
    recipe = [lnn.Prune(0.25, granularity="filter"), lnn.Prune(0.5), lnn.Quantize("int8")]
    result = run(net, recipe)
    assert widths(result.model)[:3] == [12, 18, 15]
    check(net, result)


@pytest.mark.parametrize("calibration", [None, [X]])
def test_low_rank_after_filters(net, calibration):
    recipe = [lnn.Prune(0.25, granularity="filter"), lnn.LowRank(but_not="8")]
    result = run(net, recipe, budget=lnn.Budget(params=0.4), calibration=calibration)
    assert result.report.after.params <= 0.4 * result.report.before.params
    check(net, result)


def test_filters_twice(net):
    result = run(net, [lnn.Prune(0.5, granularity="filter", where="0"), lnn.Prune(0.25, granularity="filter")])
    assert widths(result.model) == [6, 18, 15, 4]
    check(net, result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 0.5, "scope": "global"}, "are for granularity='filter'"),
        ({}, "a budget instead of an amount"),
        ({"amount": 0.5, "granularity": "filters"}, "granularity must be one of .*filter.*, got 'filters'"),
        ({"amount": 0.5, "criterion": "taylor", "batches": [], "loss": max}, "criterion must be one of l1, l2, obd"),
        ({"amount": 0.5, "granularity": "filter", "criterion": "magnitude"}, "must be one of l1, l2, bn_scale"),
        ({"amount": 0.5, "granularity": "filter", "scope": "all"}, "scope must be 'layer' or 'global', got 'all'"),
        ({"amount": 0.5, "granularity": "filter", "round_to": 0}, "round_to must be a whole number from 1, got 0"),
        ({"amount": 0.5, "granularity": "filter", "min_keep": 0.6}, "contradict each other"),
        ({"amount": 0.5, "granularity": "filter", "min_keep": 1}, "min_keep is a share from 0 to below 1"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        lnn.Prune(options.pop("amount", None), **options)


def test_groups_that_a_budget_comes_to_last_are_tried_too(net):
    """It is known beforehand that they cannot go, so no budget counts on them."""

    class Baked(nn.Module):
        def forward(self, x):
            return x.reshape(len(x), 24, -1).reshape(x.shape[0], -1)

    def last(model, group):
        return torch.arange(group.size) + (1000 if group.name == "3" else 0)

    net[5] = Baked()
    step = lnn.Prune(granularity="filter", criterion=last)
    assert widths(run(net, step, budget=lnn.Budget(params=0.13)).model) == [2, 24, 2, 4]
    with pytest.raises(BudgetError, match="cannot be met by removing filters"):
        run(net, step, budget=lnn.Budget(params=0.1))


def test_groups_that_fail_at_the_share_of_a_budget_stay(net):
    """Half of the channels run, what the budget asks for does not."""

    class InFours(nn.Module):
        def forward(self, x):
            assert x.shape[1] % 4 == 0
            return x

    net[4] = InFours()
    result = run(net, lnn.Prune(granularity="filter"), budget=lnn.Budget(params=0.7))
    assert result.report.after.params <= 0.7 * result.report.before.params
    assert net[3].out_channels == result.model[3].out_channels == 24
    assert "without these channels the forward fails" in str(result.report.remarks)
    check(net, result)
    in_fours = lnn.Prune(granularity="filter", round_to=4)
    assert run(net, in_fours, budget=lnn.Budget(params=0.7)).model[3].out_channels < 24


@pytest.mark.parametrize(
    ("recipe", "proofs"),
    [
        ([lnn.Prune(0.5, granularity="filter")], 1),
        ([lnn.Equalize(), lnn.Prune(0.5, granularity="filter")], 2),  # of other numbers than the plan's
        ([lnn.Prune(0.3, granularity="filter"), lnn.Prune(0.3, granularity="filter")], 3),
    ],
)
def test_numbers_that_the_plan_proved_are_not_proven_twice(net, monkeypatch, recipe, proofs):
    proven = []

    def watched(model, removals, inputs, **options):
        found = prove(model, removals, inputs, **options)
        proven.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return found

    monkeypatch.setattr("lowrank_nn.pipeline.filters.prove", watched)
    result = run(net, recipe)
    check(net, result)
    assert len(proven) == proofs
    if proofs == 1:
        assert all(tensor.equal(proven[0][name]) for name, tensor in net.state_dict().items())


def test_what_the_plan_refused_does_not_go(net, monkeypatch):
    def all_but_one(model, removals, inputs, **options):
        found = prove(model, removals, inputs, **options)
        kept = tuple(removal for removal in found.proven if removal.group.name != "3")
        return dataclasses.replace(found, proven=kept, refused={"3": "no reason"} if len(kept) < len(removals) else {})

    monkeypatch.setattr("lowrank_nn.pipeline.filters.prove", all_but_one)
    result = run(net, lnn.Prune(0.5, granularity="filter"))
    assert widths(result.model) == [8, 24, 10, 4]
    assert result.report.remarks["Prune: all output channels stay: no reason"] == ("3",)
