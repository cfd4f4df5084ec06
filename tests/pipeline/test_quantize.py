"""Quantize: what the report says of the kernels, and layers that stay because they are faster in floating point."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.graph import record
from lowrank_nn.graph.derive import meta_copy
from lowrank_nn.graph.timing import Profile, time_in_place
from lowrank_nn.layers import _kernel as kernels
from lowrank_nn.layers._onednn import is_exact
from lowrank_nn.pipeline import fastest
from lowrank_nn.pipeline.state import State

needs_kernels = pytest.mark.skipif(not is_exact(255, 127), reason="no exact integer kernels on this machine")
STEP = lnn.Quantize("int8", activations="int8", keep_fastest=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.fc = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 8, 3), nn.Linear(8 * 16, 4)

    def forward(self, x):
        return self.fc(self.narrow(self.wide(x).relu()).relu().flatten(1))


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval(), torch.randn(2, 3, 8, 8)


def slow(*prefixes, whole=(1.0, 1.0, 1.0)):
    """A timer by which quantized layers at these paths take three times as long, and others half as long.

    Whole models, in floating point, mixed and in integers, take ``whole``.
    """

    def timer(models, example_inputs):
        timed.append([sorted(paths) for _, paths in models])
        if len(models) == 3:
            return [Profile(time, {}) for time in whole]
        return [Profile(1.0, {path: [time_of(model, path)] for path in paths}) for model, paths in models]

    def time_of(model, path):
        if not any(isinstance(part, lnn.QuantConv2d | lnn.QuantLinear) for part in model.get_submodule(path).modules()):
            return 1.0
        return 3.0 if path.startswith(prefixes) else 0.5

    timed = []
    timer.timed = timed
    return timer


def reasons(report, path):
    return [text for text, paths in report.left.items() if path in paths]


def test_layers_slower_in_integers_stay_and_the_report_says_so(net, monkeypatch):
    model, x = net
    timer = slow("narrow")
    monkeypatch.setattr(fastest.slower_layers, "__kwdefaults__", {"timer": timer})
    report = lnn.plan(model, x, STEP, calibration=[x], progress=False)
    result = lnn.compress_model(model, x, STEP, calibration=[x], progress=False)
    assert [type(layer) for layer in result.model.children()] == [lnn.QuantConv2d, nn.Conv2d, lnn.QuantLinear]
    expected = "Quantize: slower in integers: 3.000 ms, in floating point 1.000 ms"
    assert reasons(report, "narrow") == reasons(result.report, "narrow") == [expected]
    assert timer.timed == 2 * [[["fc", "narrow", "wide"]] * 2, [[]] * 3]


def test_factorised_layers_are_judged_as_a_whole_and_timed_once(net, monkeypatch):
    model, x = net
    timer = slow("narrow")
    monkeypatch.setattr(fastest.slower_layers, "__kwdefaults__", {"timer": timer})
    recipe = [lnn.Apply(lnn.TuckerConv2d, rank=(4, 4)), STEP]
    result = lnn.compress_model(model, x, recipe, calibration=[x], progress=False)
    assert [type(part) for part in result.model.narrow.children()] == 3 * [nn.Conv2d]
    assert {type(part) for part in result.model.wide.children()} <= {lnn.QuantConv2d}
    assert len(timer.timed) == 2


@pytest.mark.parametrize(
    ("whole", "stay", "why"),
    [
        ((1.0, 0.9, 0.8), set(), ""),
        (
            (0.5, 0.9, 0.8),
            {"wide", "narrow", "fc"},
            "the whole model is slower in integers: 0.900 ms, in floating point",
        ),
        ((1.0, 0.8, 0.9), {"narrow"}, "slower in integers: 3.000 ms"),
    ],
)
def test_the_fastest_whole_is_kept(net, monkeypatch, whole, stay, why):
    model, x = net
    monkeypatch.setattr(fastest.slower_layers, "__kwdefaults__", {"timer": slow("narrow", whole=whole)})
    report = lnn.plan(model, x, STEP, calibration=[x], progress=False)
    notes = {path: reason for reason, paths in report.left.items() for path in paths}
    assert set(notes) == stay
    assert all(reason.startswith(f"Quantize: {why}") for reason in notes.values())


def test_stand_ins_are_timed_and_nothing_is_drawn_from_the_users_generator(net):
    model, x = net
    state = State(model, model, record(model, x), x, calibration=[x])
    before, after = torch.get_rng_state(), []

    def timer(models, example_inputs):
        with torch.no_grad():
            after.extend(kernels.kernel_for(m.wide, example_inputs) for m, _ in models[1:] if len(models) == 2)
        return [Profile(1.0, {path: [1.0] for path in paths}) for _, paths in models]

    dry = dataclasses.replace(state, model=meta_copy(model), dry=True)
    decisions = lnn.Quantize("int8", activations="int8").decide(dry)
    notes = fastest.slower_layers(dry, decisions, timer=timer)
    assert set(notes) == {"wide", "narrow", "fc"}  # as fast is not faster
    assert torch.equal(torch.get_rng_state(), before)
    if is_exact(255, 127):
        assert after[0] is not None


@needs_kernels
def test_the_timing_itself(net, monkeypatch):
    model, x = net
    timer = functools.partial(time_in_place, seconds=0.1)
    monkeypatch.setattr(fastest.slower_layers, "__kwdefaults__", {"timer": timer})
    result = lnn.compress_model(model, x, STEP, calibration=[x], progress=False)
    left = [path for reason, paths in result.report.left.items() for path in paths if "slower in integers" in reason]
    kept = [path for path, layer in result.model.named_children() if not isinstance(layer, lnn.QuantConv2d)]
    assert set(left) <= {"wide", "narrow", "fc"}
    assert set(left) - {"fc"} == set(kept) - {"fc"}


def test_it_needs_activations():
    with pytest.raises(lnn.OptionError, match="keep_fastest=True has no effect without activations"):
        lnn.Quantize("int8", keep_fastest=True)
    assert repr(STEP) == "Quantize(weights='int8', activations='int8', keep_fastest=True)"


def test_the_report_says_where_kernels_are_missing(net, monkeypatch):
    model, x = net
    monkeypatch.setattr(kernels, "is_exact", lambda *_: False)
    step = lnn.Quantize("int8", activations="int8")
    result = lnn.compress_model(model, x, step, calibration=[x], progress=False)
    reason = "Quantize: simulated in floating point: this machine has no exact integer kernels"
    assert result.report.remarks == {reason: ("wide", "narrow", "fc")}
    with torch.no_grad():
        assert torch.equal(result.model.wide(x), result.model.wide.simulate(x))
    double = lnn.compress_model(model.double(), x.double(), step, calibration=[x.double()], progress=False)
    reason = "Quantize: simulated in floating point: integer kernels are for layers in float32"
    assert list(double.report.remarks) == [reason]
    plain = lnn.compress_model(model.float(), x, lnn.Quantize("int8"), progress=False)
    assert not plain.report.remarks
