"""LowRank with calibration data: nearer to the given network than without, and honest about what it could not do."""

import copy

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.graph import call_model
from lowrank_nn.graph.inputs import tensors
from lowrank_nn.pipeline import evidence
from tests.pipeline.calibrated import BATCHES, TEST, make_net
from tests.zoo import ZOO

MATRICES = (lnn.SVDConv2d, lnn.SVDLinear, lnn.TuckerConv2d)


@pytest.fixture(scope="module")
def net():
    return make_net()


def compress(model, *, share=0.4, calibration=BATCHES, recipe=None, **options):
    recipe = recipe or [lnn.LowRank(**options)]
    return lnn.compress_model(
        model, TEST[:1], recipe, budget=lnn.Budget(params=share), calibration=calibration, progress=False
    )


@torch.no_grad()
def error(small, model):
    return float((small(TEST) - model(TEST)).square().sum() / model(TEST).square().sum())


def test_each_part_brings_the_output_nearer(net):
    blind = compress(net, data_aware=False)
    alone = compress(net, reconstruct=False)
    whole = compress(net)
    assert blind.report.after.params <= 0.4 * blind.report.before.params
    assert error(alone.model, net) < 0.5 * error(blind.model, net)
    assert error(whole.model, net) < error(alone.model, net)


def test_without_curvature_it_still_uses_the_data(net):
    assert error(compress(net, curvature=False).model, net) < 0.7 * error(compress(net, data_aware=False).model, net)


def test_the_mean_behind_a_layer_without_bias_is_kept(net):
    """One layer changed, nothing ahead of it: the norm behind gets the mean it had."""
    small = compress(net, share=0.7, where="conv1", formats=MATRICES, reconstruct=False).model
    assert isinstance(small.conv1, lnn.CompressedLayer)

    def centred(model):
        with torch.no_grad():
            x = torch.relu(model.stem_norm(model.stem(torch.cat(BATCHES))))
            return (model.conv1(x) - model.norm1.running_mean[:, None, None]).mean((0, 2, 3))

    moved = float((small.norm1.running_mean - net.norm1.running_mean).norm())
    assert moved > 1e-3
    assert float((centred(small) - centred(net)).norm()) < 0.2 * moved


def test_the_given_model_is_untouched_and_the_result_repeats(net):
    before = copy.deepcopy(net.state_dict())
    first, second = compress(net).model, compress(net).model
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for one, two in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_plan_and_result_agree(net):
    options = {"budget": lnn.Budget(params=0.4), "calibration": BATCHES, "progress": False}
    planned = lnn.plan(net, TEST[:1], **options)
    result = lnn.compress_model(net, TEST[:1], **options)
    assert [(row.became, row.options) for row in planned.rows] == [
        (row.became, row.options) for row in result.report.rows
    ]
    assert planned.after == result.report.after
    assert {row.error for row in planned.rows} == {None}  # what candidates are compared by is no change of the weight


def test_data_are_used_for_budgets_and_on_request_for_rules(net):
    rule = lnn.Params(0.4)
    by_default, on_request = (compress(net, share=1.0, rank=rule, data_aware=wish).model for wish in (None, True))
    blind = compress(net, share=1.0, rank=rule, calibration=None).model
    assert torch.equal(by_default.conv1.weight, blind.conv1.weight)
    assert error(on_request, net) < error(blind, net)


def test_data_are_missed(net):
    with pytest.raises(lnn.CalibrationError, match="data_aware needs calibration batches"):
        compress(net, calibration=None, data_aware=True)
    compress(net, calibration=None)


def test_labels_are_ignored_and_iterators_are_taken(net):
    labelled = [(batch, torch.zeros(len(batch))) for batch in BATCHES]
    expected = compress(net).model.state_dict()
    for calibration in (labelled, iter(labelled)):
        for name, value in compress(net, calibration=calibration).model.state_dict().items():
            assert torch.equal(value, expected[name])


def test_after_training_the_trained_network_is_what_counts(net):
    tuning = lnn.FineTune([(TEST[:64], torch.zeros(64, dtype=torch.int64))], 30, lr=1e-2, alpha=0.0)
    tuned = compress(net, share=1.0, recipe=[tuning]).model
    small = compress(net, recipe=[tuning, lnn.LowRank()]).model
    assert error(tuned, net) > 0.05
    assert error(small, tuned) < 0.5 * error(small, net)


def test_state_that_is_no_tensor_is_left_alone(net):
    class WithVersion(type(net)):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            self.version = state["version"]

    expected = compress(net).model
    versioned = copy.deepcopy(net)
    versioned.__class__ = WithVersion
    assert compress(versioned).model(TEST).equal(expected(TEST))


def test_layers_called_twice_are_named_in_the_report():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)

        def forward(self, x):
            return self.again(torch.relu(self.again(torch.relu(self.first(x))))).mean((2, 3))

    torch.manual_seed(0)
    model = Twice().eval()
    report = compress(model).report
    (remark,) = (text for text, paths in report.remarks.items() if "again" in paths)
    assert "not called exactly once" in remark
    assert remark in str(report).replace("\n    ", " ")


def batches_like(inputs, count):
    """Other inputs of the same kinds and shapes."""
    generator = torch.Generator().manual_seed(5)

    def like(value):
        if isinstance(value, dict):
            return {name: like(item) for name, item in value.items()}
        if isinstance(value, tuple):
            return tuple(like(item) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point():
            return torch.randn((8, *value.shape[1:]), generator=generator)
        return torch.randint(int(value.max()), (8, *value.shape[1:]), generator=generator)

    return [like(inputs) for _ in range(count)]


@pytest.mark.parametrize("name", list(ZOO))
def test_zoo(name):
    model, inputs = ZOO[name]()
    batches, errors = batches_like(inputs, 6), []
    share = {"crnn": 0.95, "tied": 0.9}.get(name, 0.6)  # most of these two is out of reach
    for aware in (False, True):
        step = lnn.LowRank(formats=MATRICES, data_aware=aware)
        small = lnn.compress_model(
            model, inputs, [step], budget=lnn.Budget(params=share), calibration=batches, progress=False
        ).model
        with torch.no_grad():
            pairs = [(call_model(small, batch), call_model(model, batch)) for batch in batches]
        flat = [(torch.cat([t.flatten() for t in tensors(y)]) for y in pair) for pair in pairs]
        errors.append(sum(float((a - b).square().sum()) for a, b in flat))
    assert errors[1] < errors[0]


def test_a_sweep_is_one_call_after_the_other_that_learns_once(net, monkeypatch):
    gathered = []
    original = evidence.collect_metrics
    monkeypatch.setattr(evidence, "collect_metrics", lambda *a, **k: gathered.append(1) or original(*a, **k))
    budgets = [lnn.Budget(params=share) for share in (0.6, 0.3)]
    swept = list(lnn.sweep(net, TEST[:1], budgets, calibration=BATCHES, progress=False))
    assert len(gathered) == 1
    for result, budget in zip(swept, budgets, strict=True):
        alone = lnn.compress_model(net, TEST[:1], budget=budget, calibration=BATCHES, progress=False)
        assert result.report == alone.report
        for one, two in zip(result.model.state_dict().values(), alone.model.state_dict().values(), strict=True):
            assert torch.equal(one, two)
