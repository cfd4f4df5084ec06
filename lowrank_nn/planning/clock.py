"""How long layers and whole models take on this machine: timed where they stand, by formula in between."""

from __future__ import annotations

import collections
import dataclasses
import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.cost import (
    LatencyModel,
    LeafCall,
    TimingCache,
    between_stages,
    describe_machine,
    leaf_call,
    vector_width,
)
from lowrank_nn.graph import Call, Recording, Site
from lowrank_nn.graph.derive import derive_recording
from lowrank_nn.graph.inputs import tensors
from lowrank_nn.graph.preserve import evaluating
from lowrank_nn.graph.sites import PRICED
from lowrank_nn.graph.stand_in import stand_in
from lowrank_nn.graph.timing import Profile, time_in_place
from lowrank_nn.layers import CompressedLayer

logger = logging.getLogger(__name__)

Timer = Callable[[Sequence[tuple[nn.Module, Sequence[str]]], Any], list[Profile]]


class Clock:
    """Estimates the latency of a model in which layers are replaced, and learns from every measurement.

    A forward takes the sum of its convolutions, linear and recurrent layers, stage by stage, and a rest. Calls that
    were timed, in this run or an earlier one on this machine, take what they took; a formula fitted to them gives the
    others. Nothing is timed before the first question.

    Args:
        dense: The model as given; not changed.
        recording: What it was recorded to do.
        example_inputs: What it is called with.
        timer: Times models with the layers at some paths; another one in tests.
    """

    def __init__(
        self, dense: nn.Module, recording: Recording, example_inputs: Any, *, timer: Timer = time_in_place
    ) -> None:
        self._dense, self._original, self._inputs, self._timer = dense, recording, example_inputs, timer
        weights = [p for site in _timed_sites(recording) for p in site.layer.parameters() if p.dim() >= 2]
        device = weights[0].device if weights else torch.device("cpu")
        self.vector_width = vector_width(device)
        self._cache = TimingCache(describe_machine(device))
        self._setting = _setting(weights, list(tensors(example_inputs)), device)
        self._calls: dict[str, LeafCall] = {}
        self._times: dict[str, float] = {}
        self._timed: collections.Counter[str] = collections.Counter()
        self._dense_time = 0.0
        self._rest = 0.0
        self._model: LatencyModel | None = None

    @property
    def dense(self) -> float:
        """Milliseconds of a forward of the dense model, measured."""
        self._start_once()
        return self._dense_time

    def work_of(self, layer: nn.Module, calls: Sequence[Call]) -> list[LeafCall]:
        """Return all that a layer does in one forward: its own calls, and those of its stages.

        Args:
            layer: A convolution, linear or compressed layer, possibly on the meta device.
            calls: With which inputs it is called.
        """
        work = []
        for call in calls:
            work.append(self._own_call(layer, call.input_shape))
            if isinstance(layer, CompressedLayer):
                work += [self._own_call(stage, shape) for stage, shape in layer.stage_calls(call.input_shape)]
        return work

    def milliseconds(self, work: Iterable[LeafCall]) -> float:
        """Return the time that some work takes: as timed, or by formula."""
        self._start_once()
        return sum(self._times.get(call.key) or self._fitted().milliseconds(call) for call in work)

    def has_timed(self, work: Iterable[LeafCall]) -> bool:
        """Whether each of these calls was timed, in this run or an earlier one."""
        self._start_once()
        return all(call.key in self._times for call in work)

    def forward(self, recording: Recording) -> float:
        """Return the milliseconds of one forward, estimated from what a model is recorded to do."""
        return self.milliseconds(self._work_in(recording)) + self._rest

    def measure(
        self, replaced: Mapping[str, CompressedLayer], base: tuple[nn.Module, Recording] | None = None
    ) -> float:
        """Time the model with some layers replaced, beside the dense one, and learn from it.

        Args:
            replaced: By path, the layers that take the place of dense ones; on the meta device, without numbers.
            base: The model in which they do, and what it was recorded to do, where that has lost channels.

        Returns:
            Its time over that of the dense model.
        """
        whole, original = base or (self._dense, self._original)
        small = stand_in(whole, replaced)
        recording = derive_recording(original, small)
        sides = [(self._dense, _paths(self._original)), (small, _paths(recording))]
        before, after = self._timer(sides, self._inputs)
        ratio = after.total / before.total
        speed = self.dense / before.total  # as the dense model ran when it was timed first
        self._learn({key: speed * time for key, time in self._times_of(recording, after).items()})
        self._rest = ratio * self.dense - self.milliseconds(self._work_in(recording))
        logger.info("measured %.3f of the dense model's %.3f ms", ratio, before.total)
        return ratio

    @property
    def median_error(self) -> float:
        """Median relative error of the fitted formula over the calls that were timed."""
        return self._fitted().median_error

    def _start_once(self) -> None:
        """Time the dense model, and take over what was timed in earlier runs."""
        if self._dense_time:
            return
        sides = [(self._dense, _paths(self._original))]
        (profile,) = self._timer(sides, self._inputs)
        times = self._times_of(self._original, profile)
        if not profile.calls.keys() >= set(sides[0][1]):
            with evaluating(self._dense):  # without the fused kernels of encoder layers, which call no layers
                times = self._times_of(self._original, self._timer(sides, self._inputs)[0])
        known = self._cache.load()
        # The machine may run at another speed than when it was timed for the cache.
        speeds = [time / known[key] for key, time in times.items() if key in known]
        drift = statistics.median(speeds) if speeds else 1.0
        self._times = {key: drift * time for key, time in known.items()}
        self._learn(times)
        self._dense_time = profile.total
        self._rest = profile.total - self.milliseconds(self._work_in(self._original))

    def _learn(self, times: Mapping[str, float]) -> None:
        """Take over new timings, in the mean with those of this run."""
        for key, time in times.items():
            share = 1 / (1 + self._timed[key])
            self._times[key] = time if share == 1 else self._times[key] ** (1 - share) * time**share
            self._timed[key] += 1
        self._cache.store({key: self._times[key] for key in times})
        self._model = None

    def _times_of(self, recording: Recording, profile: Profile) -> dict[str, float]:
        """Return the median milliseconds of equal calls, by key."""
        found: dict[str, list[float]] = {}
        for site in _timed_sites(recording):
            for call, time in zip(site.calls, profile.calls.get(site.path, ()), strict=False):
                found.setdefault(self._own_call(site.layer, call.input_shape).key, []).append(time)
        return {key: statistics.median(times) for key, times in found.items()}

    def _work_in(self, recording: Recording) -> list[LeafCall]:
        sites = _timed_sites(recording)  # stages of compressed layers are sites of their own
        return [self._own_call(site.layer, call.input_shape) for site in sites for call in site.calls]

    def _fitted(self) -> LatencyModel:
        if self._model is None:
            self._model = LatencyModel({call: self._times[k] for k, call in self._calls.items() if k in self._times})
            logger.debug("latency formula: median error %.1f %%", 100 * self._model.median_error)
        return self._model

    def _own_call(self, layer: nn.Module, input_shape: tuple[int, ...]) -> LeafCall:
        """Describe what ``layer`` itself does in a call, the work of its stages apart."""
        stages = list(layer.stages()) if isinstance(layer, CompressedLayer) else []
        name = f"{type(layer).__name__} of {len(stages)} stages" if stages else f"{layer!r} {list(input_shape)}"
        key = name + self._setting
        if key not in self._calls:
            self._calls[key] = between_stages(key) if stages else self._describe(key, layer, input_shape)
        return self._calls[key]

    def _describe(self, key: str, layer: nn.Module, input_shape: tuple[int, ...]) -> LeafCall:
        if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
            gates = next(layer.parameters()).shape[0] // layer.hidden_size
            return leaf_call(key, {**vars(layer), "gates": gates}, input_shape, self.vector_width)
        if not isinstance(layer, CompressedLayer):
            return leaf_call(key, vars(layer), input_shape, self.vector_width)
        call = leaf_call(key, layer.dense_arguments(), input_shape, self.vector_width)
        return dataclasses.replace(call, kind=f"{call.kind}, {type(layer).__name__}")


def _timed_sites(recording: Recording) -> Iterator[Site]:
    """Return the layers that are timed one by one; everything else is the rest."""
    return (site for site in recording.sites if isinstance(site.layer, PRICED) and site.calls)


def _paths(recording: Recording) -> list[str]:
    return [site.path for site in _timed_sites(recording)]


def _setting(weights: Sequence[Tensor], inputs: Sequence[Tensor], device: torch.device) -> str:
    """Return what the time of every call depends on besides the call, as a suffix of its key."""
    maps = [tensor for tensor in (*weights, *inputs) if tensor.dim() == 4 and max(tensor.shape[-2:]) > 1]
    last = any(not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last) for t in maps)
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else ""
    return f" {'+'.join(dtypes)}{' channels_last' if last else ''}{f' autocast {autocast}' if autocast else ''}"
