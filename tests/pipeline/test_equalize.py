"""The step that equalises ranges: in recipes, plans and reports, and what it is for."""

import copy

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.errors import CalibrationError
from tests.zoo import ZOO

RESCALED = "Equalize: channels rescaled against other layers"


def difference(model, other, x):
    with torch.no_grad():
        expected, got = model.eval()(x), other.eval()(x)
    return float((got - expected).norm() / expected.norm())


def separable(generator):
    """A block of MobileNet with ReLU, folded, whose channels have very different scales."""
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 8, 1)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    scale = 10.0 ** (3 * torch.rand(16, generator=generator) - 1.5)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.normal_(layer.weight, std=0.3, generator=generator)
                nn.init.normal_(layer.bias, std=0.1, generator=generator)
        model[2].weight.mul_(scale[:, None, None, None])
        model[2].bias.mul_(scale)
        model[4].weight.div_(scale[:, None, None])
    return model


def test_one_scale_for_a_whole_weight_then_loses_less_than_a_tenth():
    generator = torch.Generator().manual_seed(0)
    model, x = separable(generator), torch.randn(8, 3, 10, 10, generator=generator)
    quantize = lnn.Quantize("int8", scheme="affine")
    plain = lnn.compress_model(model, x, [quantize])
    equal = lnn.compress_model(model, x, [lnn.Equalize(), quantize])
    assert difference(model, plain.model, x) > 10 * difference(model, equal.model, x)
    assert equal.report.remarks[RESCALED] == ("0", "2", "4", "8")
    assert equal.report.after == plain.report.after == equal.plan.after


def test_in_a_recipe(tmp_path):
    model, x = ZOO["resnet20"]()
    before = copy.deepcopy(model.state_dict())
    result = lnn.compress_model(model, x, [lnn.FoldBatchNorm(), lnn.Equalize()])
    assert difference(model, result.model, x) < 1e-4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(result.report.remarks[RESCALED]) == 20
    stays = [remark for remark in result.report.remarks if remark.startswith("Equalize: the channels that it computes")]
    assert any("reaches the output of the model" in remark for remark in stays)
    assert repr(lnn.Equalize()) == "Equalize()"
    lnn.save(result.model, tmp_path / "equal.lrnn")
    loaded = lnn.load(tmp_path / "equal.lrnn", ZOO["resnet20"]()[0])
    assert difference(result.model, loaded, x) == 0


def test_without_folding_the_norms_are_named():
    model, x = ZOO["resnet20"]()
    result = lnn.compress_model(model, x, [lnn.Equalize()])
    assert difference(model, result.model, x) == 0
    assert any("fold batch norms first" in remark for remark in result.report.remarks)


@pytest.mark.parametrize("name", ["resnet20", "unet"])
def test_errors_in_the_report_are_those_of_rounding(name):
    model, x = ZOO[name]()
    recipe = [lnn.FoldBatchNorm(), lnn.Equalize(), lnn.Equalize()]
    equal = dict(lnn.compress_model(model, x, recipe).model.named_modules())
    result = lnn.compress_model(model, x, [*recipe, lnn.Quantize("int8")])
    quantized = [row for row in result.report.rows if row.became.startswith("Quant")]
    assert len(quantized) >= 10
    for row in quantized:
        weight, rounded = (net[row.path].weight.detach() for net in (equal, dict(result.model.named_modules())))
        assert row.error == pytest.approx(float((rounded - weight).norm() / weight.norm()), rel=1e-3)


def test_low_rank_factors_are_equalised_and_their_errors_left_out():
    model, x = ZOO["resnet20"]()
    lowrank = lnn.Apply(lnn.TuckerConv2d, where="layer1.0.conv2", rank=(6, 6))
    result = lnn.compress_model(model, x, [lowrank, lnn.FoldBatchNorm(), lnn.Equalize(), lnn.Quantize("int8")])
    errors = {row.path: row.error for row in result.report.rows}
    assert errors["layer1.0.conv2"] is None
    assert errors["layer1.0.conv1"] < 0.02
    assert "layer1.0.conv2.core" in result.report.remarks[RESCALED]


def test_rounding_on_data_behind_it():
    generator = torch.Generator().manual_seed(0)
    model, x = separable(generator), torch.randn(32, 3, 10, 10, generator=generator)
    recipe = [lnn.Equalize(), lnn.Quantize("int4", scheme="affine")]
    nearest = lnn.compress_model(model, x, recipe)
    on_data = lnn.compress_model(model, x, recipe, calibration=[x])
    assert difference(model, on_data.model, x) < difference(model, nearest.model, x)


ABSORBED = "Equalize: high biases absorbed by the layers that read them"


def test_high_biases_are_absorbed_on_calibration_data_and_inputs_then_lose_less():
    generator = torch.Generator().manual_seed(0)
    model, x = separable(generator), torch.randn(64, 3, 10, 10, generator=generator)
    with torch.no_grad():
        model[0].bias[::2] += 12
    quantize = lnn.Quantize("int8", activations="int8")
    recipes = {absorb: [lnn.Equalize(absorb=absorb)] for absorb in (False, True)}
    results = {absorb: lnn.compress_model(model, x[:2], steps, calibration=[x]) for absorb, steps in recipes.items()}
    assert difference(model, results[True].model, x) < 1e-5
    assert ABSORBED not in results[False].report.remarks
    assert "0" in results[True].report.remarks[ABSORBED]
    with torch.no_grad():
        peaks = {absorb: float(result.model[0](x).max()) for absorb, result in results.items()}
    assert peaks[True] < 0.7 * peaks[False]
    small = {absorb: lnn.compress_model(model, x[:2], [*s, quantize], calibration=[x]) for absorb, s in recipes.items()}
    assert difference(model, small[True].model, x) < 0.8 * difference(model, small[False].model, x)


def test_absorption_needs_calibration_data_and_says_what_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    x = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    nn.init.constant_(model[0].bias, 9.0)
    with pytest.raises(CalibrationError, match="Equalize: absorb=True needs calibration batches"):
        lnn.plan(model, x, [lnn.Equalize(absorb=True)])
    result = lnn.compress_model(model, x, [lnn.Equalize(absorb=True)], calibration=x)
    assert result.report.remarks["Equalize: high biases stay: 2 pads with zeros, which no bias makes up for"] == ("0",)
    assert repr(lnn.Equalize(absorb=True)) == "Equalize(absorb=True)"
