"""Candidates against the layers that they stand for."""

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_nn.cost import Cost, dense_cost
from lowrank_nn.decompose import Metric
from lowrank_nn.graph import record
from lowrank_nn.layers import CPConv2d, SVDConv2d, SVDLinear, TuckerConv2d
from lowrank_nn.planning import Budget, Candidate, low_rank_candidates
from lowrank_nn.planning.candidates import undominated
from tests.storage.models import seeded

MATRICES = (SVDConv2d, SVDLinear, TuckerConv2d)
LAYERS = {
    "conv": lambda: (nn.Conv2d(8, 12, 3, padding=1), torch.ones(2, 8, 9, 7)),
    "strided": lambda: (nn.Conv2d(8, 12, (3, 5), stride=(2, 1), dilation=(1, 2)), torch.ones(1, 8, 15, 15)),
    "grouped": lambda: (nn.Conv2d(12, 16, 3, groups=2, bias=False), torch.ones(3, 12, 8, 8)),
    "pointwise": lambda: (nn.Conv2d(12, 16, 1), torch.ones(2, 12, 5, 5)),
    "unbatched": lambda: (nn.Conv2d(8, 12, 3), torch.ones(8, 9, 9)),
    "linear": lambda: (nn.Linear(20, 12), torch.ones(2, 5, 20)),
}


def table_of(name, classes=MATRICES):
    layer, inputs = seeded(LAYERS[name])
    with torch.no_grad():  # a falling spectrum, as after training
        weight = layer.weight.flatten(1)
        weight.copy_(weight * torch.linspace(3, 0.1, weight.shape[1]))
    site = record(layer, inputs).sites[0]
    return layer, inputs, low_rank_candidates(site, layer, classes)


@pytest.fixture(scope="module", params=list(LAYERS))
def case(request):
    return table_of(request.param)


def test_costs_are_those_of_the_built_layer(case):
    layer, inputs, table = case
    assert len(table.candidates) > 3
    bias = 0 if layer.bias is None else layer.bias.numel()
    for candidate in table.candidates[1:]:
        new = candidate.layer_class.from_pretrained_layer(layer, **candidate.options)
        cost = new.cost(inputs.shape)
        assert (candidate.cost.params, candidate.cost.macs) == (cost.params - bias, cost.macs)
        assert candidate.cost.bytes == cost.bytes - 4 * bias
        assert candidate.cost.nonzeros == candidate.cost.params


def test_errors_are_those_of_the_built_layer(case):
    layer, _, table = case
    weight = layer.weight.detach().double()
    for candidate in table.candidates[1:]:
        new = candidate.layer_class.from_pretrained_layer(layer, **candidate.options)
        error = float((new.weight.detach().double() - weight).square().sum() / weight.square().sum())
        if candidate.layer_class is TuckerConv2d:  # the table is the HOSVD's; the layer adds sweeps of HOOI
            assert error <= candidate.error * (1 + 1e-4) + 1e-9
            assert error >= 0.5 * candidate.error - 1e-9
        else:
            assert error == pytest.approx(candidate.error, rel=1e-3, abs=1e-8)


def test_the_dense_layer_comes_first_and_nothing_costs_more(case):
    layer, inputs, table = case
    dense = table.candidates[0]
    cost = dense_cost(layer, inputs.shape)
    bias = 0 if layer.bias is None else layer.bias.numel()
    assert (dense.layer_class, dense.error) == (None, 0.0)
    assert (dense.cost.params, dense.cost.macs, dense.cost.bytes) == (
        cost.params - bias,
        cost.macs,
        cost.bytes - 4 * bias,
    )
    for candidate in table.candidates[1:]:
        assert candidate.cost.params <= dense.cost.params
        assert candidate.cost.macs <= dense.cost.macs
        assert candidate.cost != dense.cost
    assert table.note == ""


def test_no_candidate_beats_another():
    _, _, table = table_of("conv")
    rows = np.array([(c.error, c.cost.params, c.cost.macs) for c in table.candidates[1:]])
    for i, row in enumerate(rows):
        better = (rows <= row).all(axis=1) & (rows < row).any(axis=1)
        assert not better.any(), table.candidates[1 + i]


