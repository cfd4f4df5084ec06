"""The named allocation rules against brute force over what each promises."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_nn.graph import record
from lowrank_nn.layers import VBMF, CPConv2d, SVDConv2d, SVDLinear, TuckerConv2d
from lowrank_nn.planning import Budget, Choices
from lowrank_nn.planning.baselines import alds_candidates, musco_candidates
from lowrank_nn.planning.rules import ALLOCATIONS, min_max, same_level, uniform
from tests.planning.test_allocation import brute_force, problems, tight_problems, total

RULES = [uniform, min_max, same_level]
ONE_OR_TWO = st.one_of(problems(entries=1), problems(entries=2), tight_problems(entries=2))


@pytest.mark.parametrize("rule", RULES)
@given(ONE_OR_TWO)
def test_within_the_budget_wherever_that_is_possible(rule, problem):
    layers, allowed = problem
    chosen = rule(layers, allowed)
    assert (chosen is None) == (brute_force(layers, allowed) is None)
    if chosen is not None:
        assert (total(layers, chosen)[1] <= allowed).all()


@pytest.mark.parametrize("rule", RULES)
@given(problems(entries=1), st.integers(1, 60))
def test_a_larger_budget_is_never_worse(rule, problem, more):
    layers, allowed = problem
    few, many = rule(layers, allowed), rule(layers, allowed + more)
    if few is None:
        return
    before = [layer.errors[i] for layer, i in zip(layers, few, strict=True)]
    after = [layer.errors[i] for layer, i in zip(layers, many, strict=True)]
    assert max(after) <= max(before)
    if rule is not min_max:
        assert (np.array(after) <= before).all()


@given(problems(entries=1))
def test_min_max_is_the_smallest_largest_error(problem):
    layers, allowed = problem
    chosen = min_max(layers, allowed)
    every = itertools.product(*(range(len(layer.errors)) for layer in layers))
    largest = [
        max(layer.errors[i] for layer, i in zip(layers, picks, strict=True))
        for picks in every
        if (total(layers, picks)[1] <= allowed).all()
    ]
    if chosen is None:
        assert not largest
        return
    worst = max(layer.errors[i] for layer, i in zip(layers, chosen, strict=True))
    assert worst == min(largest)
    for layer, i in zip(layers, chosen, strict=True):  # and no layer pays for less error than that
        under = layer.errors <= max(worst, layer.errors.min())
        assert layer.costs[i, 0] == layer.costs[under, 0].min()


@given(problems(entries=1))
def test_uniform_is_the_largest_share_that_fits(problem):
    layers, allowed = problem
    chosen = uniform(layers, allowed)
    if chosen is None:
        return
    fitting = []
    for share in sorted({cost / layer.costs.max() for layer in layers for cost in layer.costs[:, 0]}):
        picks = []
        for layer in layers:
            costs = layer.costs[:, 0]
            under = np.flatnonzero(costs <= max(share * costs.max() * (1 + 1e-12), costs.min()))
            picks.append(int(under[np.lexsort((costs[under], layer.errors[under]))[0]]))
        if total(layers, picks)[1][0] <= allowed[0]:
            fitting = picks
    assert total(layers, chosen)[0] == pytest.approx(total(layers, fitting)[0])


def test_uniform_keeps_one_share_of_layers_of_all_sizes():
    sizes, ranks = (10, 1000, 70), np.arange(101.0)
    layers = [Choices(1 - ranks / 100, size * ranks[:, None]) for size in sizes]
    assert uniform(layers, np.array([0.37 * 100 * sum(sizes)])) == [37, 37, 37]
    twice = [Choices(layer.errors, np.hstack([layer.costs, layer.costs**2])) for layer in layers]
    whole = np.sum([layer.costs.max(axis=0) for layer in twice], axis=0)
    assert uniform(twice, whole * [0.5, 0.09]) == [30, 30, 30]


def test_same_level_turns_one_dial():
    dial = np.arange(11) / 10
    layers = [Choices(dial, (10 - size * np.arange(11.0))[:, None]) for size in (1, 0.5)]
    layers.append(Choices(np.array([0.0]), np.array([[5.0]])))  # cannot be changed
    assert same_level(layers, np.array([19.0])) == [4, 4, 0]
    assert same_level(layers, np.array([25.0])) == [0, 0, 0]
    assert same_level(layers, np.array([9.0])) is None


@pytest.mark.parametrize("name", list(ALLOCATIONS))
def test_no_layers(name):
    assert ALLOCATIONS[name].choose([], np.array([1.0])) == []
    assert ALLOCATIONS[name].choose([], np.array([-1.0])) is None


def falling(layer, seed=0):
    """The layer with a falling spectrum and some noise, as after training."""
    generator = torch.Generator().manual_seed(seed)
    out, size = layer.weight.shape[0], layer.weight[0].numel()
    low = torch.randn(out, 6, generator=generator) @ torch.randn(6, size, generator=generator)
    with torch.no_grad():
        layer.weight.copy_((low + 0.1 * torch.randn(out, size, generator=generator)).reshape(layer.weight.shape))
    return layer


def candidates(make, layer, inputs, classes):
    return make(record(layer, inputs).sites[0], layer, classes)


CONV, IMAGES = falling(nn.Conv2d(16, 24, 3)), torch.ones(2, 16, 8, 8)


def operator_norm(weight, order):
    """Of the kernel as the matrix that each order of SVDConv2d splits."""
    matrix = weight if order == "spatial_first" else weight.transpose(0, 1)
    return np.linalg.norm(matrix.flatten(1).double().numpy(), 2)


def test_alds_compares_relative_operator_norms():
    table = candidates(alds_candidates, CONV, IMAGES, (SVDConv2d, TuckerConv2d, CPConv2d))
    assert {c.layer_class for c in table.candidates} == {None, SVDConv2d}
    weight = CONV.weight.detach()
    for candidate in table.candidates[1::3]:
        change = weight - SVDConv2d.from_pretrained_layer(CONV, **candidate.options).dense_weight().detach()
        order = candidate.options["order"]
        ratio = operator_norm(change, order) / operator_norm(weight, order)
        assert candidate.compared == pytest.approx(ratio, rel=1e-3)
        assert candidate.error == pytest.approx(float(change.square().sum() / weight.square().sum()), rel=1e-3)
    np.testing.assert_array_equal(table.choices(Budget(macs=0.5)).errors, [c.compared for c in table.candidates])


def test_alds_of_groups_compares_the_worst():
    layer = falling(nn.Conv2d(16, 24, 3, groups=2))
    table = candidates(alds_candidates, layer, IMAGES, (SVDConv2d,))
    weight = layer.weight.detach()
    for candidate in table.candidates[1::4]:
        change = weight - SVDConv2d.from_pretrained_layer(layer, **candidate.options).dense_weight().detach()
        order = candidate.options["order"]
        left = max(operator_norm(block, order) for block in change.chunk(2))
        whole = max(operator_norm(block, order) for block in weight.chunk(2))
        assert candidate.compared == pytest.approx(left / whole, rel=1e-3)


def test_alds_of_formats_that_split_no_matrix():
    table = candidates(alds_candidates, CONV, IMAGES, (TuckerConv2d,))
    assert len(table.candidates) == 1
    assert "SVDConv2d" in table.note


@pytest.mark.parametrize("layer", [CONV, falling(nn.Conv2d(16, 24, 1)), falling(nn.Linear(40, 30))], ids=str)
def test_musco_ranks_are_those_of_the_weakened_rule(layer):
    inputs = torch.ones(2, 40) if isinstance(layer, nn.Linear) else IMAGES
    table = candidates(musco_candidates, layer, inputs, (TuckerConv2d, SVDConv2d, SVDLinear))
    assert table.candidates[0].compared == 0
    assert table.candidates[-1].compared > 0.5
    for candidate in table.candidates[1:]:
        new = candidate.layer_class.from_pretrained_layer(layer, rank=VBMF(weaken=candidate.compared))
        assert new.rank == candidate.options["rank"]
        bias = layer.bias.numel()
        assert candidate.cost.params == new.cost(inputs.shape).params - bias
        assert candidate.cost.macs == new.cost(inputs.shape).macs
        change = (new.dense_weight() - layer.weight).detach()
        error = float(change.square().sum() / layer.weight.detach().square().sum())
        assert error <= candidate.error * 1.01 + 1e-6
    kind = {nn.Linear: SVDLinear}.get(type(layer), SVDConv2d if layer.weight.shape[-1] == 1 else TuckerConv2d)
    assert {c.layer_class for c in table.candidates[1:]} == {kind}


def test_musco_rounds_ranks_up():
    site = record(CONV, IMAGES).sites[0]
    table = musco_candidates(site, CONV, (TuckerConv2d,), multiple=8)
    ranks = [rank for c in table.candidates[1:] for rank in c.options["rank"] if rank is not None]
    assert ranks
    assert all(rank % 8 == 0 for rank in ranks)


@pytest.mark.parametrize("make", [alds_candidates, musco_candidates])
def test_a_layer_that_no_format_can_read_stays_dense_with_the_reason(make):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(20, 12))
    table = candidates(make, layer, torch.ones(1, 20), (SVDLinear,))
    assert len(table.candidates) == 1
    assert "parametrized" in table.note


def test_musco_of_noise():
    layer = nn.Linear(60, 60)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(60, 60, generator=torch.Generator().manual_seed(0)))
    table = candidates(musco_candidates, layer, torch.ones(1, 60), (SVDLinear,))
    assert len(table.candidates) == 1
    assert "VBMF finds no low-rank structure" in table.note
