"""The latency formula against timings made by a known one."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_nn.cost import LatencyModel, LeafCall, between_stages, dense_macs, leaf_call, vector_width

SHAPES = {
    "conv": (nn.Conv2d(3, 32, 3, padding=1), (2, 3, 40, 40)),
    "strided": (nn.Conv2d(16, 48, (3, 5), stride=(2, 1), dilation=(1, 2)), (2, 16, 21, 23)),
    "same": (nn.Conv2d(16, 32, 3, padding="same"), (2, 16, 9, 9)),
    "unbatched": (nn.Conv2d(16, 32, 3), (16, 90, 90)),
    "grouped": (nn.Conv2d(32, 64, 3, groups=4), (2, 32, 9, 9)),
    "pointwise": (nn.Conv2d(64, 128, 1), (2, 64, 9, 9)),
    "depthwise": (nn.Conv2d(20, 20, 3, groups=20), (2, 20, 9, 9)),
    "1d": (nn.Conv1d(16, 32, 5, stride=2, padding=1), (2, 16, 41)),
    "1d unbatched": (nn.Conv1d(16, 32, 1), (16, 41)),
    "3d": (nn.Conv3d(8, 16, (1, 3, 3), stride=2), (2, 8, 4, 9, 9)),
    "transposed": (nn.ConvTranspose2d(8, 16, 2, stride=2), (2, 8, 5, 7)),
    "linear": (nn.Linear(24, 64), (2, 5, 24)),
    "vector": (nn.Linear(24, 64), (24,)),
}


def call_of(layer, shape, width=16):
    return leaf_call(f"{layer} {shape}", vars(layer), shape, width)


@pytest.mark.parametrize("name", list(SHAPES))
def test_work_of_aligned_layers_is_what_they_do(name):
    layer, shape = SHAPES[name]
    with torch.no_grad():
        output = layer(torch.zeros(shape))
    calls, macs, weights, activations, _ = call_of(layer, shape).work
    assert calls == 1
    assert macs == dense_macs(layer, shape)
    assert weights == layer.weight.numel()
    assert activations == math.prod(shape) + output.numel()


@pytest.mark.parametrize(
    ("layer", "gates", "shape"),
    [
        (nn.LSTM(24, 32, 3, bidirectional=True), 4, (7, 2, 24)),
        (nn.GRU(24, 16, 2, batch_first=True), 3, (2, 7, 24)),
        (nn.RNN(24, 16), 1, (7, 24)),
        (nn.LSTMCell(24, 16), 4, (14, 24)),
        (nn.GRUCell(24, 16), 3, (24,)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_work_of_recurrent_layers_is_that_of_their_matrices(layer, gates, shape):
    matrices = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)
    call = leaf_call("", {**vars(layer), "gates": gates}, shape, 16)
    assert call.work[1:3] == (math.prod(shape[:-1]) * matrices, matrices)
    assert call.kind == "recurrent"


@pytest.mark.parametrize(("width", "padded"), [(16, 32), (8, 24)])
def test_output_channels_count_in_whole_vectors(width, padded):
    for layer, shape in ((nn.Conv2d(5, 17, 1), (2, 5, 4, 4)), (nn.Linear(5, 17), (32, 5))):
        assert call_of(layer, shape, width).work[1] == 32 * 5 * padded
    groups = nn.Conv2d(10, 34, 1, groups=2)
    assert call_of(groups, (2, 10, 4, 4), width).work[1] == 2 * 32 * 5 * padded


def test_kinds_of_calls():
    kinds = {name: call_of(*case).kind for name, case in SHAPES.items()}
    assert kinds["conv"] == kinds["grouped"] == "spatial"
    assert kinds["pointwise"] == "pointwise"
    assert kinds["depthwise"] == "depthwise"
    assert (kinds["1d"], kinds["1d unbatched"], kinds["3d"]) == ("spatial, 1d", "pointwise, 1d", "spatial, 3d")
    assert kinds["transposed"] == "spatial, transposed"
    assert kinds["linear"] == kinds["vector"] == "linear"
    assert call_of(nn.Conv2d(20, 20, 3), (1, 20, 32, 32)).kind == "spatial, small"
    assert call_of(nn.Conv2d(20, 20, 3), (1, 20, 33, 33)).kind == "spatial"


def synthetic(channels, seconds):
    """Timings of 1 x 1 convolutions by a known formula."""
    timings = {}
    for inn, out, size in channels:
        call = call_of(nn.Conv2d(inn, out, 1, device="meta"), (2, inn, size, size))
        timings[call] = seconds(np.array(call.work))
    return timings


KNOWN = np.array([0.03, 2e-8, 3e-7, 1e-7, 0.0])
GRID = [(i, o, s) for i in (16, 48, 96) for o in (16, 20, 64) for s in (7, 14, 28)]


def test_it_finds_the_formula_behind_the_timings():
    model = LatencyModel(synthetic(GRID, lambda work: work @ KNOWN))
    assert model.median_error < 1e-3
    for inn, out, size in ((32, 40, 10), (128, 256, 20)):
        call = call_of(nn.Conv2d(inn, out, 1), (2, inn, size, size))
        assert model.milliseconds(call) == pytest.approx(np.array(call.work) @ KNOWN, rel=0.01)


def test_a_few_wild_timings_change_little():
    timings = synthetic(GRID, lambda work: work @ KNOWN)
    for call in list(timings)[::9]:
        timings[call] *= 10
    call = call_of(nn.Conv2d(256, 512, 1), (2, 256, 30, 30))
    assert LatencyModel(timings).milliseconds(call) == pytest.approx(np.array(call.work) @ KNOWN, rel=0.05)


def test_one_channel_above_a_vector_costs_the_next_one():
    model = LatencyModel(synthetic(GRID, lambda work: work @ (KNOWN * [1, 1, 0, 0, 0])))
    times = [model.milliseconds(call_of(nn.Conv2d(32, out, 1), (2, 32, 56, 56))) for out in (48, 49, 64)]
    assert times[1] == pytest.approx(times[2], rel=0.01)
    assert times[1] > 1.25 * times[0]


def test_timed_calls_take_what_they_took():
    timings = synthetic(GRID, lambda work: work @ KNOWN)
    odd = next(iter(timings))
    timings[odd] = 123.0
    assert LatencyModel(timings).milliseconds(odd) == 123.0


def test_near_timings_correct_the_formula():
    slow = [(i, o, 28) for i, o, _ in GRID]
    timings = synthetic(GRID, lambda work: work @ KNOWN)
    for call in synthetic(slow, lambda work: 0.0):
        timings[call] *= 3
    model = LatencyModel(timings)
    near = call_of(nn.Conv2d(48, 48, 1), (2, 48, 28, 28))
    plain = np.array(near.work) @ KNOWN
    assert 1.7 * plain < model.milliseconds(near) < 3.3 * plain


def test_kinds_without_timings_follow_the_others():
    model = LatencyModel(synthetic(GRID, lambda work: work @ KNOWN))
    call = call_of(nn.Conv2d(64, 64, 3, padding=1), (2, 64, 14, 14))
    assert model.milliseconds(call) == pytest.approx(np.array(call.work)[:4] @ KNOWN[:4], rel=0.05)


def test_a_special_kind_with_few_timings_is_the_general_one_times_a_factor():
    timings = synthetic(GRID, lambda work: work @ KNOWN)
    few = synthetic([(32, 32, 14), (64, 64, 14), (80, 48, 20)], lambda work: 0.5 * work @ KNOWN)
    timings |= {special(call): time for call, time in few.items()}
    model = LatencyModel(timings)
    for shape in ((24, 96, 9), (128, 128, 28)):
        plain = call_of(nn.Conv2d(*shape[:2], 1), (2, shape[0], *2 * shape[2:]))
        expected = np.array(plain.work) @ KNOWN
        assert model.milliseconds(plain) == pytest.approx(expected, rel=0.02)
        assert model.milliseconds(special(plain)) == pytest.approx(0.5 * expected, rel=0.02)


def test_kinds_that_are_special_in_the_same_way_do_not_mix():
    """The general kind is fitted to its own timings, not to those of the special ones."""
    timings = synthetic(GRID, lambda work: work @ KNOWN)
    timings |= {special(call): 9 * time for call, time in timings.items()}
    call = call_of(nn.Conv2d(128, 128, 1), (2, 128, 28, 28))
    expected = np.array(call.work) @ KNOWN
    model = LatencyModel(timings)
    assert model.milliseconds(call) == pytest.approx(expected, rel=0.02)
    assert model.milliseconds(special(call)) == pytest.approx(9 * expected, rel=0.02)


def special(call):
    return dataclasses.replace(call, key=f"special {call.key}", kind=f"{call.kind}, special")


def test_stages_in_turn_cost_a_call():
    timings = {between_stages(f"{n} stages"): 0.02 for n in range(6)}
    assert LatencyModel(timings).milliseconds(between_stages("another")) == pytest.approx(0.02)


def test_without_timings_it_knows_nothing_but_answers():
    model = LatencyModel({})
    assert math.isnan(model.median_error)
    assert model.milliseconds(LeafCall("any", "linear", (1.0, 5.0, 5.0, 5.0, 0.0), (0.0,) * 4)) > 0


@pytest.mark.parametrize(("capability", "width"), [("AVX512", 16), ("AVX2", 8), ("DEFAULT", 8)])
def test_vector_width_follows_the_processor(monkeypatch, capability, width):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert vector_width(torch.device("cpu")) == width
    assert vector_width(torch.device("cuda")) == 8
