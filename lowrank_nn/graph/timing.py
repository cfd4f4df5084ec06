"""Timing layers where they stand: inside whole forwards of the model they belong to."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lowrank_nn.graph.inputs import call_model
from lowrank_nn.graph.preserve import untouched

_WARMUP = 2
_LEAST_ROUNDS = 8
_STAMPS = 200
_LEAST_PIECE = 1e-6  # milliseconds
_SURE = 0.01  # standard error of the ratios of totals at which there are enough rounds

Owner = tuple[str, int] | None
"""Whose a piece of time is: a watched layer's path and the number of its call; None outside all of them."""

Owners = tuple[Owner, ...]


class Profile(NamedTuple):
    """Where the time of one forward goes.

    Attributes:
        total: Milliseconds of the forward.
        calls: Milliseconds of each call of the watched layers, by path; of a layer inside another one only the inner
            counts.
    """

    total: float
    calls: dict[str, list[float]]


def time_in_place(
    models: Sequence[tuple[nn.Module, Iterable[str]]], example_inputs: Any, *, seconds: float = 5.0
) -> list[Profile]:
    """Time forwards of several models, in turn, and the calls of some layers in them.

    What else the machine does makes everything slower now and then. So the total of each model stands to that of the
    first as in the median round, where both met the same machine; and a forward is cut where a watched layer begins or
    ends, and shared out in proportion to the fastest round of each piece. Rounds go on until the ratios are sure to
    1 %. With one thread on a CPU only the time counts that the thread runs. The models are left as they were.

    Args:
        models: Each with the paths of the layers to watch; they run in eval mode, without gradients.
        example_inputs: What they are called with.
        seconds: Time after which no further round begins; there are at least eight.
    """
    device = next((parameter.device for model, _ in models for parameter in model.parameters()), torch.device("cpu"))
    stamp = _stamp_of(device)
    tapes = [_Tape(stamp) for _ in models]
    with contextlib.ExitStack() as stack:
        for (model, paths), tape in zip(models, tapes, strict=True):
            stack.enter_context(untouched(model))
            for module in model.modules():
                vars(module).update(training=False)
            for path in paths:
                tape.watch(path, model.get_submodule(path))
        calls = [functools.partial(call_model, model, example_inputs) for model, _ in models]
        _run_rounds(calls, tapes, seconds)
    fastest = tapes[0].fastest_total()
    return [tape.profile(fastest * _ratio(tape, tapes[0])) for tape in tapes]


def _run_rounds(calls: Sequence[Callable[[], Any]], tapes: Sequence[_Tape], seconds: float) -> None:
    sides = list(zip(calls, tapes, strict=True))
    start = time.perf_counter()
    for index in itertools.count(-_WARMUP):
        if index >= _LEAST_ROUNDS:
            late = time.perf_counter() - start > seconds
            if late or all(_standard_error(tape, tapes[0]) < _SURE for tape in tapes):
                return
        for call, tape in sides[:: 1 if index % 2 else -1]:
            tape.run(call, counts=index >= 0)


