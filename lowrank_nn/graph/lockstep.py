"""Two networks run side by side over all of the data, and stopped at one layer after the other."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_nn.errors import CalibrationError
from lowrank_nn.graph.inputs import run_batch, tensors
from lowrank_nn.graph.pausable import Pausable, settings_of_this_thread
from lowrank_nn.graph.places import ForwardWatch, Place
from lowrank_nn.graph.preserve import random_states, seed_all, set_random_states, untouched_process

MOST_THREADS = 512
"""Most threads of all runs together, counting those that their operations may use: some systems refuse thousands."""


MOST_BATCHES = 1000


class Stop(NamedTuple):
    """Where a run has stopped.

    Attributes:
        path: Path of the layer.
        input: First tensor among the layer's arguments; None if there is none.
        output: What the layer returned; None in the second network, which stops ahead of the call.
        shortcut: The tensor from the layer's place in ``shortcuts``; None if there is none, or it was not met.
    """

    path: str
    input: Tensor | None
    output: Any
    shortcut: Tensor | None


class Pair(NamedTuple):
    """The two runs of one batch, first and second network; None for one that is not at the layer that is due."""

    first: Stop | None
    second: Stop | None


Visit = Callable[[str, list[Pair]], None]


def run_in_lockstep(
    first: nn.Module,
    second: nn.Module,
    batches: Sequence[Any],
    paths: Sequence[str],
    visit: Visit,
    *,
    shortcuts: Mapping[str, Place] | None = None,
    shared: Iterable[Tensor] = (),
    seed: int = 0,
) -> None:
    """Run one forward of all batches through each of two networks, stopping at every layer on the way.

    Every batch runs through either network in an ordinary forward, in a thread of its own, in eval mode and without
    gradients; only one thread works at any time, and the order is fixed. The first network stops where a layer at one
    of the paths has returned, the second where it is about to be called. When all runs have stopped or ended,
    ``visit`` is called for the first of ``paths`` at which any of them stands. It may change parameters of the second
    network in place; then the runs that stand there go on. So each layer can be treated on what the treated layers
    ahead of it make of the data, whatever the control flow, and nothing is computed twice. A layer is visited once:
    later calls of it pass.

    Every run has a copy of its network, which shares the parameters but not attributes and buffers, so that a network
    that keeps things there from one layer to another does not mix up the batches; and random numbers of its own, the
    same in both networks. The networks and the process are left as they were, and no thread stays, however it ends.

    Memory: the activations alive at the layer that is due, of all batches, in both networks. Two threads per batch.

    Args:
        first: A network.
        second: Another one, with layers at the same paths.
        batches: What they are called with; see :func:`lowrank_nn.graph.call_model`.
        paths: Layers to stop at, in the order in which they are due.
        visit: Called with a path and, for every batch, where its two runs stand.
        shortcuts: By path, the place of a tensor that ``visit`` is to see too.
        shared: Buffers of the second network that its runs share, so that ``visit`` can change them.
        seed: Seed of the random numbers.

    Raises:
        CalibrationError: There are too many batches, or a forward failed; the error it raised is chained.
    """
    if len(batches) > MOST_BATCHES:
        raise CalibrationError(
            f"calibration: {len(batches)} batches would run in {2 * len(batches)} threads, at most {MOST_BATCHES} "
            "batches can. Pass larger batches, or fewer."
        )
    threads, allowed = torch.get_num_threads(), max(1, MOST_THREADS // max(1, 2 * len(batches)))
    with untouched_process():
        torch.backends.mha.set_fastpath_enabled(False)  # the fused path of encoder layers bypasses their linears
        settings = settings_of_this_thread(allowed if threads > allowed else None)
        plan = _Plan(list(paths), set(paths), shortcuts or {}, settings)
        sides = _Side(first, (), stop_ahead=False), _Side(second, tuple(shared), stop_ahead=True)
        runs = [
            (_Run(plan, sides[0], batch, number, seed), _Run(plan, sides[1], batch, number, seed))
            for number, batch in enumerate(batches, 1)
        ]
        try:
            _visit_all(runs, plan, visit)
        finally:
            for run in itertools.chain(*runs):
                run.close()
            if threads > allowed:
                torch.set_num_threads(threads)  # a thread that sets its own number sets it for threads to come too


class _Plan(NamedTuple):
    """What all runs have in common.

    Attributes:
        paths: Where to stop, in the order in which they are due.
        due: Those of them not visited yet.
        shortcuts: Places of tensors to keep, by path.
        settings: Settings of torch for the runs' threads.
    """

    paths: list[str]
    due: set[str]
    shortcuts: Mapping[str, Place]
    settings: Callable[[], AbstractContextManager[None]]


class _Side(NamedTuple):
    """One of the networks, the buffers that its runs share, and whether they stop ahead of a layer's call."""

    network: nn.Module
    shared: tuple[Tensor, ...]
    stop_ahead: bool


