"""Quantize with calibration data: weights rounded by what that does to outputs, and bits shared out by it."""

import pytest
import torch

import lowrank_nn as lnn
from tests.pipeline.calibrated import BATCHES, TEST, make_net


@pytest.fixture(scope="module")
def net():
    return make_net()


@torch.no_grad()
def change(model, steps, calibration=BATCHES, **options):
    """The relative change of the centred outputs, and the result."""
    steps = [*steps, lnn.Quantize(**options)]
    result = lnn.compress_model(model, TEST[:1], steps, calibration=calibration, progress=False)
    expected = model(TEST) - model(TEST).mean(0)
    return float((result.model(TEST) - model(TEST)).square().sum() / expected.square().sum()), result


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("folded", [True, False])
def test_rounding_on_data_keeps_the_output_and_each_part_helps(net, scheme, folded):
    steps = [lnn.FoldBatchNorm()] if folded else []
    nearest, alone, whole = (
        change(net, steps, weights="int3", scheme=scheme, **options)[0]
        for options in ({"data_aware": False}, {"reconstruct": False}, {})
    )
    assert alone < 0.5 * nearest
    assert whole < alone


def test_with_eight_bits_or_without_data_weights_are_the_nearest(net):
    plain = lnn.QuantConv2d.from_pretrained_layer(net.conv1, bits=8)
    _, result = change(net, [], weights="int8")
    assert torch.equal(result.model.conv1.weight_int, plain.weight_int)
    _, result = change(net, [], weights="int8", data_aware=True)
    assert not torch.equal(result.model.conv1.weight_int, plain.weight_int)
    plain = lnn.QuantConv2d.from_pretrained_layer(net.conv1, bits=4)
    _, result = change(net, [], weights="int4", calibration=None)
    assert torch.equal(result.model.conv1.weight_int, plain.weight_int)


def test_rounding_on_data_needs_data(net):
    with pytest.raises(lnn.CalibrationError, match="Quantize: data_aware needs calibration batches"):
        lnn.plan(net, TEST[:1], lnn.Quantize("int4", data_aware=True), progress=False)


def test_pruned_layers_and_factors_are_rounded_on_data_too(net):
    pruned, factorised = lnn.Prune(0.5, where="conv*"), lnn.Apply(lnn.TuckerConv2d, where="conv1", rank=(12, 10))
    for steps in ([lnn.FoldBatchNorm(), pruned], [factorised, lnn.FoldBatchNorm()]):
        start = lnn.compress_model(net, TEST[:1], steps, progress=False).model
        nearest, _ = change(start, [], weights="int3", data_aware=False)
        on_data, result = change(start, [], weights="int3")
        assert on_data < 0.5 * nearest
        assert not result.report.remarks
        for path, layer in start.named_modules():
            if isinstance(layer, lnn.PrunedConv2d):
                assert (result.model.get_submodule(path).weight[layer.weight == 0] == 0).all()


def test_rounding_on_data_is_repeatable_and_leaves_the_model_alone(net):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    first, second = (change(net, [], weights="int4", activations="int8")[1].model for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


ALL = [f"int{bits}" for bits in range(2, 9)]


def bits_of(model):
    kinds = (lnn.QuantConv2d, lnn.QuantLinear)
    return {path: layer.bits for path, layer in model.named_modules() if isinstance(layer, kinds)}


@pytest.mark.parametrize("calibration", [BATCHES, None])
def test_bits_are_shared_out_under_a_budget_of_bytes(net, calibration):
    def compressed(weights, share):
        result = lnn.compress_model(
            net,
            TEST[:1],
            [lnn.FoldBatchNorm(), lnn.Quantize(weights)],
            budget=lnn.Budget(bytes=share),
            calibration=calibration,
            progress=False,
        )
        with torch.no_grad():
            return float((result.model(TEST) - net(TEST)).square().sum()), result

    uniform, even = compressed("int4", 1.0)
    share = even.report.after.bytes / even.report.before.bytes
    mixed, result = compressed(ALL, share)
    assert result.report.after.bytes <= even.report.after.bytes
    assert result.report.after.bytes == result.plan.after.bytes
    assert len(set(bits_of(result.model).values())) > 1
    if calibration is not None:
        assert mixed < 1.1 * uniform
    generous = compressed(["int4", "int8"], 1.0)[1]
    assert set(bits_of(generous.model).values()) == {8}
    rows = {row.path: row for row in result.report.rows}
    assert all(f"bits={bits}" in str(rows[path]) for path, bits in bits_of(result.model).items())


def test_bits_of_factors_and_after_low_rank_fit_the_whole_budget(net):
    for first in (lnn.Apply(lnn.TuckerConv2d, where="conv1", rank=(8, 8)), lnn.LowRank(formats=[lnn.SVDConv2d])):
        result = lnn.compress_model(
            net,
            TEST[:1],
            [first, lnn.FoldBatchNorm(), lnn.Quantize(ALL)],
            budget=lnn.Budget(bytes=0.11),
            calibration=BATCHES,
            progress=False,
        )
        assert 0.09 < result.report.after.bytes / result.report.before.bytes <= 0.11
        assert len(bits_of(result.model)) >= 4


def test_what_cannot_be_shared_out_is_refused(net):
    step = lnn.Quantize(["int4", "int8"])
    assert repr(step) == "Quantize(weights=['int4', 'int8'])"
    with pytest.raises(lnn.PlanError, match=r"shared out under a budget of bytes\. Pass budget=Budget\(bytes"):
        lnn.plan(net, TEST[:1], step)
    with pytest.raises(lnn.BudgetError, match=r"bytes=0\.05 cannot be met with 4 to 8 bits \(least possible 0\.[12]"):
        lnn.plan(net, TEST[:1], step, budget=lnn.Budget(bytes=0.05))
    with pytest.raises(lnn.OptionError, match="must name at least one width"):
        lnn.Quantize([])
    with pytest.raises(lnn.OptionError, match="weights must be 'int2' to 'int8'"):
        lnn.Quantize(["int4", "int9"])


def test_factors_of_a_given_model_are_rounded_on_data_also_where_low_rank_has_looked_at_it(net):
    given = lnn.compress_model(net, TEST[:1], lnn.Apply(lnn.TuckerConv2d, where="conv1", rank=(12, 10))).model

    def quantized(*steps):
        recipe = [*steps, lnn.Quantize("int3")]
        budget = lnn.Budget(params=1.0)
        return lnn.compress_model(given, TEST[:1], recipe, budget=budget, calibration=BATCHES, progress=False).model

    looked, alone = quantized(lnn.LowRank(curvature=False)), quantized()
    for name, tensor in alone.state_dict().items():
        assert torch.equal(looked.state_dict()[name], tensor)
