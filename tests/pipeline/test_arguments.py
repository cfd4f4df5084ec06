"""Arguments of the wrong kind: every error says what came, what is allowed, and what to do."""

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from tests.storage.models import SmallNet, seeded

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lnn.Budget(params="0.5"), r"above 0 and at most 1, got '0\.5'"),
        (lambda: lnn.Prune("0.5"), r"a share above 0 and below 1, got '0\.5'"),
        (lambda: lnn.Quantize(8), r"weights must be 'int2' to 'int8' or 'bf16', got 8"),
        (lambda: lnn.Quantize([4, 8]), r"weights must be 'int2' to 'int8' or 'bf16', got 4"),
        (lambda: lnn.Quantize(scheme="uniform"), r"scheme must be 'symmetric' or 'affine', got 'uniform'"),
        (lambda: lnn.Quantize(observer="max"), r"observer must be one of 'minmax', .*, got 'max'"),
        (lambda: lnn.LowRank(formats=["tucker"]), r"classes of low-rank layers \(.*SVDLinear.*\), got 'tucker'"),
        (lambda: lnn.LowRank(formats=[lnn.QuantLinear]), r"classes of low-rank layers .* got .*QuantLinear"),
        (lambda: lnn.LowRank(formats=[]), r"classes of low-rank layers .* got none"),
        (lambda: lnn.LowRank(formats=8), r"classes of low-rank layers .* got 8"),
        (lambda: lnn.save("small.lrnn", SmallNet()), r"save\(model, path\)"),
        (lambda: lnn.load("small.lrnn", SmallNet), r"an instance of the architecture.*load\(path, MyNet\(\)\)"),
    ],
)
def test_options(make, message):
    with pytest.raises(lnn.OptionError, match=message):
        make()


@pytest.mark.parametrize("cls", [nn.Linear, "SVDLinear", lnn.SVDLinear(3, 4, rank=2), lnn.LowRank])
def test_apply_of_what_is_no_class_of_layers(cls):
    with pytest.raises(
        lnn.PlanError, match=r"(?s)Apply: expected a class of compressed layers, .* There are: .*SVDLinear"
    ):
        lnn.Apply(cls, rank=2)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (lnn.LowRank, r"got <class .*LowRank'>\. Call the class: LowRank\(\.\.\.\)"),
        ([lnn.Quantize], r"Call the class: Quantize\(\.\.\.\)"),
        ([[lnn.Quantize()]], r"expected steps, such as LowRank\(\) .* got \[Quantize"),
        (8, "expected steps, .* got 8"),
        (lnn.Quantize(where=8), r"Quantize: where must be a pattern .* got 8"),
        (lnn.Quantize(but_not=["fc", 8]), r"Quantize: but_not must be a pattern .* got \['fc', 8\]"),
    ],
)
def test_recipes(recipe, message):
    with pytest.raises(lnn.PlanError, match=message):
        lnn.plan(seeded(SmallNet), X, recipe)


@pytest.mark.parametrize("budget", [0.3, {"params": 0.3}])
def test_budgets(budget):
    message = r"must be a Budget, such as Budget\(params=0\.3\), got"
    with pytest.raises(lnn.PlanError, match=message):
        lnn.plan(seeded(SmallNet), X, budget=budget)
    with pytest.raises(lnn.PlanError, match=message):
        lnn.compress_model(seeded(SmallNet), X, budget=budget)
    with pytest.raises(lnn.PlanError, match=message):
        next(lnn.sweep(seeded(SmallNet), X, [budget]))


def test_sweep_of_one_budget():
    with pytest.raises(lnn.PlanError, match=r"budgets must be several, .* got Budget\(params=0\.5"):
        next(lnn.sweep(seeded(SmallNet), X, lnn.Budget(params=0.5)))


def test_a_budget_that_layers_without_a_compressed_form_keep_from_being_met():
    model = seeded(
        lambda: nn.Sequential(nn.Conv1d(3, 16, 3), nn.ConvTranspose1d(16, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    )
    message = r"It cannot change 0: Conv1d has no compressed form\. It cannot change 1: ConvTranspose1d has no"
    with pytest.raises(lnn.BudgetError, match=message):
        lnn.plan(model, torch.ones(2, 3, 16), budget=lnn.Budget(params=0.3))