def _visit_all(runs: list[tuple[_Run, _Run]], plan: _Plan, visit: Visit) -> None:
    order = {path: number for number, path in enumerate(plan.paths)}
    everyone = list(itertools.chain(*runs))
    for run in everyone:
        run.go_on()
    while reached := {run.stop.path for run in everyone if run.stop is not None}:
        path = min(reached, key=order.__getitem__)
        visit(path, [Pair(one.stop_at(path), other.stop_at(path)) for one, other in runs])
        plan.due.discard(path)
        for run in everyone:
            if run.stop_at(path) is not None:
                run.go_on()


class _Run:
    """One forward of one batch through a copy of a network.

    Attributes:
        stop: Where it has stopped; None before the start and after the end.
    """

    def __init__(self, plan: _Plan, side: _Side, batch: Any, number: int, seed: int) -> None:
        self.stop: Stop | None = None
        self._plan, self._side, self._batch, self._number = plan, side, batch, number
        seed_all(seed + number)
        self._random = random_states()
        self._pausable: Pausable[Stop] = Pausable(self._forward, plan.settings)

    def go_on(self) -> None:
        """Run to the next stop, or to the end."""
        self.stop = None
        set_random_states(self._random)
        self.stop = next(self._pausable, None)
        self._random = random_states()

    def stop_at(self, path: str) -> Stop | None:
        """Return where the run stands if that is at ``path``."""
        return self.stop if self.stop is not None and self.stop.path == path else None

    def close(self) -> None:
        """End the forward where it stands."""
        self.stop = None
        self._pausable.close()

    def _forward(self, pause: Callable[[Stop], None]) -> None:
        model, plan = self._copy(), self._plan
        keeper = _Keeper(plan.shortcuts)
        for path in plan.paths:
            layer = model.get_submodule(path)
            vars(layer)["forward"] = self._stopping(path, layer.forward, keeper, pause)
        if plan.shortcuts:
            keeper.attach(model)
        with keeper if plan.shortcuts else contextlib.nullcontext():
            run_batch(model, self._batch, self._number)

    def _copy(self) -> nn.Module:
        same = (*self._side.network.parameters(), *self._side.shared)
        model = copy.deepcopy(self._side.network, {id(tensor): tensor for tensor in same})
        for module in model.modules():
            vars(module).update(training=False, _compiled_call_impl=None)
        return model

    def _stopping(
        self, path: str, forward: Callable[..., Any], keeper: _Keeper, pause: Callable[[Stop], None]
    ) -> Callable[..., Any]:
        @functools.wraps(forward)
        def stopping(*args: Any, **kwargs: Any) -> Any:
            if path not in self._plan.due:
                return forward(*args, **kwargs)
            x, shortcut = next(tensors((args, kwargs)), None), keeper.take(path)
            if self._side.stop_ahead:
                pause(Stop(path, x, None, shortcut))
                return forward(*args, **kwargs)
            output = forward(*args, **kwargs)
            pause(Stop(path, x, output, shortcut))
            return output

        return stopping


class _Keeper(ForwardWatch):
    """Keeps the tensors from some places until the layers that want them are called."""

    def __init__(self, shortcuts: Mapping[str, Place]) -> None:
        super().__init__()
        self._wanted = dict(shortcuts)
        self._kept: dict[Place, Tensor] = {}

    def take(self, path: str) -> Tensor | None:
        """Return the tensor that the layer at ``path`` wants, if it has been met."""
        place = self._wanted.pop(path, None)
        if place is None:
            return None
        return self._kept.get(place) if place in self._wanted.values() else self._kept.pop(place, None)

    def after_function(
        self, function: Callable[..., Any], options: dict[str, Any], seen: Any, outputs: list[tuple[Place, Tensor]]
    ) -> None:
        for place, tensor in outputs:
            self._keep(place, tensor)

    def after_layer(self, place: Place, seen: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._keep(place, output)

    def _keep(self, place: Place, tensor: Tensor) -> None:
        if place in self._wanted.values():
            self._kept[place] = tensor
