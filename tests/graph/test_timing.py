"""Time in place, on a clock that only the watched layers advance."""

import itertools

import pytest
import torch
from torch import nn

from lowrank_nn.graph import timing
from lowrank_nn.graph.timing import time_in_place


class Machine:
    """A clock that stands still but for the work that is done, and for what disturbs it."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.disturbances = itertools.repeat(1.0)
        monkeypatch.setattr(timing, "_stamp_of", lambda device: lambda: self.now)

    def work(self, milliseconds):
        self.now += milliseconds * next(self.disturbances) / 1e3


class Busy(nn.Module):
    """A layer that takes its time."""

    def __init__(self, machine, *milliseconds, inner=None):
        super().__init__()
        self.machine, self.times, self.inner = machine, itertools.cycle(milliseconds), inner
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        self.machine.work(next(self.times))
        return x if self.inner is None else self.inner(x)

    def __deepcopy__(self, memo):
        raise AssertionError("the model itself is to be timed")


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


X = torch.zeros(2)


def test_time_is_shared_out_over_calls_and_the_rest(machine):
    twice = Busy(machine, 3.0)
    model = nn.Sequential(Busy(machine, 1.0), twice, Busy(machine, 5.0), twice)
    (profile,) = time_in_place([(model, ["0", "1"])], X)
    assert profile.total == pytest.approx(12, rel=1e-4)
    assert profile.calls["0"] == pytest.approx([1.0])
    assert profile.calls["1"] == pytest.approx([3.0, 3.0])
    assert set(profile.calls) == {"0", "1"}


def test_calls_are_told_apart(machine):
    twice = Busy(machine, 1.0, 2.0)
    (profile,) = time_in_place([(nn.Sequential(twice, Busy(machine, 4.0), twice), ["0"])], X)
    assert profile.calls["0"] == pytest.approx([1.0, 2.0])


def test_inside_a_watched_layer_the_inner_one_counts(machine):
    model = nn.Sequential(Busy(machine, 2.0, inner=Busy(machine, 7.0)))
    (profile,) = time_in_place([(model, ["0", "0.inner"])], X)
    assert profile.total == pytest.approx(9, rel=1e-4)
    assert profile.calls == {"0": [pytest.approx(2.0)], "0.inner": [pytest.approx(7.0)]}


def test_the_model_itself_can_be_watched(machine):
    (profile,) = time_in_place([(Busy(machine, 2.0), [""])], X)
    assert profile.calls == {"": [pytest.approx(2.0)]}


def test_models_take_turns_in_both_orders(machine):
    order = []
    models = [nn.Sequential(Busy(machine, 1.0)), nn.Sequential(Busy(machine, 1.0))]
    for name, model in zip("ab", models, strict=True):
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    time_in_place([(model, []) for model in models], X, seconds=0)
    rounds = {"".join(order[i : i + 2]) for i in range(0, len(order), 2)}
    assert len(order) == 2 * (timing._WARMUP + timing._LEAST_ROUNDS)
    assert rounds == {"ab", "ba"}


def test_disturbances_now_and_then_do_not_count(machine):
    model = nn.Sequential(Busy(machine, 1.0), Busy(machine, 3.0), Busy(machine, 2.0))
    machine.disturbances = itertools.cycle([1, 1, 1, 8, 1, 1, 1, 8, 1, 8, 1])
    (profile,) = time_in_place([(model, ["0", "1"])], X)
    assert profile.total == pytest.approx(6, rel=1e-4)
    assert profile.calls == {"0": [pytest.approx(1.0)], "1": [pytest.approx(3.0)]}


def test_a_slower_machine_slows_both(machine):
    first, second = nn.Sequential(Busy(machine, 1.0)), nn.Sequential(Busy(machine, 0.25), Busy(machine, 0.5))
    speeds = itertools.chain.from_iterable([speed] * 3 for speed in itertools.count(2.0))  # a round each
    machine.disturbances = speeds
    before, after = time_in_place([(first, ["0"]), (second, ["0"])], X)
    assert after.total / before.total == pytest.approx(0.75)
    assert after.calls["0"][0] / before.calls["0"][0] == pytest.approx(0.25)


def test_rounds_go_on_until_the_ratio_is_sure(machine):
    wild = nn.Sequential(Busy(machine, 1.0, 1.3, 0.8, 1.1))
    calls = []
    wild.register_forward_hook(lambda *_: calls.append(1))
    time_in_place([(nn.Sequential(Busy(machine, 1.0)), []), (wild, [])], X, seconds=0.5)
    assert len(calls) > 10 * timing._LEAST_ROUNDS


def test_rounds_that_go_another_way_are_left_out(machine):
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.often, self.seldom = Busy(machine, 2.0), Busy(machine, 50.0)
            self.turns = itertools.cycle([0, 0, 0, 1])

        def forward(self, x):
            return self.seldom(x) if next(self.turns) else self.often(x)

    (profile,) = time_in_place([(Chooses(), ["often", "seldom"])], X)
    assert profile.total == pytest.approx(2, rel=1e-4)
    assert profile.calls == {"often": [pytest.approx(2.0)]}


def test_models_are_left_as_they_were(machine):
    model = nn.Sequential(Busy(machine, 1.0), nn.BatchNorm1d(2), nn.Dropout()).train()
    model[2].eval()
    x = torch.ones(3, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = torch.get_rng_state()
        time_in_place([(model, ["0", "1"])], x)
        assert torch.get_rng_state().equal(before)
    assert "forward" not in vars(model[0])
    assert [module.training for module in model] == [True, True, False]
    assert float(model[0].seen) == 0
    assert model[1].num_batches_tracked == 0
    assert torch.is_grad_enabled()


def test_models_are_left_as_they_were_after_an_error(machine):
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError("no")

    model = nn.Sequential(Busy(machine, 1.0), Fails()).train()
    with pytest.raises(ValueError, match="no"):
        time_in_place([(model, ["0"])], X)
    assert "forward" not in vars(model[0])
    assert model.training


def test_the_cost_of_looking_at_the_clock_is_taken_off(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(timing, "_stamp_of", lambda device: lambda: next(ticks) / 1e3)
    (profile,) = time_in_place([(nn.Sequential(nn.Identity(), nn.Identity()), ["0", "1"])], X)
    assert profile.total < 1e-3


@pytest.mark.parametrize(("threads", "clock"), [(1, "thread_time"), (2, "perf_counter")])
def test_with_one_thread_only_its_own_time_counts(monkeypatch, threads, clock):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        assert timing._stamp_of(torch.device("cpu")).__name__ == clock


def test_other_devices_finish_their_work_first(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    assert timing._stamp_of(torch.device("mps"))() > 0
    assert waited == [torch.device("mps")]


def test_a_real_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    before, after = time_in_place([(model, ["0", "2"]), (model, ["0"])], torch.ones(2, 3, 12, 12), seconds=0)
    assert before.total > sum(before.calls["0"]) + sum(before.calls["2"]) > 0
    assert set(after.calls) == {"0"}


@pytest.mark.cuda
def test_on_a_cuda_device(device):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(device)
    (profile,) = time_in_place([(model, ["0", "2"])], torch.ones(2, 3, 12, 12, device=device))
    assert profile.total > profile.calls["0"][0] > 0
