"""The smallest model within a drop of accuracy: with metrics that are formulas of the model."""

import copy
import logging
import math

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.layers._tucker_ranks import TuckerProblem
from lowrank_nn.pipeline import compress, evidence, state
from lowrank_nn.planning import Clock
from tests.fake_timer import FakeTimer
from tests.pipeline.test_latency import share_of_time
from tests.storage.models import seeded

MATRICES = (lnn.SVDConv2d, lnn.SVDLinear, lnn.TuckerConv2d)
X = torch.linspace(-1, 1, 2 * 3 * 9 * 9).reshape(2, 3, 9, 9)


def make_net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(600, 20))


def wide_net():
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))


@pytest.fixture
def net():
    return seeded(make_net).eval()


def params(model):
    return sum(p.numel() for p in model.parameters())


class Metric:
    """100 points for the dense model, less a function of the share of its parameters that is left."""

    def __init__(self, net, lost=lambda share: 10 * (1 - share)):
        self.whole, self.lost, self.shares, self.modes = params(net), lost, [], []

    def __call__(self, model):
        self.shares.append(params(model) / self.whole)
        self.modes.append((model.training, torch.is_grad_enabled()))
        return 100 - self.lost(self.shares[-1])


def search(net, evaluate, drop, recipe=None, **budget):
    recipe = recipe or [lnn.LowRank(formats=MATRICES)]
    return lnn.compress_model(net, X, recipe, budget=lnn.Budget(accuracy_drop=drop, evaluate=evaluate, **budget))


@pytest.mark.parametrize("drop", [1.0, 4.0, 8.5])
def test_the_smallest_within_the_drop(net, drop):
    metric = Metric(net)
    result = search(net, metric, drop)
    share = params(result.model) / params(net)
    assert 1 - drop / 10 <= share < (1 - drop / 10) * 1.08
    assert len(result.probes) <= 8
    assert metric.shares[0] == 1.0
    assert metric.shares[1:] == [p.report.after.params / params(net) for p in result.probes]
    best = min((p for p in result.probes if p.drop <= drop), key=lambda p: p.share)
    assert best.report.after == result.report.after
    assert all(mode == (False, False) for mode in metric.modes)
    for probe in result.probes:
        assert probe.drop == pytest.approx(100 - probe.metric)


