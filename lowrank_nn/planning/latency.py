"""Candidates that are to be fast: timed in place, and only those kept that beat the dense layer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from lowrank_nn.cost import LeafCall
from lowrank_nn.graph import Recording, Site
from lowrank_nn.layers import CompressedLayer, read_layer
from lowrank_nn.planning.budget import Budget
from lowrank_nn.planning.candidates import Candidate, SiteCandidates, undominated
from lowrank_nn.planning.clock import Clock

Replaced = dict[str, CompressedLayer]
"""Layers without numbers, by the path where they stand."""

_PROBED = (0.2, 0.5)  # shares of the dense layer's MACs at which each format is timed
_CHECKS = 3  # times that the fastest candidates are timed of layers where all seem slower than the dense one


class TimedCandidates:
    """The candidates of some sites, with what the clock says of each.

    Args:
        tables: The candidates of each site.
        recording: What the model as it is now is recorded to do.
        clock: Gives the times.
        base: The model to time them in, and what it was recorded to do; the dense one if left out.
    """

    def __init__(
        self,
        tables: Sequence[SiteCandidates],
        recording: Recording,
        clock: Clock,
        base: tuple[nn.Module, Recording] | None = None,
    ) -> None:
        self._clock, self._base = clock, base
        self._present = present_layers(recording)
        self._sites = []
        for table in tables:
            site = recording[table.path]
            layers = [_built(site, candidate) for candidate in table.candidates]
            self._sites.append(_TimedSite(table, layers, [clock.work_of(layer, site.calls) for layer in layers]))

    def probes(self) -> list[Replaced]:
        """Return what is to be measured first: every format at two sizes in every layer, all layers at a time.

        What has been timed before, on this machine, is left out.
        """
        queues = []
        for site in self._sites:
            picks = _spread_over_formats(site.table.candidates)
            queues.append([(site.table.path, site.layers[i]) for i in picks if not self._clock.has_timed(site.work[i])])
        turns = itertools.zip_longest(*queues)
        return [self._present | dict(entry for entry in turn if entry is not None) for turn in turns]

    def measure(self, probes: Iterable[Replaced]) -> None:
        """Time ``probes``; then, where nothing seems faster than the dense layer, what comes nearest to it."""
        for probe in probes:
            self._clock.measure(probe, self._base)
        for _ in range(_CHECKS):
            nearest = dict(self._nearest())
            if not nearest:
                return
            self._clock.measure(self._present | nearest, self._base)

    def faster(self, budget: Budget) -> list[SiteCandidates]:
        """Return the tables with their latencies, without all that takes as long as the dense layer or longer.

        Args:
            budget: Candidates that another one beats in error and in every entry of it are left out too.
        """
        return [_faster_ones(site.table, self._times(site), budget) for site in self._sites]

    def _nearest(self) -> Iterator[tuple[str, CompressedLayer]]:
        """Yield the fastest candidate of every site with none that seems fast, if it was not timed yet."""
        for site in self._sites:
            dense, *others = self._times(site)
            if others and min(others) >= dense:
                best = 1 + int(np.argmin(others))
                if not self._clock.has_timed(site.work[best]):
                    yield site.table.path, site.layers[best]

    def _times(self, site: _TimedSite) -> list[float]:
        return [self._clock.milliseconds(work) for work in site.work]


class _TimedSite(NamedTuple):
    """The candidates of a site, the layers they stand for without numbers, and what each does in a forward."""

    table: SiteCandidates
    layers: list[Any]
    work: list[list[LeafCall]]


def present_layers(recording: Recording) -> Replaced:
    """Return the compressed layers of a model, those inside others left out."""
    sites = (site for site in recording.sites if site.inside is None)
    return {site.path: site.layer for site in sites if isinstance(site.layer, CompressedLayer)}


def _built(site: Site, candidate: Candidate) -> nn.Module:
    """Return the layer that a candidate stands for, on the meta device; of the dense one, what stands there."""
    if candidate.layer_class is None:
        return site.layer
    source = read_layer(site.layer, candidate.layer_class)
    options = source.arguments | candidate.options
    return candidate.layer_class.empty(device="meta", dtype=source.weight.dtype, **options)


def _spread_over_formats(candidates: Sequence[Candidate]) -> list[int]:
    """Return the indices of the candidates of each format whose MACs come nearest to some shares of the dense ones."""
    formats: dict[str, list[int]] = {}
    for index, candidate in enumerate(candidates):
        if candidate.layer_class is not None:
            variant = {name: value for name, value in candidate.options.items() if name != "rank"}
            formats.setdefault(f"{candidate.layer_class.__name__} {variant}", []).append(index)
    shares = np.array([candidate.cost.macs for candidate in candidates]) / max(1, candidates[0].cost.macs)
    picks = [members[int(np.abs(shares[members] - s).argmin())] for members in formats.values() for s in _PROBED]
    return list(dict.fromkeys(picks))


def _faster_ones(table: SiteCandidates, times: Sequence[float], budget: Budget) -> SiteCandidates:
    """Return the table with these latencies, and a note in place of candidates if there is no fast one."""
    dense, *rest = (dataclasses.replace(c, latency=time) for c, time in zip(table.candidates, times, strict=True))
    faster = [candidate for candidate in rest if candidate.latency < dense.latency]
    note = table.note
    if rest and not faster:
        note = f"measured slower: {min(times[1:]):.3g} ms against {dense.latency:.3g} ms dense"
    return dataclasses.replace(table, candidates=[dense, *undominated(faster, budget)], note=note)
