"""The step that folds batch norms: in recipes, plans and reports."""

import copy

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from tests.zoo import ZOO


def norms(model):
    return [path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def difference(model, other, x):
    with torch.no_grad():
        expected, got = model(x), other(x)
    return float((got - expected).norm() / expected.norm())


def test_alone():
    model, x = ZOO["resnet20"]()
    before = copy.deepcopy(model.state_dict())
    result = lnn.compress_model(model, x, [lnn.FoldBatchNorm()])
    assert norms(result.model) == []
    assert difference(model, result.model, x) < 1e-4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert result.report.after.params == sum(p.numel() for p in result.model.parameters())
    assert result.report.after == result.plan.after
    took = result.report.remarks["FoldBatchNorm: took up the norm behind it"]
    assert len(took) == len(norms(model))
    assert "conv1" in took


def test_what_was_folded_and_not_replaced_has_its_reason():
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(32, 8)).eval()
    x, why = torch.randn(2, 1, 10, generator=torch.Generator().manual_seed(0)), "Conv1d has no compressed form"
    quantized = lnn.compress_model(model, x, [lnn.FoldBatchNorm(), lnn.Quantize("int8")]).report
    assert quantized.left == {why: ("0",)}
    assert lnn.compress_model(model, x, [lnn.FoldBatchNorm()]).report.left == {
        "no step of the recipe acts on them": ("3",)
    }


def test_factorised_layers_take_norms_up_and_their_errors_stay_those_of_the_approximation():
    model, x = ZOO["resnet20"]()
    lowrank = lnn.Apply(lnn.TuckerConv2d, where="layer*.conv2", rank=(6, 6))
    plain = lnn.compress_model(model, x, [lowrank])
    folded = lnn.compress_model(model, x, [lowrank, lnn.FoldBatchNorm()])
    assert norms(folded.model) == []
    assert difference(plain.model, folded.model, x) < 1e-4
    layer = folded.model.layer1[0].conv2
    assert isinstance(layer, lnn.TuckerConv2d)
    assert layer.config()["bias"]
    weight = {row.path: row.error for row in plain.report.rows}["layer1.0.conv2"]
    (row,) = (row for row in folded.report.rows if row.path == "layer1.0.conv2")
    norm, conv = model.layer1[0].bn2, model.layer1[0].conv2
    with torch.no_grad():
        scaled = (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None] * conv.weight
        expected = float((layer.weight - scaled).norm() / scaled.norm())
    assert row.error == pytest.approx(expected, rel=1e-4)
    assert row.error == pytest.approx(weight, rel=0.3)
    assert lnn.compare(model, folded.model, x).rows == folded.report.rows


def test_low_rank_on_data_after_folding():
    model, x = ZOO["resnet20"]()
    result = lnn.compress_model(
        model,
        x,
        [lnn.FoldBatchNorm(), lnn.LowRank(where="layer3.2*", formats=[lnn.SVDConv2d], curvature=False)],
        budget=lnn.Budget(params=0.9),
        calibration=[torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))],
        progress=False,
    )
    assert norms(result.model) == []
    assert result.report.compression_rate["params"] >= 1 / 0.9


def test_quantized_and_pruned_layers_refuse_with_a_reason():
    model, x = ZOO["resnet20"]()
    result = lnn.compress_model(model, x, [lnn.Quantize(where="layer1*"), lnn.FoldBatchNorm()])
    assert set(norms(result.model)) == {path for path in norms(model) if path.startswith("layer1")}
    (norms_left,) = (
        paths for why, paths in result.report.left.items() if "cannot take it up: it is a QuantConv2d" in why
    )
    assert set(norms_left) == set(norms(result.model))  # one reason for all


def test_a_plan_says_the_same_without_computing():
    model, x = ZOO["mobilenet_v2"]()
    recipe = [lnn.Apply(lnn.SVDConv2d, where="*", rank=4), lnn.FoldBatchNorm()]
    planned = lnn.plan(model, x, recipe)
    result = lnn.compress_model(model, x, recipe)
    assert (planned.after, planned.left) == (result.report.after, result.report.left)


def test_what_changes_the_outputs_is_taken_back_and_named():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(x)) * self.conv.weight.sum()

    model = Reads().eval()
    nn.init.uniform_(model.norm.running_var, 2, 3, generator=torch.Generator().manual_seed(0))
    result = lnn.compress_model(model, torch.ones(1, 3, 4, 4), [lnn.FoldBatchNorm()])
    assert norms(result.model) == ["norm"]
    assert torch.equal(result.model.conv.weight, model.conv.weight)
    (remark,) = result.report.remarks
    assert "taken back" in remark
    assert result.report.remarks[remark] == ("norm",)