class _Tape:
    """What one model's forwards left: the times at which watched layers began and ended."""

    def __init__(self, stamp: Callable[[], Any]) -> None:
        self._stamp = stamp
        self._overhead = _cost_of(stamp)
        self._events: list[tuple[str | None, Any]] = []  # a path where its layer begins, None where one ends
        self._rounds: list[tuple[Owners, list[float]]] = []

    def watch(self, path: str, layer: nn.Module) -> None:
        """Note from now on when calls of ``layer`` begin and end."""
        forward: Callable[..., Any] = layer.forward

        @functools.wraps(forward)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._events.append((path, self._stamp()))
            output = forward(*args, **kwargs)
            self._events.append((None, self._stamp()))
            return output

        vars(layer)["forward"] = timed

    def run(self, forward: Callable[[], Any], *, counts: bool) -> None:
        """Time one forward; one that does not count is run and forgotten."""
        self._events.clear()
        start = self._stamp()
        forward()
        end = self._stamp()
        if counts:
            owners, pieces = _pieces(start, self._events, end)
            self._rounds.append((owners, [max(_LEAST_PIECE, piece - self._overhead) for piece in pieces]))

    def totals(self) -> NDArray[np.float64]:
        """Return the milliseconds of every forward."""
        return np.array([sum(pieces) for _, pieces in self._rounds])

    def fastest_total(self) -> float:
        """Return the milliseconds of a forward of which every piece is as fast as in its fastest round."""
        return float(self._fastest()[1].sum())

    def profile(self, total: float) -> Profile:
        """Return ``total``, shared out over the calls in proportion to the fastest time of every piece."""
        owners, pieces = self._fastest()
        spent: dict[Owner, float] = dict.fromkeys(owners, 0.0)
        for owner, piece in zip(owners, pieces * (total / pieces.sum()), strict=True):
            spent[owner] += float(piece)
        calls: dict[str, list[float]] = {}
        for owner, amount in spent.items():
            if owner is not None:
                calls.setdefault(owner[0], []).append(amount)
        return Profile(total, calls)

    def _fastest(self) -> tuple[Owners, NDArray[np.float64]]:
        """Return whose the pieces of a round are, and the fastest time of each.

        Rounds in which the model took another way than mostly (control flow that depends on chance) are left out.
        """
        usual = collections.Counter(owners for owners, _ in self._rounds).most_common(1)[0][0]
        return usual, np.min([pieces for owners, pieces in self._rounds if owners == usual], axis=0)


def _ratio(tape: _Tape, reference: _Tape) -> float:
    return float(np.median(tape.totals() / reference.totals()))


def _standard_error(tape: _Tape, reference: _Tape) -> float:
    """Return the relative standard error of the median ratio, from the median deviation of the rounds."""
    ratios = np.log(tape.totals() / reference.totals())
    deviation = float(np.median(np.abs(ratios - np.median(ratios))))
    return 1.253 * 1.483 * deviation / math.sqrt(len(ratios))  # both factors: normal distribution


def _pieces(start: Any, events: Sequence[tuple[str | None, Any]], end: Any) -> tuple[Owners, list[float]]:
    """Return whose each piece between two stamps is, and the milliseconds it took."""
    owners: list[Owner] = [None]
    inside: list[Owner] = [None]
    seen: collections.Counter[str] = collections.Counter()
    for path, _ in events:
        if path is None:
            inside.pop()
        else:
            inside.append((path, seen[path]))
            seen[path] += 1
        owners.append(inside[-1])
    stamps = [start, *(stamp for _, stamp in events), end]
    return tuple(owners), [_milliseconds(before, after) for before, after in itertools.pairwise(stamps)]


def _milliseconds(before: Any, after: Any) -> float:
    if not isinstance(before, torch.cuda.Event):
        elapsed: float = 1e3 * (after - before)
        return elapsed
    after.synchronize()
    return float(before.elapsed_time(after))


def _stamp_of(device: torch.device) -> Callable[[], Any]:
    """Return what tells the time of work on ``device``."""
    if device.type == "cuda":
        return functools.partial(_cuda_stamp, device)
    if device.type != "cpu":
        return functools.partial(_synchronous_stamp, device)
    # Windows counts a thread's time in steps of 16 ms.
    alone = torch.get_num_threads() == 1 and sys.platform != "win32"
    return time.thread_time if alone else time.perf_counter


def _cuda_stamp(device: torch.device) -> torch.cuda.Event:
    """Mark the place in the stream: waiting for the device at every layer would slow the model down."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _synchronous_stamp(device: torch.device) -> float:
    """Return the time after all work on ``device``, of a kind that cannot mark places in a stream."""
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def _cost_of(stamp: Callable[[], Any]) -> float:
    """Return the milliseconds that a stamp itself takes: every piece has one."""
    stamps = [stamp() for _ in range(_STAMPS)]
    return min(_milliseconds(before, after) for before, after in itertools.pairwise(stamps))
