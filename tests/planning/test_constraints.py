"""Filters over candidates: what stays is what was asked for."""

import pytest
import torch
from torch import nn

from lowrank_nn.errors import OptionError, PlanError
from lowrank_nn.graph import record
from lowrank_nn.layers import SVDConv2d, TuckerConv2d
from lowrank_nn.planning import SiteCandidates, low_rank_candidates
from lowrank_nn.planning.constraints import checked_shares, in_multiples, within_shares
from tests.storage.models import seeded


@pytest.fixture(scope="module")
def table():
    layer = seeded(lambda: nn.Conv2d(32, 48, 3))
    site = record(layer, torch.ones(1, 32, 6, 6)).sites[0]
    return low_rank_candidates(site, layer, (SVDConv2d, TuckerConv2d))


def shares(table):
    return [candidate.cost.params / (32 * 48 * 9) for candidate in table.candidates]


@pytest.mark.parametrize("multiple", [2, 8, 16])
def test_multiples(table, multiple):
    kept = in_multiples(table, multiple)
    ranks = [c.options["rank"] for c in kept.candidates[1:]]
    modes = [mode for rank in ranks for mode in (rank if isinstance(rank, tuple) else (rank,))]
    assert all(mode is None or mode % multiple == 0 for mode in modes)
    assert 1 < len(kept.candidates) < len(table.candidates)
    assert kept.candidates[0] is table.candidates[0]
    assert kept.note == ""


def test_no_multiple_at_all(table):
    kept = in_multiples(table, 1000)
    assert kept.candidates == [table.candidates[0]]
    assert "multiples of 1000" in kept.note


def test_shares(table):
    kept = within_shares(table, 0.2, 0.5)
    assert kept.candidates == [c for c, s in zip(table.candidates, shares(table), strict=True) if 0.2 <= s <= 0.5]
    assert within_shares(table, 0.9, 1.0).candidates[0] is table.candidates[0]
    assert within_shares(table, 0.0, 1.0).candidates == table.candidates
    smallest = min(shares(table))
    assert len(within_shares(table, smallest, smallest).candidates) >= 1


def test_shares_that_no_candidate_has(table):
    with pytest.raises(PlanError, match=r"'?.* is to keep from 0 to 0.0001 of its parameters, and cannot: its cand"):
        within_shares(table, 0.0, 1e-4)
    with pytest.raises(PlanError, match="Widen at_least and at_most"):
        within_shares(table, 0.6, 0.5)


def test_a_layer_that_cannot_be_replaced():
    closed = SiteCandidates("a.b", [], "the model never calls it")
    assert within_shares(closed, 0.5, 1.0) is not None
    with pytest.raises(PlanError, match=r"a\.b .* cannot: the model never calls it"):
        within_shares(closed, 0.0, 0.5)


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan")])
def test_what_is_no_share(share):
    with pytest.raises(OptionError, match=r"at_most gives the share .* for 'layer1\.\*'"):
        checked_shares("at_most", {"layer1.*": share})


def test_what_is_no_mapping():
    with pytest.raises(OptionError, match="at_least maps patterns to shares"):
        checked_shares("at_least", 0.5)
    assert checked_shares("at_least", None) == {}