def test_twice_the_same(net):
    first, second = (search(net, Metric(net), 3.0) for _ in range(2))
    assert first.probes == second.probes
    assert "\n" not in repr(first.probes)  # whole reports in it would hide the numbers
    for old, new in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_as_a_call_with_the_share_that_was_found(net):
    found = search(net, Metric(net), 3.0)
    share = min(p.share for p in found.probes if p.drop <= 3.0)
    direct = lnn.compress_model(net, X, lnn.LowRank(formats=MATRICES), budget=lnn.Budget(params=share))
    assert direct.report == found.report
    for old, new in zip(found.model.parameters(), direct.model.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("of", ["macs", "bytes"])
def test_another_quantity(net, of):
    def evaluate(model):
        report = lnn.compare(net, model, X)
        return 10 * getattr(report.after, of) / getattr(report.before, of)

    report = search(net, evaluate, 4.0, of=of).report
    assert 0.6 <= getattr(report.after, of) / getattr(report.before, of) < 0.65


def test_latency_is_searched_on_one_clock(monkeypatch):
    timer = FakeTimer()
    clocks = []

    def make_clock(*args):
        clocks.append(Clock(*args, timer=timer))
        return clocks[-1]

    monkeypatch.setattr(state, "Clock", make_clock)
    net = seeded(wide_net).eval()

    def evaluate(model):
        return 10 * share_of_time(timer, net, model, X)

    result = search(net, evaluate, 4.0, of="latency")
    assert len(clocks) == 1
    assert 0.6 <= min(p.metric for p in result.probes if p.drop <= 4.0) / 10 < 0.75
    assert 0.55 < result.plan.latency.after / result.plan.latency.before < 0.75


def test_other_shares_are_limits(net):
    result = search(net, Metric(net), 5.0, macs=0.3)
    assert result.report.after.macs <= 0.3 * result.report.before.macs
    result = search(net, Metric(net), 1.0, params=0.95)
    assert 0.9 * params(net) <= params(result.model) <= 0.95 * params(net)


def test_a_drop_of_exactly_what_is_allowed(net):
    # 0.9 - 0.7 is more than 0.2 in floating point.
    result = search(net, lambda model: 0.9 if params(model) == params(net) else 0.7, 0.2)
    assert params(result.model) < 0.2 * params(net)


def test_small_shares_that_cannot_be_met_are_passed_over(net):
    metric = Metric(net, lost=lambda share: 0.0)
    with pytest.raises(lnn.BudgetError, match="least possible") as raised:
        lnn.compress_model(net, X, lnn.LowRank(formats=MATRICES), budget=lnn.Budget(params=0.01))
    least = float(str(raised.value).split("least possible ")[1].split(")")[0])
    result = search(net, metric, 1.0)
    assert params(result.model) / params(net) < 1.05 * least


def test_nothing_smaller_is_good_enough(net, caplog):
    with caplog.at_level(logging.WARNING, "lowrank_nn"):
        result = search(net, Metric(net), 0.0)
    assert params(result.model) == params(net)
    assert "no smaller model than params=1" in caplog.text


def test_even_the_largest_drops_too_far(net):
    recipe = [lnn.LowRank(formats=MATRICES), lnn.Quantize("int8")]

    def evaluate(model):
        return 20.0 - 3.0 * any(isinstance(m, lnn.QuantLinear) for m in model.modules())

    with pytest.raises(
        lnn.BudgetError, match=r"accuracy_drop=1 .* mildest of \d probes, params=1, drops by 3, from 20 to 17"
    ):
        search(net, evaluate, 1.0, recipe)


def test_limits_that_no_size_meets(net):
    with pytest.raises(lnn.BudgetError, match=r"macs=0\.001 \(least possible"):
        search(net, Metric(net), 5.0, macs=0.001)


def test_steps_after_low_rank_are_part_of_a_probe(net):
    seen = []

    def evaluate(model):
        seen.append(sorted({type(m).__name__ for m in model.modules() if isinstance(m, lnn.QuantLinear)}))
        return params(model) / params(net)

    loader = [(X, torch.tensor([0, 1]))]
    recipe = [lnn.LowRank(formats=MATRICES), lnn.FineTune(loader, epochs=1), lnn.Quantize("int8")]
    result = search(net, evaluate, 1.0, recipe, bytes=0.2)
    assert result.report.after.bytes <= 0.2 * result.report.before.bytes
    assert seen[0] == []
    assert all(names == ["QuantLinear"] for names in seen[1:])


def test_candidates_are_computed_once(net, monkeypatch):
    calls = []
    table = TuckerProblem.table
    monkeypatch.setattr(TuckerProblem, "table", lambda self, metric=None: calls.append(1) or table(self, metric))
    result = search(net, Metric(net), 3.0)
    assert len(result.probes) > 4
    assert len(calls) == 2


def test_the_given_model_and_the_process_are_untouched(net):
    net.train()
    before = copy.deepcopy(net.state_dict())
    random_state = torch.get_rng_state()

    def evaluate(model):
        torch.rand(3)
        for parameter in model.parameters():
            parameter.zero_()
        model.double()
        return 1.0

    result = search(net, evaluate, 0.5)
    assert net.training
    assert result.model.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.dtype == torch.float32 and p.abs().sum() > 0 for p in result.model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_calibration_data_are_gone_through_once_for_statistics(net, monkeypatch):
    calls = []
    collect = evidence.collect_metrics
    monkeypatch.setattr(
        evidence, "collect_metrics", lambda *args, **options: calls.append(1) or collect(*args, **options)
    )
    budget = lnn.Budget(accuracy_drop=4.0, evaluate=Metric(net))
    generator = torch.Generator().manual_seed(0)
    images = iter([torch.randn(8, 3, 9, 9, generator=generator) for _ in range(4)])  # can be read once
    result = lnn.compress_model(net, X, lnn.LowRank(formats=MATRICES), budget=budget, calibration=images)
    assert len(result.probes) > 4
    assert calls == [1]


def test_exceptions_of_the_function_reach_the_caller(net):
    def evaluate(model):
        if params(model) < params(net):
            raise KeyError("no such file")
        return 1.0

    with pytest.raises(KeyError, match="no such file"):
        search(net, evaluate, 0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "90 %", torch.zeros(2), [1.0]])
def test_what_is_no_metric(net, value):
    with pytest.raises(lnn.OptionError, match="evaluate must return one finite number, larger for a better model, got"):
        search(net, lambda model: value, 0.5)


@pytest.mark.parametrize("value", [3, torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64)])
def test_numbers_of_any_type(net, value):
    assert search(net, lambda model: value, 0.5).probes[0].metric == float(value)


def test_recipes_that_cannot_be_searched(net):
    with pytest.raises(lnn.PlanError, match=r"no step of this one works towards a size. Add LowRank"):
        search(net, Metric(net), 0.5, [lnn.LowRank(rank=lnn.VBMF())])
    recipe = [lnn.LowRank(), lnn.FineTune([X], epochs=1, checkpoint="run.pt")]
    with pytest.raises(lnn.PlanError, match="cannot share one file"):
        search(net, Metric(net), 0.5, recipe)


def test_a_plan_needs_a_share(net):
    with pytest.raises(lnn.PlanError, match="accuracy_drop needs models compressed and evaluated"):
        lnn.plan(net, X, budget=lnn.Budget(accuracy_drop=0.5, evaluate=Metric(net)))


def test_speed_is_measured_once(net, monkeypatch):
    calls = []
    measured = compress.measured_latency
    monkeypatch.setattr(compress, "measured_latency", lambda *args: calls.append(1) or measured(*args))
    budget = lnn.Budget(accuracy_drop=3.0, evaluate=Metric(net))
    result = lnn.compress_model(net, X, lnn.LowRank(formats=MATRICES), budget=budget, measure_speed=True)
    assert result.report.latency is not None
    assert calls == [1]
