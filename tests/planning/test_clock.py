"""The clock on a machine whose times are a formula."""

import json

import pytest
import torch
from torch import nn

from lowrank_nn.cost import TimingCache
from lowrank_nn.graph import record
from lowrank_nn.graph.derive import derive_recording, meta_copy
from lowrank_nn.graph.stand_in import stand_in
from lowrank_nn.graph.timing import Profile
from lowrank_nn.layers import SVDConv2d, SVDLinear, TuckerConv2d
from lowrank_nn.planning import Clock, present_layers
from tests.fake_timer import BETWEEN, FakeTimer
from tests.storage.models import seeded
from tests.zoo import ZOO

X = torch.linspace(-1, 1, 2 * 3 * 10 * 10).reshape(2, 3, 10, 10)


def make():
    same = nn.Conv2d(32, 32, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), same, nn.ReLU(), same, nn.Flatten(), nn.Linear(3200, 50)
    )


@pytest.fixture
def net():
    return seeded(make).eval()


def clock_of(net, timer, inputs=X):
    return Clock(net, record(net, inputs), inputs, timer=timer)


def tucker(rank):
    return TuckerConv2d(32, 32, 3, padding=1, rank=rank, device="meta")


def truth(net, timer, replaced, inputs=X):
    """Time of the model with the layers replaced, over that of the dense one, by the timer's own formula."""
    small = stand_in(net, replaced)
    return total(timer, small, derive_recording(record(net, inputs), small), inputs)


def total(timer, model, recording, inputs):
    paths = [site.path for site in recording.sites if site.calls and not isinstance(site.layer, nn.ReLU)]
    return timer.profile(model, paths, inputs).total


def test_nothing_is_timed_before_the_first_question(net):
    timer = FakeTimer()
    clock = clock_of(net, timer)
    clock.work_of(net[2], record(net, X)["2"].calls)
    assert timer.timed == []
    assert clock.dense > 0
    assert timer.timed == [[["0", "2", "6"]]]
    assert clock.dense > 0
    assert len(timer.timed) == 1


def test_the_dense_model_takes_what_was_measured(net):
    timer = FakeTimer()
    clock = clock_of(net, timer)
    recording = record(net, X)
    assert clock.dense == pytest.approx(total(timer, net, recording, X))
    assert clock.forward(recording) == pytest.approx(clock.dense)
    assert clock.forward(derive_recording(recording, meta_copy(net))) == pytest.approx(clock.dense)


def test_layers_take_the_sum_of_their_calls_and_stages(net):
    timer = FakeTimer(surprise=0.2)
    clock = clock_of(net, timer)
    calls = record(net, X)["2"].calls
    assert len(calls) == 2
    shape = calls[0].input_shape
    assert clock.milliseconds(clock.work_of(net[2], calls)) == pytest.approx(2 * timer.call(net[2], shape))
    layer = tucker((8, 16))
    clock.measure({"2": layer})
    stages = [timer.call(layer.reduce, shape), timer.call(layer.core, (2, 16, 10, 10)), BETWEEN]
    stages.append(timer.call(layer.expand, (2, 8, 10, 10)))
    assert clock.milliseconds(clock.work_of(layer, calls)) == pytest.approx(2 * sum(stages))


def test_measuring_gives_the_ratio_and_teaches(net):
    timer = FakeTimer(surprise=0.3, penalty=1.5)
    clock = clock_of(net, timer)
    replaced = {"2": tucker((16, 16)), "6": SVDLinear(3200, 50, rank=16, device="meta")}
    work = clock.work_of(replaced["2"], record(net, X)["2"].calls)
    assert not clock.has_timed(work)
    expected = truth(net, timer, replaced) / clock.dense
    assert clock.measure(replaced) == pytest.approx(expected)
    assert clock.has_timed(work)
    recording = derive_recording(record(net, X), stand_in(net, replaced))
    assert clock.forward(recording) == pytest.approx(expected * clock.dense)


def test_between_timings_the_formula_answers(net):
    timer = FakeTimer()
    clock = clock_of(net, timer)
    for rank in ((8, 8), (32, 16), (16, 32)):
        clock.measure({"2": tucker(rank)})
    calls = record(net, X)["2"].calls
    layer = tucker((24, 24))
    real = truth(net, timer, {"2": layer}) - truth(net, timer, {"2": tucker((8, 8))})
    known = clock.milliseconds(clock.work_of(tucker((8, 8)), calls))
    assert clock.milliseconds(clock.work_of(layer, calls)) == pytest.approx(known + real, rel=0.1)
    assert clock.median_error < 0.1


def test_a_machine_that_slows_down_changes_no_estimate(net):
    timer = FakeTimer()
    clock = clock_of(net, timer)
    layer, calls = tucker((16, 16)), record(net, X)["2"].calls
    expected = truth(net, timer, {"2": layer}) / clock.dense
    before = clock.dense

    def slow(models, inputs):
        profiles = timer(models, inputs)
        return [Profile(3 * p.total, {k: [3 * t for t in v] for k, v in p.calls.items()}) for p in profiles]

    clock._timer = slow
    assert clock.measure({"2": layer}) == pytest.approx(expected)
    assert clock.dense == before
    reduce, core, expand = layer.stages()
    shapes = (calls[0].input_shape, (2, 16, 10, 10), (2, 16, 10, 10))
    stages = sum(timer.call(stage, shape) for stage, shape in zip((reduce, core, expand), shapes, strict=True))
    assert clock.milliseconds(clock.work_of(layer, calls[:1])) == pytest.approx(BETWEEN + stages)


