"""Latency budgets from end to end, on a machine whose times are a formula."""

import functools
import logging

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.graph import record
from lowrank_nn.graph.derive import derive_recording
from lowrank_nn.pipeline import state
from lowrank_nn.planning import Clock
from tests.fake_timer import FakeTimer
from tests.storage.models import seeded
from tests.zoo import ZOO

MATRICES = (lnn.SVDConv2d, lnn.SVDLinear, lnn.TuckerConv2d)
X = torch.linspace(-1, 1, 4 * 3 * 16 * 16).reshape(4, 3, 16, 16)


def make():
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Flatten(),
        nn.Linear(64 * 16, 40),
    )


@pytest.fixture(scope="module")
def net():
    net = seeded(make).eval()
    with torch.no_grad():  # a falling spectrum, as after training
        for layer in net:
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(torch.linspace(2, 0.05, layer.in_channels)[:, None, None])
    return net


def on_a_machine(monkeypatch, timer):
    monkeypatch.setattr(state, "Clock", functools.partial(Clock, timer=timer))
    return timer


@pytest.fixture
def machine(monkeypatch):
    return on_a_machine(monkeypatch, FakeTimer())


def plan(model, recipe=None, inputs=X, **shares):
    return lnn.plan(model, inputs, recipe or lnn.LowRank(formats=MATRICES), budget=lnn.Budget(**shares))


def compress(model, recipe=None, inputs=X, **shares):
    return lnn.compress_model(model, inputs, recipe or lnn.LowRank(formats=MATRICES), budget=lnn.Budget(**shares))


def share_of_time(timer, model, small, inputs=X):
    """Time of the compressed model over that of the dense one, by the timer's own formula."""
    before = record(model, inputs)
    times = []
    for net, recording in ((model, before), (small, derive_recording(before, small))):
        layers = (nn.Conv2d, nn.Linear, lnn.CompressedLayer)
        paths = [site.path for site in recording.sites if site.calls and isinstance(site.layer, layers)]
        times.append(timer.profile(net, paths, inputs).total)
    return times[1] / times[0]


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_result_takes_the_share_that_was_asked(net, machine, share):
    result = compress(net, latency=share)
    assert 0.93 * share <= share_of_time(machine, net, result.model) <= 1.02 * share
    planned = result.plan.latency
    assert planned.after / planned.before == pytest.approx(share_of_time(machine, net, result.model))
    assert result.report.latency.before > 0


@pytest.mark.parametrize(("share", "surprise", "penalty"), [(0.4, 0.35, 1.0), (0.7, 0.0, 30.0), (0.5, 0.3, 10.0)])
def test_the_end_is_within_ten_per_cent_where_estimates_are_wrong(monkeypatch, net, share, surprise, penalty):
    on_a_machine(monkeypatch, FakeTimer(surprise, penalty))
    report = plan(net, latency=share)
    assert 0.9 * share <= 1 / report.speedup <= 1.1 * share


def test_the_plan_is_timed_and_learned_from(monkeypatch, net, caplog):
    timer = on_a_machine(monkeypatch, FakeTimer(surprise=0.35, penalty=20.0))
    with caplog.at_level(logging.INFO, "lowrank_nn.pipeline.latency"):
        plan(net, latency=0.5)
    rounds = [record.getMessage() for record in caplog.records if "asked" in record.getMessage()]
    assert 1 <= len(rounds) <= 5
    misses = [abs(float(line.split(" estimated, ")[1].split()[0]) - 0.5) for line in rounds]
    assert min(misses) <= 0.05
    assert len(timer.timed) >= 1 + len(rounds)


def test_more_time_means_less_error(net, machine):
    x = X
    with torch.no_grad():
        errors = [float((compress(net, latency=share).model(x) - net(x)).norm()) for share in (0.3, 0.8)]
    assert errors[0] > errors[1]


def test_all_the_time_leaves_all_dense(net, machine):
    report = plan(net, latency=1.0)
    assert all(not row.replaced for row in report.rows)
    assert report.speedup == pytest.approx(1)


def test_a_budget_of_macs_alone_times_nothing(net, machine):
    report = compress(net, macs=0.5).report
    assert machine.timed == []
    assert report.latency is None


def test_several_entries_hold_at_once(net, machine):
    result = compress(net, latency=0.6, params=0.3, macs=0.5)
    assert result.report.after.params <= 0.3 * result.report.before.params
    assert result.report.after.macs <= 0.5 * result.report.before.macs
    assert share_of_time(machine, net, result.model) <= 1.02 * 0.6


