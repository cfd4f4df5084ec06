"""Every architecture of the zoo through every step alone and through the whole chain."""

import pytest
import torch

import lowrank_nn as lnn
from lowrank_nn.cost import Cost
from lowrank_nn.graph import call_model, model_cost, record
from lowrank_nn.graph.inputs import tensors
from tests.zoo import ZOO
from tests.zoo.control_flow import EarlyExit

MATRICES = (lnn.SVDConv2d, lnn.SVDLinear, lnn.TuckerConv2d)
SHARES = dict.fromkeys(ZOO, 0.6) | {"crnn": 0.95, "tied": 0.9}  # most of these two nothing can be done about
CLASSES = {
    "tucker": [lnn.Apply(lnn.TuckerConv2d, rank=lnn.Energy(0.5))],
    "svd": [lnn.Apply([lnn.SVDConv2d, lnn.SVDLinear], rank=lnn.Params(0.5))],
    "svd twice": [lnn.Apply(lnn.SVDConv2d, rank=lnn.SpeedUp(2), order="pointwise_first")],
    "cp": [lnn.Apply(lnn.CPConv2d, rank=2)],
    "pruned": [lnn.Apply([lnn.PrunedConv2d, lnn.PrunedLinear], sparsity=0.5)],
    "quantized": [lnn.Apply([lnn.QuantConv2d, lnn.QuantLinear], bits=4, scheme="affine")],
}
RECIPES = CLASSES | {
    "rule": [lnn.LowRank(rank=lnn.Energy(0.6))],
    "prune kernels": [lnn.Prune(0.5, granularity="kernel")],
    "prune channels": [lnn.Prune(0.5, granularity="channel")],
    "int8": [lnn.Quantize("int8")],
    "inputs too": [lnn.Quantize("int4", activations="int8")],
}
GRANULARITIES = ("element", "row", "column", "group", "filter")


def outputs(model, inputs):
    with torch.no_grad():
        return list(tensors(call_model(model, inputs)))


def energy(model, batch):
    return sum(tensor.float().square().mean() for tensor in tensors(call_model(model, batch)))


def columns(report, macs):
    rows = [(row.path, row.was, row.became, row.options, row.after) for row in report.rows]
    return rows if macs else [(*row[:-1], row[-1] - Cost(macs=row[-1].macs)) for row in rows]


def check(model, inputs, result):
    """What holds for any result."""
    same_calls = not isinstance(model, EarlyExit)  # there the outputs of a layer decide how often the next one runs
    before, after = outputs(model, inputs), outputs(result.model, inputs)
    assert [(t.shape, t.dtype) for t in after] == [(t.shape, t.dtype) for t in before]
    assert all(torch.isfinite(t).all() for t in after if t.is_floating_point())
    assert columns(result.plan, same_calls) == columns(result.report, same_calls)
    assert (result.plan.rest, result.plan.left) == (result.report.rest, result.report.left)
    assert model_cost(result.model, record(result.model, inputs)) == result.report.after
    assert result.report.after.params <= result.report.before.params
    assert result.report.after.macs <= result.report.before.macs or not same_calls
    listed = {path for paths in result.report.left.values() for path in paths}
    for row in result.report.rows:
        assert row.replaced or row.path in listed, f"{row.path} stays without a reason"
    assert max(map(len, str(result.report).splitlines())) <= 120


def check_file(name, model, inputs, folder):
    lnn.save(model, folder / "net.lrnn")
    loaded = lnn.load(folder / "net.lrnn", ZOO[name]()[0])
    for one, other in zip(outputs(model, inputs), outputs(loaded, inputs), strict=True):
        assert torch.equal(one, other)


def compress(name, recipe, **options):
    model, inputs = ZOO[name]()
    try:
        return model, inputs, lnn.compress_model(model, inputs, recipe, **({"calibration": [inputs]} | options))
    except lnn.PlanError as error:  # such as CP on a model without convolutions
        if "There are: none" not in str(error):
            raise
        pytest.skip("no layer that this step can act on")


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", list(ZOO))
def test_each_step_alone(name, recipe):
    check(*compress(name, RECIPES[recipe]))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["mobilenet_v2", "unet", "vit"])
def test_further_granularities(name, granularity):
    check(*compress(name, [lnn.Prune(0.5, granularity=granularity)]))


@pytest.mark.parametrize("name", ["lenet5", "resnet20", "transformer"])
def test_one_shot(name):
    check(*compress(name, "one-shot"))


@pytest.mark.parametrize("name", list(ZOO))
def test_whole_kernel_rows_and_columns(name):
    # Which rows go depends on the numbers: the plan says what may remain at most.
    _, _, result = compress(name, [lnn.Prune(0.5, granularity="shape")])
    assert result.report.after.params <= result.plan.after.params
    assert result.report.after.macs <= result.plan.after.macs
    assert result.report.after.nonzeros == result.plan.after.nonzeros


@pytest.mark.parametrize("name", list(ZOO))
def test_budget(name):
    budget = lnn.Budget(params=SHARES[name])
    # On weights alone; the whole chain does it on data.
    model, inputs, result = compress(name, [lnn.LowRank(formats=MATRICES)], budget=budget, calibration=None)
    check(model, inputs, result)
    share = sum(p.numel() for p in result.model.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.9 * SHARES[name] <= share <= SHARES[name]


@pytest.mark.parametrize("name", ["lenet5", "control_flow"])
def test_budget_over_all_formats(name):
    check(*compress(name, None, budget=lnn.Budget(params=0.4)))


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # a model of the zoo does so
@pytest.mark.parametrize("name", list(ZOO))
def test_the_whole_chain(name, tmp_path):
    model, inputs = ZOO[name]()
    recipe = [
        lnn.LowRank(formats=MATRICES),
        lnn.Prune(0.3),
        lnn.FineTune([inputs, inputs], epochs=1, loss=energy),
        lnn.Quantize("int8", activations="int8"),
    ]
    budget = lnn.Budget(params=SHARES[name])
    result = lnn.compress_model(model, inputs, recipe, budget=budget, calibration=[inputs])
    check(model, inputs, result)
    assert result.report.after.params <= SHARES[name] * result.report.before.params
    check_file(name, result.model, inputs, tmp_path)
    modes = [module.training for module in result.model.modules()]
    assert not any(modes)