class TestCache:
    @pytest.fixture(autouse=True)
    def _folder(self, monkeypatch, tmp_path):
        monkeypatch.setenv("LOWRANK_NN_CACHE", str(tmp_path))
        self.folder = tmp_path

    def test_timings_of_earlier_runs_are_known(self, net):
        layer, calls = tucker((16, 16)), record(net, X)["2"].calls
        first = clock_of(net, FakeTimer(surprise=0.3))
        first.measure({"2": layer})
        second = clock_of(net, FakeTimer(surprise=0.3))
        work = second.work_of(layer, calls)
        assert second.has_timed(work)
        assert second.milliseconds(work) == pytest.approx(first.milliseconds(work))

    def test_they_follow_the_speed_that_the_machine_has_now(self, net):
        layer, calls = tucker((16, 16)), record(net, X)["2"].calls
        first = clock_of(net, FakeTimer())
        first.measure({"2": layer})
        path = first._cache.path
        content = json.loads(path.read_text())
        content["milliseconds"] = {key: 2 * time for key, time in content["milliseconds"].items()}
        path.write_text(json.dumps(content))
        second = clock_of(net, FakeTimer())
        work = second.work_of(layer, calls)
        assert second.milliseconds(work) == pytest.approx(first.milliseconds(work))

    @pytest.mark.parametrize(
        ("change", "known"),
        [
            (lambda net, x: (net, x), True),
            (lambda net, x: (net, x[:1]), False),
            (lambda net, x: (net, x.contiguous(memory_format=torch.channels_last)), False),
            (lambda net, x: (net.to(memory_format=torch.channels_last), x), False),
            (lambda net, x: (net.double(), x.double()), False),
        ],
        ids=["same", "batch", "input format", "weight format", "dtype"],
    )
    def test_other_settings_are_other_calls(self, net, change, known):
        layer = tucker((16, 16))
        clock_of(net, FakeTimer()).measure({"2": layer})
        net, inputs = change(net, X)
        clock = clock_of(net, FakeTimer(), inputs)
        assert clock.has_timed(clock.work_of(layer, record(net, inputs)["2"].calls)) == known

    def test_what_is_kept_is_milliseconds_by_call(self, net):
        clock = clock_of(net, FakeTimer())
        assert clock.dense > 0
        stored = TimingCache(clock._cache.context).load()
        assert any(key.startswith("Linear(in_features=3200, out_features=50") for key in stored)
        assert all("float32" in key for key in stored)


@pytest.mark.parametrize("name", list(ZOO))
def test_every_architecture_is_estimated_whole(name):
    model, inputs = ZOO[name]()
    recording = record(model, inputs)
    clock = Clock(model, recording, inputs, timer=FakeTimer())
    assert clock.forward(recording) == pytest.approx(clock.dense)
    site = next(s for s in recording.sites if isinstance(s.layer, (nn.Linear, nn.Conv2d)) and s.calls and not s.tied_to)
    cls = SVDLinear if isinstance(site.layer, nn.Linear) else SVDConv2d
    new = cls.from_pretrained_layer(site.layer, rank=1).to("meta")
    ratio = clock.measure({site.path: new})
    small = stand_in(model, {site.path: new})
    assert clock.forward(derive_recording(recording, small)) == pytest.approx(ratio * clock.dense)
    assert present_layers(derive_recording(recording, small)).keys() == {site.path}


class CountsRealCalls(FakeTimer):
    """Knows a layer only if a forward calls it."""

    def profile(self, model, paths, example_inputs):
        called = []
        for path in paths:
            layer = model.get_submodule(path)
            vars(layer)["forward"] = lambda x, path=path, run=layer.forward: (called.append(path), run(x))[1]
        with torch.no_grad():
            model(example_inputs)
        for path in paths:
            del vars(model.get_submodule(path))["forward"]
        return Profile(1.0, {path: [0.01] for path in called})


def test_encoder_layers_with_a_fused_path_are_timed_without_it():
    model, inputs = ZOO["transformer"]()
    paths = [site.path for site in record(model, inputs).sites if isinstance(site.layer, nn.Linear) and site.calls]
    fused = CountsRealCalls().profile(model, paths, inputs)
    assert set(fused.calls) < set(paths)
    clock = clock_of(model, CountsRealCalls(), inputs)
    recording = record(model, inputs)
    assert all(clock.has_timed(clock.work_of(recording[path].layer, recording[path].calls)) for path in paths)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_model_without_layers_to_time():
    model = nn.Sequential(nn.LayerNorm(4), nn.ReLU())
    clock = Clock(model, record(model, torch.ones(2, 4)), torch.ones(2, 4), timer=FakeTimer())
    assert clock.forward(record(model, torch.ones(2, 4))) == pytest.approx(clock.dense)