def test_time_and_macs_choose_differently(net, machine):
    """Output channels cost whole vectors: ranks are multiples where time counts, and any number where MACs do."""
    by_time, by_macs = compress(net, latency=0.5).model, compress(net, macs=0.5).model

    def ranks(model):
        found = [module.rank for module in model.modules() if isinstance(module, lnn.LowRankLayer)]
        return [mode for rank in found for mode in (rank if isinstance(rank, tuple) else (rank,)) if mode]

    assert all(rank % 16 == 0 or rank in (4, 8, 27, 40) for rank in ranks(by_time))
    assert any(rank % 16 for rank in ranks(by_macs))


def test_a_sweep_learns_once_and_keeps_ranks_of_each_kind_apart(net, machine):
    budgets = [lnn.Budget(macs=0.5), lnn.Budget(latency=0.5), lnn.Budget(latency=0.6)]
    swept = list(lnn.sweep(net, X, budgets, lnn.LowRank(formats=MATRICES)))
    probes = len(machine.timed)
    alone = [lnn.compress_model(net, X, lnn.LowRank(formats=MATRICES), budget=budget) for budget in budgets]
    for one, other in zip(swept[:2], alone, strict=False):
        assert [row.options for row in one.report.rows] == [row.options for row in other.report.rows]
    for result, share in zip(swept[1:], (0.5, 0.6), strict=True):
        assert share_of_time(machine, net, result.model) == pytest.approx(share, rel=0.1)
    assert len(machine.timed) - probes > probes


def test_slower_layers_stay_dense_and_the_report_says_so(monkeypatch, net):
    class CallsCost(FakeTimer):
        def call(self, layer, input_shape):
            small = isinstance(layer, (nn.Conv2d, lnn.SVDConv2d, lnn.TuckerConv2d)) and input_shape[1] == 3
            return 0.01 if small and isinstance(layer, nn.Conv2d) else super().call(layer, input_shape)

    on_a_machine(monkeypatch, CallsCost())
    report = plan(net, latency=0.5)
    reasons = {path: reason for reason, paths in report.left.items() for path in paths}
    assert reasons["0"].startswith("LowRank: measured slower: ")
    assert reasons["0"].endswith(" ms against 0.01 ms dense")
    assert "0" not in {row.path for row in report.rows if row.replaced}


def test_what_cannot_be_met_names_what_was_measured(net, machine):
    with pytest.raises(lnn.BudgetError, match=r"latency=0\.001 cannot be met .* takes (0\.\d+) of the dense") as raised:
        plan(net, latency=0.001)
    least = float(str(raised.value).split("takes ")[1].split()[0])
    assert 1 / plan(net, latency=1.05 * least).speedup <= 1.1 * least
    with pytest.raises(lnn.BudgetError):
        plan(net, latency=0.85 * least)


def test_where_nothing_is_faster_the_budget_is_an_error(monkeypatch, net):
    class CallsCost(FakeTimer):
        def call(self, layer, input_shape):
            return 1000 + super().call(layer, input_shape)

    on_a_machine(monkeypatch, CallsCost())
    with pytest.raises(lnn.BudgetError, match=r"takes 1 of the dense"):
        plan(net, latency=0.5)


def test_a_recipe_that_ends_slower_than_dense_says_what_was_asked_and_what_to_leave_out(monkeypatch, net):
    class SlowIntegers(FakeTimer):
        def call(self, layer, input_shape):
            integer = isinstance(layer, (lnn.QuantConv2d, lnn.QuantLinear))
            return (30 if integer else 1) * super().call(layer, input_shape)

    on_a_machine(monkeypatch, SlowIntegers())
    message = r"latency=0\.9 cannot be met, .* \(latency=1\): .*allowed 1\)\. Leave out .* integers without activations"
    with pytest.raises(lnn.BudgetError, match=message):
        plan(net, [lnn.LowRank(formats=MATRICES), lnn.Quantize("int8")], latency=0.9)


def test_another_entry_that_cannot_be_met_is_named(net, machine):
    with pytest.raises(lnn.BudgetError, match=r"params=0\.001 \(least possible"):
        plan(net, latency=0.9, params=0.001)


def test_estimates_that_are_too_high_do_not_give_up(monkeypatch, net):
    """A formula that finds nothing fast enough is corrected by timing the fastest that there is."""
    timer = on_a_machine(monkeypatch, FakeTimer())
    least = _least(net)

    class FastAtLast(FakeTimer):
        def call(self, layer, input_shape):
            narrow = isinstance(layer, nn.Conv2d) and layer.out_channels == 4
            return (0.3 if narrow else 1.0) * super().call(layer, input_shape)

    timer = on_a_machine(monkeypatch, FastAtLast())
    report = plan(net, latency=0.95 * least)
    assert 1 / report.speedup <= 1.1 * 0.95 * least
    assert timer.timed


def _least(net):
    with pytest.raises(lnn.BudgetError) as raised:
        plan(net, latency=0.001)
    return float(str(raised.value).split("takes ")[1].split()[0])


