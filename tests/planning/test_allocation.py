"""The allocation against brute force over all choices."""

import itertools

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


@given(problems(entries=2))
def test_two_entries_are_never_overspent(problem):
    layers, allowed = problem
    chosen, best = allocate(layers, allowed), brute_force(layers, allowed)
    if best is None:
        assert chosen is None
    elif chosen is not None:
        error, cost = total(layers, chosen)
        assert (cost <= allowed).all()
        assert error >= best - 1e-12


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


def test_costs_of_real_networks_scale_no_differently():
    spectra = [np.array([9.0, 4, 1, 0.1]), np.array([8.0, 5, 0.5, 0.2])]
    small = allocate([convex_layer(1, s) for s in spectra], np.array([4.0]))
    huge = allocate([convex_layer(1e9, s) for s in spectra], np.array([4e9]))
    tiny_errors = allocate([convex_layer(1e9, 1e-9 * s) for s in spectra], np.array([4e9]))
    assert small == huge == tiny_errors
