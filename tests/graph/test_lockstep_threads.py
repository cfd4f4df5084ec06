"""Forwards in threads: errors and interrupts end all of them, and settings of the calling thread hold in them."""

import _thread
import ast
import copy
import signal
import time

import pytest
import torch
from torch import nn

from lowrank_nn.errors import CalibrationError, RankError
from lowrank_nn.graph.lockstep import MOST_THREADS, run_in_lockstep
from tests.graph.test_lockstep import nothing, paths_of
from tests.zoo.resnet import ResNet


def test_a_batch_that_the_model_cannot_take():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    visits = []
    with pytest.raises(CalibrationError, match="failed on batch 2: RuntimeError") as caught:
        run_in_lockstep(model, model, [torch.ones(1, 3), torch.ones(1, 4)], ["0", "1"], lambda p, _: visits.append(p))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert visits == []


def test_more_batches_than_there_can_be_threads():
    with pytest.raises(CalibrationError, match="1001 batches"):
        run_in_lockstep(Looks(), Looks(), [torch.ones(1, 3)] * 1001, ["layer"], nothing)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RankError("no"), ZeroDivisionError()])
@pytest.mark.parametrize("at", ["layer1.0.conv1", "linear"])
def test_errors_and_interrupts_in_a_visit(error, at):
    def visit(path, pairs):
        if path == at:
            raise error

    model, x = ResNet(8), torch.randn(1, 3, 8, 8)
    with pytest.raises(type(error)):
        run_in_lockstep(model, copy.deepcopy(model), [x, x], paths_of(model, x), visit)
    assert torch.backends.mha.get_fastpath_enabled()


class Interrupted(nn.Module):
    """Ctrl-C while this forward works: the main thread waits for it then."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = self.first(x)
        if float(x.sum()) != 0:
            _thread.interrupt_main()
            time.sleep(0.05)
        return self.second(x)


def test_interrupt_while_a_forward_works():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start tests with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            run_in_lockstep(Interrupted(), Interrupted(), [torch.ones(1, 3)] * 3, ["first", "second"], nothing)
    finally:
        signal.signal(signal.SIGINT, before)


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            try:
                x = layer(x)
            except BaseException:  # what no model should do
                continue
        return x


def test_a_model_that_catches_everything_is_ended_all_the_same():
    def visit(path, pairs):
        raise ZeroDivisionError

    paths = [f"layers.{i}" for i in range(4)]
    with pytest.raises(ZeroDivisionError):
        run_in_lockstep(Stubborn(), Stubborn(), [torch.ones(1, 3)] * 2, paths, visit)


class Looks(nn.Module):
    """Says which settings of torch its thread has."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        seen = {
            "grad": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "autocast": torch.is_autocast_enabled("cpu") and str(torch.get_autocast_dtype("cpu")),
            "device": torch.get_default_device().type,
            "threads": torch.get_num_threads(),
            "fast path": torch.backends.mha.get_fastpath_enabled(),
            "training": self.layer.training,
        }
        self.layer(x)
        raise RuntimeError(repr(seen))


def seen_settings(model, count=1):
    x = torch.ones(1, 3, device="cpu")
    with pytest.raises(CalibrationError) as caught:
        run_in_lockstep(model, model, [x] * count, ["layer"], nothing)
    return ast.literal_eval(str(caught.value.__cause__))


def test_settings_of_the_calling_thread():
    model = Looks()
    usual = {"grad": False, "inference": False, "autocast": False, "device": "cpu", "fast path": False}
    usual |= {"threads": torch.get_num_threads(), "training": False}
    assert seen_settings(model) == usual
    with torch.inference_mode():
        assert seen_settings(model) == usual | {"inference": True}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert seen_settings(model) == usual | {"autocast": "torch.bfloat16"}
    with torch.device("meta"):
        assert seen_settings(model) == usual | {"device": "meta"}


def test_number_of_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert seen_settings(Looks())["threads"] == 3
        assert seen_settings(Looks(), count=MOST_THREADS // 4)["threads"] == 2
        assert torch.get_num_threads() == 3
        assert seen_settings(Looks())["threads"] == 3
    finally:
        torch.set_num_threads(before)
