"""Budgets through whole recipes: what the returned model costs, counted by other means."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank_nn as lnn
from tests.storage.models import seeded
from tests.zoo import ZOO

MATRICES = (lnn.SVDConv2d, lnn.SVDLinear, lnn.TuckerConv2d)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3),
        nn.Flatten(),
        nn.Linear(24 * 5 * 5, 40),
        nn.ReLU(),
        nn.Linear(40, 10),
    )


X = torch.linspace(-1, 1, 2 * 3 * 15 * 15).reshape(2, 3, 15, 15)


@pytest.fixture(scope="module")
def net():
    return seeded(conv_net).eval()


def compress(model, recipe=None, **shares):
    recipe = recipe or [lnn.LowRank(formats=MATRICES, data_aware=False)]
    return lnn.compress_model(model, X, recipe, budget=lnn.Budget(**shares), calibration=[X])


def params(model):
    return sum(p.numel() for p in model.parameters())


def macs(model):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(X)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_params(net, share):
    small = compress(net, params=share).model
    assert 0.93 * share <= params(small) / params(net) <= share


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_macs(net, share):
    small = compress(net, macs=share).model
    assert 0.93 * share <= macs(small) / macs(net) <= share


def test_several_entries_hold_at_once(net):
    small = compress(net, params=0.3, macs=0.2, bytes=0.5).model
    assert params(small) <= 0.3 * params(net)
    assert macs(small) <= 0.2 * macs(net)
    assert params(small) > 0.2 * params(net) or macs(small) > 0.18 * macs(net)


def test_a_binding_entry_changes_the_choice(net):
    few_params, few_macs = compress(net, params=0.3), compress(net, macs=0.3)
    assert params(few_params.model) < params(few_macs.model)
    assert macs(few_macs.model) < macs(few_params.model)


def test_more_budget_means_less_error(net):
    x = X
    with torch.no_grad():
        errors = [float((compress(net, params=share).model(x) - net(x)).norm()) for share in (0.1, 0.4, 0.95)]
    assert errors[0] > errors[1] > errors[2]


def test_all_may_remain(net):
    result = compress(net, params=1.0)
    assert result.report.after == result.report.before
    assert all(not row.replaced for row in result.report.rows)
    assert any("dense within the budget" in reason for reason in result.report.left)
    for old, new in zip(net.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("share", [0.05, 0.12, 0.2])
def test_quantizing_later_widens_the_share_of_low_rank(net, share):
    recipe = [lnn.LowRank(formats=MATRICES, data_aware=False), lnn.Quantize("int8")]
    result = compress(net, recipe, bytes=share)
    assert 0.9 * share <= result.report.after.bytes / result.report.before.bytes <= share
    alone = compress(net, bytes=share).model
    assert params(alone) < 0.5 * result.report.after.params


def test_a_budget_that_only_the_later_step_makes_possible(net):
    with pytest.raises(lnn.BudgetError, match="least possible"):
        compress(net, bytes=0.012)
    result = compress(net, [lnn.LowRank(formats=MATRICES, data_aware=False), lnn.Quantize("int4")], bytes=0.012)
    assert result.report.after.bytes <= 0.012 * result.report.before.bytes


def test_pruning_later_widens_the_share_of_bytes_and_not_of_params(net):
    recipe = [lnn.LowRank(formats=MATRICES, data_aware=False), lnn.Prune(0.75)]
    result = compress(net, recipe, bytes=0.2)
    assert 0.18 <= result.report.after.bytes / result.report.before.bytes <= 0.2
    assert result.report.after.params > 0.3 * result.report.before.params
    result = compress(net, recipe, params=0.2)
    assert 0.18 <= result.report.after.params / result.report.before.params <= 0.2


def test_a_later_step_that_adds_bytes_narrows_the_share(net):
    # Masks cost a bit per weight, and save little.
    recipe = [lnn.LowRank(formats=MATRICES, data_aware=False), lnn.Prune(0.01)]
    before = compress(net, bytes=0.3).report.after.bytes
    result = compress(net, recipe, bytes=0.3)
    assert 0.27 <= result.report.after.bytes / result.report.before.bytes <= 0.3
    assert before <= 0.3 * result.report.before.bytes


@pytest.mark.parametrize("name", ["params", "macs"])
def test_what_cannot_be_met_names_what_can(net, name):
    with pytest.raises(lnn.BudgetError, match=rf"{name}=0\.001 \(least possible (0\.\d+)\)") as raised:
        compress(net, **{name: 0.001})
    least = float(str(raised.value).split("least possible ")[1].split(")")[0])
    result = compress(net, **{name: least * 1.01})
    cost = getattr(result.report.after, name) / getattr(result.report.before, name)
    assert cost == pytest.approx(least, rel=0.01)


def test_what_cannot_be_met_names_what_cannot_change(net):
    small = compress(net, [lnn.Apply(lnn.TuckerConv2d, where="2", rank=(4, 4))], params=1.0).model
    nn.utils.parametrizations.weight_norm(small[6])
    message = r"It cannot change 6: .*parametrized weight.*\(layer, 'weight'\) first\. It cannot change 2: of low rank"
    with pytest.raises(lnn.BudgetError, match=message):
        compress(small, params=0.3)


def test_layers_left_out_count_as_they_are(net):
    small = compress(net, [lnn.LowRank(formats=MATRICES, but_not="6")], params=0.8).model
    assert type(small[6]) is nn.Linear
    assert params(small) <= 0.8 * params(net)
    with pytest.raises(lnn.BudgetError, match=r"least possible 0\.[67]"):
        compress(net, [lnn.LowRank(formats=MATRICES, but_not="6")], params=0.3)


def test_a_recipe_that_does_not_work_towards_its_budget(net):
    recipe = [lnn.Apply(lnn.SVDLinear, where="6", rank=30)]
    with pytest.raises(
        lnn.BudgetError, match=r"ends above its budget \(params: 0\.\d+ of .*allowed 0\.3\).*LowRank\(\)"
    ):
        compress(net, recipe, params=0.3)
    assert compress(net, recipe, params=0.9).report.after.params <= 0.9 * params(net)


def test_a_step_before_low_rank_counts(net):
    recipe = [lnn.Apply(lnn.SVDLinear, where="6", rank=5), lnn.LowRank(formats=MATRICES, data_aware=False)]
    small = compress(net, recipe, params=0.3).model
    assert small[6].rank == 5
    assert 0.25 * params(net) <= params(small) <= 0.3 * params(net)


def test_a_shared_layer_is_paid_once_and_called_twice():
    model, tokens = ZOO["tied"]()
    report = lnn.compress_model(model, tokens, lnn.LowRank(formats=MATRICES), budget=lnn.Budget(macs=0.9)).report
    row = next(row for row in report.rows if row.path == "mix")
    assert row.after.macs == 2 * 18 * (row.after.params - 24)


def test_the_default_recipe_needs_only_a_budget():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 13 * 13, 6)))
    result = lnn.compress_model(model, X, budget=lnn.Budget(params=0.5))
    assert params(result.model) <= 0.5 * params(model)


def test_the_plan_alone_says_the_same(net):
    recipe = [lnn.LowRank(formats=MATRICES, data_aware=False), lnn.Prune(0.5), lnn.Quantize("int8", activations="int8")]
    budget = lnn.Budget(bytes=0.1)
    planned = lnn.plan(net, X, recipe, budget=budget, calibration=[X])
    result = lnn.compress_model(net, X, recipe, budget=budget, calibration=[X])
    assert planned == result.plan
    assert planned.after == result.report.after
    assert [(r.path, r.became, r.options, r.after) for r in planned.rows] == [
        (r.path, r.became, r.options, r.after) for r in result.report.rows
    ]
