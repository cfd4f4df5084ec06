import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_nn.decompose import evbmf_rank
from lowrank_nn.errors import OptionError, RankError
from lowrank_nn.layers import VBMF, Energy, Params, SpeedUp, SVDConv2d, SVDLinear, TuckerConv2d, read_layer
from tests.layers.geometries import dense_conv


def k_max(n, kernel, times):
    """The closed form of Tucker-2 with C_out = n C_in and both ranks k C_in."""
    per_tap = (n + 1) / kernel**2
    return (math.sqrt(per_tap**2 + 4 * n / times) - per_tap) / 2


def noisy_low_rank(rows, columns, rank, noise=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    product = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    return product + noise * torch.randn(rows, columns, generator=generator)


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def chosen(cls, layer, rule, **options):
    """The rule's answer, one rank per mode, before it is put in the form that the constructor takes."""
    return rule.choose(cls.rank_problem(read_layer(layer, cls), **options))


def test_the_closed_form_has_the_published_value():
    assert math.floor(1000 * k_max(1, 3, 2)) == 604


@pytest.mark.parametrize("times", [2, 3, 5])
@pytest.mark.parametrize("n", [0.5, 1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_speed_up_of_tucker_is_the_closed_form(n, kernel, times):
    width = 200
    layer = nn.Conv2d(width, int(n * width), kernel, padding=kernel // 2, device="meta")
    expected = k_max(n, kernel, times)
    assert expected < min(n, 1), "the closed form holds as long as both modes are cut"
    out, inn = chosen(TuckerConv2d, layer, SpeedUp(times))
    assert out == inn == math.floor(expected * width)


def test_speed_up_two_of_a_square_3x3_kernel_leaves_604_of_1000_channels():
    layer = nn.Conv2d(1000, 1000, 3, padding=1, device="meta")
    assert chosen(TuckerConv2d, layer, SpeedUp(2)) == (604, 604)


@pytest.mark.parametrize("cls", [TuckerConv2d, SVDConv2d])
@pytest.mark.parametrize("stride", [1, 2])
def test_speed_up_is_met_on_a_real_call(cls, stride):
    dense = dense_conv(torch.float32, in_channels=24, out_channels=32, kernel_size=3, padding=1, stride=stride)
    compressed = cls.from_pretrained_layer(dense, rank=SpeedUp(3))
    input_shape = (2, 24, 16, 16)
    dense_macs = 24 * 32 * 9 * 2 * (16 // stride) ** 2
    assert dense_macs / compressed.cost(input_shape).macs >= 3


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.05, 1.0))
def test_params_of_a_matrix_never_exceed_the_share_and_are_the_most(rows, columns, share):
    layer = nn.Linear(columns, rows, bias=False)
    allowed, per_rank = share * rows * columns, rows + columns
    if per_rank > allowed:
        with pytest.raises(RankError, match="even rank 1 needs more"):
            SVDLinear.from_pretrained_layer(layer, rank=Params(share))
        return
    rank = SVDLinear.from_pretrained_layer(layer, rank=Params(share)).rank
    assert rank * per_rank <= allowed
    assert rank == min(rows, columns) or (rank + 1) * per_rank > allowed


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 3),
    st.sampled_from([(3, 3), (1, 5), (2, 2)]),
    st.floats(0.05, 0.95),
)
def test_params_of_tucker_never_exceed_the_share_and_are_the_most(out, inn, groups, kernel_size, share):
    arguments = (inn * groups, out * groups, kernel_size)
    layer = nn.Conv2d(*arguments, groups=groups, bias=False)
    taps = math.prod(kernel_size)
    limits = min(out, inn * taps), min(inn, out * taps)
    every = []
    for rank in range(1, max(limits)):
        pair = tuple(rank if rank < limit else None for limit in limits)
        built = TuckerConv2d(*arguments, groups=groups, bias=False, rank=pair, device="meta")
        every.append(sum(p.numel() for p in built.parameters()))
    fitting = [params for params in every if params <= share * layer.weight.numel()]
    if not fitting:
        with pytest.raises(RankError, match="even rank 1 needs more"):
            TuckerConv2d.from_pretrained_layer(layer, rank=Params(share))
        return
    compressed = TuckerConv2d.from_pretrained_layer(layer, rank=Params(share))
    assert sum(p.numel() for p in compressed.parameters()) == max(fitting)


@given(st.integers(0, 1000), st.floats(0.05, 1.0))
def test_energy_keeps_its_share_and_no_more_than_it_must(seed, share):
    weight = noisy_low_rank(12, 17, 4, noise=0.3, seed=seed).double()
    rank = SVDLinear.from_pretrained_layer(linear(weight), rank=Energy(share)).rank
    energy = np.linalg.svd(weight.numpy(), compute_uv=False) ** 2
    kept = energy.cumsum() / energy.sum()
    assert kept[rank - 1] >= share - 1e-9
    assert rank == 1 or kept[rank - 2] < share


def test_energy_of_tucker_counts_each_unfolding_over_all_groups():
    layer = dense_conv(in_channels=12, out_channels=16, kernel_size=3, groups=2)
    ranks = chosen(TuckerConv2d, layer, Energy(0.8))
    halves = [half.numpy() for half in layer.weight.detach().chunk(2)]
    for rank, axes in zip(ranks, ((0, 1, 2, 3), (1, 0, 2, 3)), strict=True):
        energy = sum(
            np.linalg.svd(half.transpose(axes).reshape(half.shape[axes[0]], -1), compute_uv=False) ** 2
            for half in halves
        )
        kept = energy.cumsum() / energy.sum()
        assert kept[rank - 1] >= 0.8 > kept[rank - 2]


def test_energy_one_is_full_rank_of_an_exactly_low_rank_weight():
    weight = noisy_low_rank(12, 17, 4, noise=0).double()
    assert SVDLinear.from_pretrained_layer(linear(weight), rank=Energy(1 - 1e-9)).rank == 4


def test_vbmf_finds_the_rank_under_the_noise():
    layer = linear(noisy_low_rank(40, 60, 7))
    assert SVDLinear.from_pretrained_layer(layer, rank=VBMF()).rank == 7


@pytest.mark.parametrize("weaken", [0.8, 0.5, 0.1])
def test_weakened_vbmf_lies_between_vbmf_and_full_rank(weaken):
    layer = linear(noisy_low_rank(40, 60, 7))
    rank = SVDLinear.from_pretrained_layer(layer, rank=VBMF(weaken=weaken)).rank
    assert rank == math.ceil(40 - weaken * (40 - 7))
    assert 7 < rank < 40


def test_vbmf_of_tucker_estimates_both_unfoldings():
    layer = dense_conv(torch.float32, in_channels=24, out_channels=32, kernel_size=3)
    generator = torch.Generator().manual_seed(0)
    out, inn = torch.randn(32, 5, generator=generator), torch.randn(24, 3, generator=generator)
    core = torch.randn(5, 3, 3, 3, generator=generator)
    with torch.no_grad():
        layer.weight.mul_(0.02).add_(torch.einsum("oa,abhw,ib->oihw", out, core, inn))
    kernel = layer.weight.detach()
    expected = (evbmf_rank(kernel.flatten(1)), evbmf_rank(kernel.transpose(0, 1).flatten(1)))
    assert expected == (5, 3)
    assert TuckerConv2d.from_pretrained_layer(layer, rank=VBMF()).rank == expected


def test_vbmf_of_noise_is_an_error():
    generator = torch.Generator().manual_seed(0)
    layer = linear(torch.randn(40, 60, generator=generator))
    with pytest.raises(RankError, match=r"SVDLinear: VBMF finds no low-rank structure .* Leave the layer dense"):
        SVDLinear.from_pretrained_layer(layer, rank=VBMF())


def test_a_demand_that_no_rank_meets_is_an_error():
    with pytest.raises(RankError, match=r"TuckerConv2d: Params\(share=0.001\) cannot be met"):
        TuckerConv2d.from_pretrained_layer(dense_conv(kernel_size=3), rank=Params(0.001))
    with pytest.raises(RankError, match=r"SVDLinear: SpeedUp\(times=100\) cannot be met"):
        SVDLinear.from_pretrained_layer(nn.Linear(8, 8), rank=SpeedUp(100))


@pytest.mark.parametrize(
    ("rule", "value", "message"),
    [
        (Params, 0, "Params: share must be above 0 and at most 1, got 0"),
        (Params, 1.2, "Params: share must be above 0 and at most 1, got 1.2"),
        (Energy, float("nan"), "Energy: share must be above 0 and at most 1, got nan"),
        (VBMF, 0.0, "VBMF: weaken must be above 0 and at most 1, got 0.0"),
        (SpeedUp, 0.5, "SpeedUp: times must be a finite number from 1 up, got 0.5"),
        (SpeedUp, float("inf"), "SpeedUp: times must be a finite number from 1 up, got inf"),
    ],
)
def test_rules_refuse_senseless_values(rule, value, message):
    with pytest.raises(OptionError, match=message):
        rule(value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SVDLinear(30, 40, rank=Params(0.3)),
        lambda: SVDConv2d(16, 16, 3, rank=VBMF()),
        lambda: TuckerConv2d(16, 16, 3, rank=(Energy(0.9), 4)),
    ],
)
def test_layers_made_from_scratch_need_numbers(make):
    with pytest.raises(RankError, match=r"must be an integer here, got .*from_pretrained_layer\(layer, rank=\.\.\.\)"):
        make()