def test_what_is_equal_or_worse_is_dropped():
    def candidate(error, params, macs):
        return Candidate(SVDLinear, {"rank": params}, error, Cost(params, macs))

    good = [candidate(0.1, 10, 10), candidate(0.2, 5, 20), candidate(0.3, 20, 5)]
    bad = [candidate(0.1, 10, 10), candidate(0.4, 10, 10), candidate(0.2, 11, 10)]
    assert undominated([*bad[:1], *good[1:], *bad[1:]], Budget(params=1, macs=1)) == good


def test_cp_costs_and_errors():
    layer, inputs, table = table_of("strided", [CPConv2d])
    weight = layer.weight.detach()
    assert len(table.candidates) > 2
    for candidate in table.candidates[1:3]:
        new = CPConv2d.from_pretrained_layer(layer, **candidate.options)
        cost = new.cost(inputs.shape)
        assert (candidate.cost.params, candidate.cost.macs) == (cost.params - 12, cost.macs)
        error = float((new.weight.detach() - weight).square().sum() / weight.square().sum())
        assert error <= candidate.error * 1.05 + 1e-6  # the table's fits are short ones


def test_a_layer_called_twice_costs_twice():
    layer, inputs = seeded(LAYERS["linear"])
    model = nn.Sequential(layer, nn.Linear(12, 20), layer)
    site = record(model, inputs)["0"]
    table = low_rank_candidates(site, layer, [SVDLinear])
    assert table.candidates[0].cost.macs == 2 * 10 * 240
    assert all(c.cost.macs == 10 * 2 * c.cost.params for c in table.candidates)


def test_why_there_are_none():
    tiny = nn.Conv2d(1, 1, 1)
    table = low_rank_candidates(record(tiny, torch.ones(1, 1, 2, 2)).sites[0], tiny, MATRICES)
    assert len(table.candidates) == 1
    assert table.note == "no format at any rank is smaller"
    broken = nn.Linear(20, 12)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    table = low_rank_candidates(record(broken, torch.ones(1, 20)).sites[0], broken, MATRICES)
    assert len(table.candidates) == 1
    assert "NaN" in table.note


def test_a_parametrized_layer_stays_dense_with_the_reason():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(20, 12))
    table = low_rank_candidates(record(layer, torch.ones(1, 20)).sites[0], layer, MATRICES)
    assert len(table.candidates) == 1
    assert "parametrized" in table.note


def test_a_zero_weight():
    layer = nn.Linear(20, 12)
    nn.init.zeros_(layer.weight)
    table = low_rank_candidates(record(layer, torch.ones(1, 20)).sites[0], layer, MATRICES)
    assert all(c.error == 0 for c in table.candidates)
    assert np.isfinite(table.choices(Budget(params=0.5)).errors).all()


def test_choices_add_up_to_the_product_of_energies_kept():
    _, _, table = table_of("linear")
    choices = table.choices(Budget(macs=0.5, params=0.5))
    np.testing.assert_allclose(np.exp(-choices.errors), [1 - c.error for c in table.candidates], rtol=1e-12)
    np.testing.assert_array_equal(choices.costs, [(c.cost.params, c.cost.macs) for c in table.candidates])


def test_of_a_pointwise_kernel_every_format_is_the_plain_svd():
    layer, inputs = seeded(lambda: (nn.Conv2d(12, 16, 1, bias=False), torch.ones(1, 12, 8, 8)))
    root = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    metric = Metric((root @ root.T)[None], torch.zeros(1, 12, dtype=torch.float64))
    site = record(layer, inputs).sites[0]
    weighted = torch.linalg.svdvals(layer.weight.detach().double().flatten(1) @ root).square()
    assert {c.layer_class for c in low_rank_candidates(site, layer, (CPConv2d, SVDConv2d), metric).candidates[1:]} == {
        SVDConv2d
    }
    for cls in (SVDConv2d, CPConv2d, TuckerConv2d):
        candidates = low_rank_candidates(site, layer, (cls,), metric).candidates[1:]
        ranks = [max(r for r in np.atleast_1d(c.options["rank"]) if r is not None) for c in candidates]
        assert set(ranks) >= {1, 2, 3}
        for rank, candidate in zip(ranks, candidates, strict=True):
            assert candidate.error == pytest.approx(float(weighted[rank:].sum() / weighted.sum()), rel=1e-6)
            new = cls.from_pretrained_layer(layer, **candidate.options, metric=metric)
            error = metric.error(layer.weight - new.weight) / metric.error(layer.weight)
            assert error == pytest.approx(candidate.error, rel=1e-4)
