"""The allocation against brute force over all choices."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_nn.planning import Choices, allocate


def total(layers, chosen):
    error = sum(layer.errors[i] for layer, i in zip(layers, chosen, strict=True))
    return error, np.sum([layer.costs[i] for layer, i in zip(layers, chosen, strict=True)], axis=0)


def every_choice(layers):
    return itertools.product(*(range(len(layer.errors)) for layer in layers))


def brute_force(layers, allowed):
    """The smallest error of any choice that fits; None if none fits."""
    totals = [total(layers, chosen) for chosen in every_choice(layers)]
    return min((error for error, cost in totals if (cost <= allowed).all()), default=None)


def best_of_one_multiplier(layers, allowed):
    """The smallest error of a choice that fits and comes from one price per unit of cost for all layers."""
    multipliers = {0.0, 1e9}
    for layer in layers:
        cost = layer.costs[:, 0]
        for i, j in itertools.combinations(range(len(cost)), 2):
            if cost[i] != cost[j]:
                multipliers.add((layer.errors[i] - layer.errors[j]) / (cost[j] - cost[i]))
    edges = sorted(m for m in multipliers if m >= 0)
    between = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    fitting = []
    for multiplier in between:
        chosen = [int(np.argmin(layer.errors + multiplier * layer.costs[:, 0])) for layer in layers]
        error, cost = total(layers, chosen)
        if cost[0] <= allowed[0]:
            fitting.append(error)
    return min(fitting, default=None)


@st.composite
def problems(draw, entries):
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 5))
        errors = draw(st.lists(st.integers(0, 50), min_size=count, max_size=count))
        costs = draw(st.lists(st.integers(1, 40), min_size=count * entries, max_size=count * entries))
        layers.append(Choices(np.array(errors) / 50, np.array(costs, dtype=float).reshape(count, entries)))
    allowed = draw(st.lists(st.integers(1, 120), min_size=entries, max_size=entries))
    return layers, np.array(allowed, dtype=float)


@st.composite
def tight_problems(draw, entries):
    """Problems with a budget that some choice spends to the last unit."""
    layers, _ = draw(problems(entries))
    chosen = [draw(st.integers(0, len(layer.errors) - 1)) for layer in layers]
    return layers, total(layers, chosen)[1]


@given(problems(entries=1))
def test_one_entry(problem):
    layers, allowed = problem
    chosen, best = allocate(layers, allowed), brute_force(layers, allowed)
    if best is None:
        assert chosen is None
        return
    error, cost = total(layers, chosen)
    assert (cost <= allowed).all()
    assert error >= best - 1e-12
    single = best_of_one_multiplier(layers, allowed)
    assert single is None or error <= single + 1e-9
    # The hull leaves at most one layer between two of its corners, so the gap is within what one layer can lose.
    assert error <= best + max(np.ptp(layer.errors) for layer in layers) + 1e-9


@given(st.one_of(problems(entries=2), problems(entries=3), tight_problems(entries=2), tight_problems(entries=3)))
def test_several_entries(problem):
    layers, allowed = problem
    chosen, best = allocate(layers, allowed), brute_force(layers, allowed)
    assert (chosen is None) == (best is None)
    if chosen is not None:
        error, cost = total(layers, chosen)
        assert (cost <= allowed).all()
        assert error >= best - 1e-12


def test_several_entries_at_once_are_near_the_optimum():
    rng = np.random.default_rng(0)
    excess = []
    for _ in range(60):
        sizes = rng.integers(3, 6, size=4)
        layers = [Choices(rng.uniform(size=n), rng.uniform(1, 40, size=(n, 2))) for n in sizes]
        allowed = np.sum([layer.costs.mean(axis=0) for layer in layers], axis=0)
        chosen = allocate(layers, allowed)
        excess.append(total(layers, chosen)[0] - brute_force(layers, allowed))
    assert np.mean(np.array(excess) < 1e-9) > 0.9
    assert np.mean(excess) < 0.02


@given(problems(entries=3), st.integers(1, 3))
def test_proportional_entries_act_as_one(problem, factor):
    layers, allowed = problem
    layers = [Choices(c.errors, np.stack([c.costs[:, 0], factor * c.costs[:, 0]], axis=1)) for c in layers]
    allowed = allowed[0] * np.array([1, factor])
    chosen = allocate(layers, allowed)
    alone = allocate([Choices(c.errors, c.costs[:, :1]) for c in layers], allowed[:1])
    assert (chosen is None) == (alone is None)
    if chosen is not None:
        assert total(layers, chosen)[0] == pytest.approx(total(layers, alone)[0])


def convex_layer(size, spectrum):
    """Errors of truncating a falling spectrum, the cost one unit per rank: every candidate is on the hull."""
    tails = np.append(np.cumsum(spectrum[::-1])[::-1], 0.0)
    return Choices(tails, size * np.arange(len(tails), dtype=float)[:, None])


@pytest.mark.parametrize("allowed", range(13))
def test_equal_to_brute_force_on_the_hull(allowed):
    # Equal unit costs: the best choice takes the largest values of all spectra, for every budget.
    layers = [convex_layer(1, np.array(s)) for s in ([9.0, 4, 1, 0.1], [8.0, 5, 0.5, 0.2], [3.0, 2, 0.9, 0.05])]
    chosen = allocate(layers, np.array([float(allowed)]))
    assert total(layers, chosen)[0] == pytest.approx(brute_force(layers, np.array([allowed])))


def test_what_the_hull_leaves_is_spent():
    # The middle candidate is off the hull: no multiplier picks it, but it fits what is left.
    layer = Choices(np.array([0.0, 0.6, 1.0]), np.array([[10.0], [9.0], [0.0]]))
    assert allocate([layer], np.array([9.0])) == [1]


def test_ties_go_to_the_cheaper_candidate():
    layer = Choices(np.array([0.0, 0.0, 0.0]), np.array([[9.0], [4.0], [6.0]]))
    assert allocate([layer, layer], np.array([100.0])) == [1, 1]


def test_the_second_entry_binds():
    layer = Choices(np.array([0.0, 0.1, 0.5]), np.array([[1.0, 10.0], [2.0, 5.0], [9.0, 1.0]]))
    assert allocate([layer], np.array([9.0, 5.0])) == [1]
    assert allocate([layer], np.array([9.0, 1.0])) == [2]
    assert allocate([layer], np.array([8.0, 1.0])) is None


def test_no_layers():
    assert allocate([], np.array([0.0, 5.0])) == []
    assert allocate([], np.array([-1.0])) is None


def test_a_budget_below_zero_fits_nothing():
    assert allocate([Choices(np.array([0.0]), np.array([[1.0]]))], np.array([-3.0])) is None


def test_errors_of_every_size_in_one_problem():
    # The k-th unit of any layer saves 10^(6 - k / 3): the best choice takes the largest savings, whatever the budget.
    savings = 10.0 ** (6 - np.arange(54) / 3)
    layers = [convex_layer(1, savings[first::3]) for first in range(3)]
    for allowed in range(0, 55, 6):
        chosen = allocate(layers, np.array([float(allowed)]))
        assert total(layers, chosen)[1] == allowed
        assert chosen == [(allowed + 2) // 3, (allowed + 1) // 3, allowed // 3]


def test_many_layers_and_entries_take_no_time():
    rng = np.random.default_rng(0)
    layers = []
    for _ in range(60):
        costs = np.sort(rng.uniform(size=300))[:, None] * 10 ** rng.uniform(3, 6) * np.exp(rng.normal(0, 0.5, (300, 3)))
        layers.append(Choices(10 ** rng.uniform(-3, 3) * rng.uniform(size=300), costs))
    allowed = 0.3 * np.sum([layer.costs.max(axis=0) for layer in layers], axis=0)
    start = time.process_time()
    chosen = allocate(layers, allowed)
    assert time.process_time() - start < 2
    assert (total(layers, chosen)[1] <= allowed * (1 + 1e-9)).all()


def test_costs_of_real_networks_scale_no_differently():
    spectra = [np.array([9.0, 4, 1, 0.1]), np.array([8.0, 5, 0.5, 0.2])]
    small = allocate([convex_layer(1, s) for s in spectra], np.array([4.0]))
    huge = allocate([convex_layer(1e9, s) for s in spectra], np.array([4e9]))
    tiny_errors = allocate([convex_layer(1e9, 1e-9 * s) for s in spectra], np.array([4e9]))
    assert small == huge == tiny_errors
