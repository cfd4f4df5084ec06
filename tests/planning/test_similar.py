"""Merging of units that compute nearly the same, against what it does to a network."""

import itertools

import numpy as np
import pytest
import torch

from lowrank_nn.planning.similar import nearest_kept, similarity_scores

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def test_the_first_merge_is_the_cheapest_of_all_pairs():
    rows, columns = normal(6, 3), normal(6, 4)
    costs = {
        (u, v): float(np.square(columns[v].numpy()).sum() * np.square((rows[u] - rows[v]).numpy()).sum())
        for u, v in itertools.permutations(range(6), 2)
    }
    scores = similarity_scores(rows, columns)
    cheapest = min(costs, key=costs.get)
    assert int(scores.argmin()) == cheapest[1]
    assert float(scores.min()) == pytest.approx(costs[cheapest])


def test_columns_taken_over_count():
    # Unit 1 is unit 0 and goes first; with its column unit 0 has none left and goes for nothing.
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [5.0, 5.0]], dtype=torch.float64)
    columns = torch.tensor([[-3.0], [3.0], [1.0], [1.0]], dtype=torch.float64)
    order = similarity_scores(rows, columns).argsort().tolist()
    assert set(order[:2]) == {0, 1}


def test_scores_grow_in_the_order_of_removal_and_the_last_unit_is_the_largest():
    scores = similarity_scores(normal(9, 3), normal(9, 2))
    assert torch.isfinite(scores).all()
    assert scores.sort().values.diff().gt(0).all()


def test_equal_units_are_merged_without_loss():
    rows, columns = normal(4, 5), normal(7, 3)
    rows = torch.cat([rows, rows[:3]])
    gone = torch.zeros(7, dtype=torch.bool)
    gone[similarity_scores(rows, columns).argsort()[:3]] = True
    x = normal(20, 5)
    expected = (x @ rows.T).relu() @ columns
    merged = columns.clone()
    merged.index_add_(0, nearest_kept(rows, gone), columns[gone])
    torch.testing.assert_close((x @ rows[~gone].T).relu() @ merged[~gone], expected)


def test_nearest_kept_is_brute_force():
    rows = normal(8, 3)
    gone = torch.tensor([0, 1, 0, 0, 1, 0, 0, 1], dtype=torch.bool)
    for unit, into in zip(gone.nonzero()[:, 0].tolist(), nearest_kept(rows, gone).tolist(), strict=True):
        kept = [k for k in range(8) if not gone[k]]
        assert into == min(kept, key=lambda k: float((rows[k] - rows[unit]).norm()))
