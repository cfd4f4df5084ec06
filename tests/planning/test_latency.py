"""Candidates under a latency budget, on a machine whose times are a formula."""

import pytest
import torch
from torch import nn

from lowrank_nn.cost import Cost
from lowrank_nn.graph import record
from lowrank_nn.graph.derive import meta_copy
from lowrank_nn.layers import CPConv2d, SVDConv2d, SVDLinear, TuckerConv2d
from lowrank_nn.planning import Budget, Candidate, Clock, TimedCandidates, low_rank_candidates
from lowrank_nn.planning.candidates import undominated
from tests.fake_timer import CALL, FakeTimer
from tests.storage.models import seeded

FORMATS = (TuckerConv2d, SVDConv2d, SVDLinear)
LATENCY = Budget(latency=0.5)
X = torch.linspace(-1, 1, 4 * 3 * 16 * 16).reshape(4, 3, 16, 16)


def make():
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Flatten(),
        nn.Linear(64 * 256, 40),
    )


class World:
    """A model, its candidates and a clock on a fake machine."""

    def __init__(self, timer, formats=FORMATS, multiple=16):
        self.net, self.timer = seeded(make).eval(), timer
        self.recording = record(meta_copy(self.net), X.to("meta"))
        self.clock = Clock(self.net, record(self.net, X), X, timer=timer)
        sites = [site for site in self.recording.sites if isinstance(site.layer, (nn.Conv2d, nn.Linear))]
        self.tables = [
            low_rank_candidates(site, self.net.get_submodule(site.path), formats, multiple=multiple) for site in sites
        ]
        self.timed = TimedCandidates(self.tables, self.recording, self.clock)

    def truth(self, path, candidate):
        """Milliseconds of a candidate's layer by the timer's own formula."""
        site = self.recording[path]
        if candidate.layer_class is None:
            return self.timer.call(site.layer, site.calls[0].input_shape)
        new = candidate.layer_class.from_pretrained_layer(self.net.get_submodule(path), **candidate.options)
        total, shape = self.timer.call(new, site.calls[0].input_shape), site.calls[0].input_shape
        for stage in new.stages():
            total += self.timer.call(stage, shape)
            with torch.no_grad():
                shape = tuple(stage(torch.zeros(shape)).shape)
        return total


@pytest.fixture(scope="module")
def world():
    world = World(FakeTimer())
    world.timed.measure(world.timed.probes())
    return world


def test_every_format_is_probed_at_two_sizes_in_every_layer():
    world = World(FakeTimer())
    probes = world.timed.probes()
    for path, formats in (("1", (TuckerConv2d, SVDConv2d)), ("4", (SVDLinear,))):
        layers = [probe[path] for probe in probes if path in probe]
        for cls in formats:
            ranks = {layer.rank for layer in layers if type(layer) is cls}
            assert len(ranks) >= 2
    assert len(probes) == max(sum(path in probe for probe in probes) for path in ("0", "1", "2", "4"))


def test_what_has_been_timed_is_not_probed_again(world):
    assert world.timed.probes() == []
    again = TimedCandidates(world.tables, world.recording, world.clock)
    assert again.probes() == []


def test_latencies_are_those_of_the_machine(world):
    for table in world.timed.faster(LATENCY):
        for candidate in table.candidates:
            assert candidate.latency == pytest.approx(world.truth(table.path, candidate), rel=0.1)


def test_only_what_is_faster_and_undominated_stays(world):
    for table in world.timed.faster(LATENCY):
        dense, *others = table.candidates
        assert dense.layer_class is None
        assert all(candidate.latency < dense.latency for candidate in others)
        by_error = sorted(others, key=lambda candidate: candidate.error)
        latencies = [candidate.latency for candidate in by_error]
        assert latencies == sorted(latencies, reverse=True)


def test_under_several_entries_what_is_better_in_one_stays(world):
    both = Budget(latency=0.5, params=0.5)
    for few, many in zip(world.timed.faster(LATENCY), world.timed.faster(both), strict=True):
        assert all(candidate in many.candidates for candidate in few.candidates)
    fast, small = (
        Candidate(SVDConv2d, {}, 0.5, Cost(params=params), latency) for params, latency in ((20, 1.0), (10, 2.0))
    )
    assert undominated([fast, small], LATENCY) == [fast]
    assert undominated([fast, small], both) == [fast, small]


def test_ranks_are_whole_vectors_small_or_full(world):
    for table in world.tables:
        limits = {None, 3, 27, 40, 64}
        for candidate in table.candidates[1:]:
            rank = candidate.options["rank"]
            for mode in rank if isinstance(rank, tuple) else (rank,):
                assert mode in limits or mode % 16 == 0 or mode in (4, 8), candidate


def test_a_layer_without_aligned_ranks_keeps_the_others():
    layer = nn.Conv2d(3, 5, 3)
    site = record(layer, torch.ones(1, 3, 9, 9)).sites[0]
    aligned = low_rank_candidates(site, layer, [CPConv2d, SVDConv2d], multiple=16)
    assert len(aligned.candidates) > 1


def test_slower_stays_dense_with_the_measured_reason():
    class CallsCost(FakeTimer):
        def call(self, layer, input_shape):
            return 100 + super().call(layer, input_shape)

    world = World(CallsCost())
    world.timed.measure(world.timed.probes())
    for table in world.timed.faster(LATENCY):
        assert [candidate.layer_class for candidate in table.candidates] == [None]
        dense = table.candidates[0].latency
        slower, best = table.note.removeprefix("measured slower: ").split(" ms against ")
        assert best == f"{dense:.3g} ms dense"
        assert float(slower) > dense
    # The layers that the notes speak of were really timed.
    for site in world.timed._sites:
        fastest = min(site.work[1:], key=world.clock.milliseconds)
        assert world.clock.has_timed(fastest)


def test_a_first_layer_that_nothing_beats_stays_dense_alone():
    class FastStem(FakeTimer):
        def call(self, layer, input_shape):
            return 0.1 * CALL if repr(layer) == repr(make()[0]) else super().call(layer, input_shape)

    world = World(FastStem())
    world.timed.measure(world.timed.probes())
    kept = {table.path: table for table in world.timed.faster(LATENCY)}
    assert kept["0"].note.startswith("measured slower")
    assert all(len(kept[path].candidates) > 1 for path in ("1", "2", "4"))


def test_without_other_candidates_the_reason_stays():
    world = World(FakeTimer(), formats=(TuckerConv2d,))
    table = next(table for table in world.timed.faster(LATENCY) if table.path == "4")
    assert table.note == "no format at any rank is smaller"
    assert table.candidates[0].latency > 0
