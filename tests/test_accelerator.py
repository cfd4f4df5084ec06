"""What torch keeps for each accelerator: work that is waited for, random states that are given back."""

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.accelerator import device_types, full_precision, generators_kept, has_float64, used_accelerator
from lowrank_nn.cost import compare_speed


def test_without_one():
    if used_accelerator() is None:
        assert device_types() == ["cpu"]
    assert has_float64(torch.device("cpu"))


def test_the_generator_of_the_cpu_is_kept():
    before = torch.get_rng_state()
    with generators_kept():
        torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_is_off_inside_and_on_again_outside():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision():
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.cuda
def test_an_accelerator_in_use(device):
    torch.ones(1, device=device)
    assert used_accelerator().type == device.type
    assert device_types() == ["cpu", device.type]


@pytest.mark.cuda
def test_time_is_taken_when_the_work_is_done(device, monkeypatch):
    torch.ones(1, device=device)
    happened = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: happened.append("wait"))
    compare_speed(lambda: happened.append("first"), lambda: happened.append("second"), rounds=1, warmup=0)
    assert happened == ["wait", "second", "wait", "wait", "first", "wait"]


@pytest.mark.cuda
def test_random_states_of_the_device_are_given_back(device):
    random = torch.get_device_module(device)
    torch.manual_seed(11)
    before = random.get_rng_state()
    with generators_kept():
        torch.manual_seed(12)
        assert not torch.equal(random.get_rng_state(), before)
    assert torch.equal(random.get_rng_state(), before)
    model, x = nn.Linear(16, 16, device=device), torch.ones(2, 16, device=device)
    before = random.get_rng_state()
    lnn.compress_model(model, x, [lnn.Quantize("int8")], seed=3)
    assert torch.equal(random.get_rng_state(), before)
