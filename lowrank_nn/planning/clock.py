"""How long layers and whole models take on this machine: timed where they stand, by formula in between."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from lowrank_nn.graph.stand_in import stand_in
from lowrank_nn.graph.timing import Profile, time_in_place
from lowrank_nn.layers import CompressedLayer, layer_output_shape

logger = logging.getLogger(__name__)

Timer = Callable[[Sequence[tuple[nn.Module, Sequence[str]]], Any], list[Profile]]

_TIMED = (nn.Conv2d, nn.Linear, CompressedLayer)  # one by one; everything else is the rest


class Clock:
    """Estimates the latency of a model in which layers are replaced, and learns from every measurement.

    A forward takes the sum of its convolution and linear layers, stage by stage, and a rest. Calls that were timed, in
    this run or an earlier one on this machine, take what they took; a formula fitted to them gives the others. Nothing
    is timed before the first question.

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
        weights = [site.layer.weight for site in recording.sites if isinstance(site.layer, _TIMED)]
        tensors = [weight for weight in weights if isinstance(weight, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        self.vector_width = vector_width(device)
        self._cache = TimingCache(describe_machine(device))
        self._setting = _setting(tensors, device)
        self._calls: dict[str, LeafCall] = {}
        self._times: dict[str, float] = {}
        self._dense_time: float | None = None
        self._rest = 0.0
        self._model: LatencyModel | None = None

    @property
    def dense(self) -> float:
        """Milliseconds of a forward of the dense model, measured."""
        if self._dense_time is None:
            (profile,) = self._timer([(self._dense, _paths(self._original))], self._inputs)
            times = self._times_of(self._original, profile)
            known = self._cache.load()
            # The machine may run at another speed than when it was timed for the cache.
            speeds = [time / known[key] for key, time in times.items() if key in known]
            drift = statistics.median(speeds) if speeds else 1.0
            self._times = {key: drift * time for key, time in known.items()}
            self._learn(times)
            self._dense_time = profile.total
            self._rest = profile.total - self._sum(self._original)
        return self._dense_time

    def layer(self, layer: nn.Module, calls: Sequence[Call]) -> float:
        """Return the milliseconds that a layer takes for its calls in one forward.

        Args:
            layer: A convolution, linear or compressed layer, possibly on the meta device.
            calls: With which inputs it is called.
        """
        assert self.dense
        return sum(self._milliseconds(leaf) for call in calls for leaf in self._leaves(layer, call.input_shape))

    def forward(self, recording: Recording) -> float:
        """Return the milliseconds of one forward, estimated from what a model is recorded to do."""
        assert self.dense
        return self._rest + self._sum(recording)

    def knows(self, layer: nn.Module, calls: Sequence[Call]) -> bool:
        """Whether all that ``layer`` does in these calls has been timed."""
        assert self.dense
        return all(leaf.key in self._times for call in calls for leaf in self._leaves(layer, call.input_shape))

    def measure(self, replaced: Mapping[str, CompressedLayer]) -> float:
        """Time the model with some layers replaced, beside the dense one, and learn from it.

        Args:
            replaced: By path, the layers that take the place of dense ones; on the meta device, without numbers.

        Returns:
            Its time over that of the dense model.
        """
        small = stand_in(self._dense, replaced)
        recording = derive_recording(self._original, small)
        sides = [(self._dense, _paths(self._original)), (small, _paths(recording))]
        before, after = self._timer(sides, self._inputs)
        ratio = after.total / before.total
        speed = self.dense / before.total  # as the dense model ran when it was timed first
        self._learn({key: speed * time for key, time in self._times_of(recording, after).items()})
        self._rest = ratio * self.dense - self._sum(recording)
        logger.info("measured %.3f of the dense model's %.3f ms", ratio, before.total)
        return ratio

    @property
    def median_error(self) -> float:
        """Median relative error of the fitted formula over the timed calls."""
        assert self.dense
        return self._fitted().median_error

    def _learn(self, times: Mapping[str, float]) -> None:
        self._times.update(times)
        self._cache.store(times)
        self._model = None

    def _times_of(self, recording: Recording, profile: Profile) -> dict[str, float]:
        """Return the median milliseconds of equal calls, by key."""
        found: dict[str, list[float]] = {}
        for site in _timed_sites(recording):
            for call, time in zip(site.calls, profile.calls.get(site.path, ()), strict=False):
                found.setdefault(self._own_call(site.layer, call.input_shape).key, []).append(time)
        return {key: statistics.median(times) for key, times in found.items()}

    def _sum(self, recording: Recording) -> float:
        sites = _timed_sites(recording)
        return sum(self._milliseconds(self._own_call(site.layer, c.input_shape)) for site in sites for c in site.calls)

    def _milliseconds(self, call: LeafCall) -> float:
        return self._times[call.key] if call.key in self._times else self._fitted().milliseconds(call)

    def _fitted(self) -> LatencyModel:
        if self._model is None:
            self._model = LatencyModel({call: self._times[k] for k, call in self._calls.items() if k in self._times})
            logger.debug("latency formula: median error %.1f %%", 100 * self._model.median_error)
        return self._model

    def _leaves(self, layer: nn.Module, input_shape: tuple[int, ...]) -> Iterator[LeafCall]:
        """Yield the calls in one call of ``layer``: its own, and those of its stages."""
        yield self._own_call(layer, input_shape)
        for stage in layer.stages() if isinstance(layer, CompressedLayer) else ():
            yield self._own_call(stage, input_shape)
            input_shape = layer_output_shape(stage, input_shape)

    def _own_call(self, layer: nn.Module, input_shape: tuple[int, ...]) -> LeafCall:
        """Describe what ``layer`` itself does in a call, the work of its stages apart."""
        stages = list(layer.stages()) if isinstance(layer, CompressedLayer) else []
        name = f"{type(layer).__name__} of {len(stages)} stages" if stages else f"{layer!r} {list(input_shape)}"
        key = name + self._setting
        if key not in self._calls:
            self._calls[key] = between_stages(key) if stages else self._describe(key, layer, input_shape)
        return self._calls[key]

    def _describe(self, key: str, layer: nn.Module, input_shape: tuple[int, ...]) -> LeafCall:
        arguments = layer.dense_arguments() if isinstance(layer, CompressedLayer) else vars(layer)
        return leaf_call(key, arguments, input_shape, self.vector_width)


def _timed_sites(recording: Recording) -> Iterator[Site]:
    return (site for site in recording.sites if isinstance(site.layer, _TIMED) and site.calls)


def _paths(recording: Recording) -> list[str]:
    return [site.path for site in _timed_sites(recording)]


def _setting(weights: Sequence[Tensor], device: torch.device) -> str:
    """Return what the time of every call depends on besides the call, as a suffix of its key."""
    maps = [weight for weight in weights if weight.dim() == 4 and max(weight.shape[1:]) > 1]
    last = any(not w.is_contiguous() and w.is_contiguous(memory_format=torch.channels_last) for w in maps)
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else ""
    return f" {'+'.join(dtypes)}{' channels_last' if last else ''}{f' autocast {autocast}' if autocast else ''}"
