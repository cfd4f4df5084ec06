"""Costs by formula, against torch's own counter of flops."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_nn.cost import Cost, compare_speed, conv_output_size, dense_cost, dense_macs, tensor_cost

DENSE = {
    "linear": (nn.Linear(6, 5), (3, 4, 6)),
    "vector": (nn.Linear(6, 5, bias=False), (6,)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, groups=2), (2, 4, 11)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), (2, 4, 9, 8)),
    "same": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 9, 8)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 9, 8)),
    "unbatched": (nn.Conv2d(4, 6, 3), (4, 9, 8)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6), (1, 6, 7, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=2), (1, 2, 5, 6, 7)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), (2, 4, 5, 6)),
}


@pytest.mark.parametrize("name", list(DENSE))
def test_macs_are_half_of_the_flops(name):
    layer, shape = DENSE[name]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(torch.zeros(shape))
    assert 2 * dense_macs(layer, shape) == counter.get_total_flops()


@pytest.mark.parametrize("name", [n for n in DENSE if n not in ("linear", "vector", "transposed")])
def test_output_sizes(name):
    layer, shape = DENSE[name]
    size = conv_output_size(
        shape[-len(layer.kernel_size) :], layer.kernel_size, layer.stride, layer.padding, layer.dilation
    )
    assert size == tuple(layer(torch.zeros(shape)).shape[-len(size) :])


def test_tensors_count_once_and_alone():
    layer = nn.Linear(6, 5, dtype=torch.bfloat16)
    assert tensor_cost(layer) == Cost(params=35, macs=0, bytes=70, nonzeros=35)
    assert tensor_cost(nn.Sequential(layer)) == Cost()
    norm = nn.BatchNorm2d(4)  # weight, bias; two float buffers and one int64 counter
    assert tensor_cost(norm) == Cost(params=8, bytes=16 * 4 + 8, nonzeros=8)


def test_dense_cost_is_the_sum_of_both():
    layer, shape = DENSE["conv2d"]
    assert dense_cost(layer, shape) == tensor_cost(layer) + Cost(macs=dense_macs(layer, shape))
    assert dense_macs(nn.ReLU(), shape) == 0


def test_costs_add_and_subtract():
    one, two = Cost(1, 2, 3, 4), Cost(10, 20, 30, 40)
    assert one + two == Cost(11, 22, 33, 44)
    assert two - one == Cost(9, 18, 27, 36)
    assert sum([one, two], Cost()) - two == one


def test_both_sides_are_timed_in_turn_and_in_both_orders():
    calls = []
    timing = compare_speed(lambda: calls.append("a"), lambda: calls.append("b"), rounds=4, warmup=2)
    rounds = ["".join(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert sorted(rounds) == ["ab"] * 3 + ["ba"] * 3
    assert all(first != second for first, second in itertools.pairwise(rounds))
    assert timing.first >= 0
    assert timing.ratio > 0