def test_steps_after_low_rank_are_timed_too(monkeypatch, net):
    class FastIntegers(FakeTimer):
        def call(self, layer, input_shape):
            integer = isinstance(layer, (lnn.QuantConv2d, lnn.QuantLinear))
            return (0.5 if integer else 1.0) * super().call(layer, input_shape)

    timer = on_a_machine(monkeypatch, FastIntegers())
    recipe = [lnn.LowRank(formats=MATRICES), lnn.Quantize("int8")]
    result = compress(net, recipe, latency=0.3)
    assert share_of_time(timer, net, result.model) == pytest.approx(0.3, rel=0.1)
    alone = compress(net, latency=0.3)
    assert result.report.after.macs > 1.3 * alone.report.after.macs


def test_a_recipe_that_does_not_choose_is_only_timed(net, machine):
    recipe = lnn.Apply(lnn.TuckerConv2d, where=["4", "6"], rank=(16, 16))
    report = plan(net, recipe, latency=0.9)
    assert 1 / report.speedup < 0.9
    with pytest.raises(lnn.BudgetError, match="cannot be met"):
        plan(net, recipe, latency=0.1)


@pytest.mark.parametrize("name", ["alexnet", "vit", "transformer", "unet", "crnn", "tied", "control_flow"])
def test_every_architecture_ends_near_what_is_asked_or_says_why_not(monkeypatch, name):
    model, inputs = ZOO[name]()
    timer = on_a_machine(monkeypatch, FakeTimer(surprise=0.1))
    try:
        result = compress(model, inputs=inputs, latency=0.8)
    except lnn.BudgetError as error:
        assert "the fastest model that was measured takes" in str(error)  # noqa: PT017
    else:
        assert share_of_time(timer, model, result.model, inputs) <= 1.1 * 0.8


@pytest.mark.slow
def test_on_this_machine(caplog):
    """Nothing is asserted about times here, only that real timing goes through and is reported."""
    model, inputs = ZOO["resnet20"]()
    with caplog.at_level(logging.INFO, "lowrank_nn"):
        try:
            result = compress(model, inputs=inputs, latency=0.95)
        except lnn.BudgetError as error:
            assert "takes" in str(error)  # noqa: PT017
        else:
            assert result.report.speedup > 0
            assert result.plan.speedup > 0
    assert "measured" in caplog.text


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_filters_are_removed_until_the_time_is_right(net, machine, share):
    result = compress(net, lnn.Prune(granularity="filter", round_to=16), latency=share)
    fresh = [record(model, X) for model in (net, result.model)]
    times = [
        machine.profile(model, [s.path for s in r.sites if s.calls], X).total
        for model, r in zip((net, result.model), fresh, strict=True)
    ]
    assert 0.6 * share <= times[1] / times[0] <= 1.02 * share
    assert not any(isinstance(module, lnn.CompressedLayer) for module in result.model.modules())


def test_the_time_of_other_convolutions_falls_with_their_filters_too(machine):
    net = seeded(
        lambda: nn.Sequential(nn.Conv1d(1, 64, 9), nn.ReLU(), nn.Conv1d(64, 64, 9), nn.ReLU(), nn.Conv1d(64, 8, 9))
    )
    signals = torch.linspace(-1, 1, 400).reshape(4, 1, 100)
    result = compress(net.eval(), lnn.Prune(granularity="filter"), signals, latency=0.7)
    assert result.plan.latency.speedup == pytest.approx(1 / 0.7, rel=0.1)
    assert 20 < result.model[2].in_channels < 64


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.rnn = nn.Conv1d(1, 64, 9), nn.LSTM(64, 64, 2, batch_first=True, bidirectional=True)
        self.last = nn.Linear(128, 8)

    def forward(self, x):
        return self.last(self.rnn(torch.relu(self.first(x)).transpose(1, 2))[0][:, -1])


def test_the_time_of_recurrent_layers_falls_with_their_units(machine):
    net = seeded(Recurrent).eval()
    signals = torch.linspace(-1, 1, 200).reshape(4, 1, 50)
    result = compress(net, lnn.Prune(granularity="filter"), signals, latency=0.6)
    assert result.plan.latency.speedup == pytest.approx(1 / 0.6, rel=0.1)
    assert 20 < result.model.rnn.hidden_size < 64


def test_low_rank_after_filters_works_towards_the_time_that_is_left(net, machine):
    recipe = [lnn.Prune(0.25, granularity="filter"), lnn.LowRank(formats=MATRICES)]
    result = compress(net, recipe, latency=0.4)
    assert any(isinstance(module, lnn.CompressedLayer) for module in result.model.modules())
    assert result.plan.latency.speedup >= 1 / (1.02 * 0.4)
