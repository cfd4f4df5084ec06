"""Timing layers where they stand: inside whole forwards of the model they belong to."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lowrank_nn.graph.inputs import call_model
from lowrank_nn.graph.preserve import untouched

_WARMUP = 2
_LEAST_ROUNDS = 8
_MOST_ROUNDS = 100

Label = tuple[str, int] | None
"""A watched layer's path and the number of its call; None outside all of them."""


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
    models: Sequence[tuple[nn.Module, Iterable[str]]], example_inputs: Any, *, seconds: float = 1.0
) -> list[Profile]:
    """Time forwards of several models, in turn, and the calls of some layers in them.

    A forward is cut where a watched layer begins or ends, and each piece counts with its fastest round: what else the
    machine does makes a piece slower now and then, never faster. The models are left as they were.

    Args:
        models: Each with the paths of the layers to watch; they run in eval mode, without gradients.
        example_inputs: What they are called with.
        seconds: Time to spend on each model, at least; there are at least eight rounds.
    """
    cuda = any(tensor.is_cuda for model, _ in models for tensor in model.parameters())
    tapes = [_Tape(cuda) for _ in models]
    with contextlib.ExitStack() as stack:
        for (model, paths), tape in zip(models, tapes, strict=True):
            stack.enter_context(untouched(model))
            for module in model.modules():
                vars(module).update(training=False)
            for path in paths:
                tape.watch(path, model.get_submodule(path))
        _run_rounds([model for model, _ in models], tapes, example_inputs, seconds)
    return [tape.profile() for tape in tapes]


def _run_rounds(models: Sequence[nn.Module], tapes: Sequence[_Tape], example_inputs: Any, seconds: float) -> None:
    sides = list(zip(models, tapes, strict=True))
    start = time.perf_counter()
    for index in range(-_WARMUP, _MOST_ROUNDS):
        if index == 0:
            start = time.perf_counter()
        elif index >= _LEAST_ROUNDS and time.perf_counter() - start > seconds * len(models):
            break
        for model, tape in sides[:: 1 if index % 2 else -1]:
            tape.run(functools.partial(call_model, model, example_inputs), counts=index >= 0)


class _Tape:
    """What one model's forwards left: the times at which watched layers began and ended."""

    def __init__(self, cuda: bool) -> None:
        self._stamp: Callable[[], Any] = _cuda_stamp if cuda else time.perf_counter
        self._events: list[tuple[str | None, Any]] = []  # a path where its layer begins, None where one ends
        self._rounds: list[tuple[tuple[Label, ...], list[float]]] = []

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
        _wait()
        start = self._stamp()
        forward()
        end = self._stamp()
        _wait()
        if counts:
            self._rounds.append(_pieces(start, self._events, end))

    def profile(self) -> Profile:
        """Return the fastest time of every piece, added up by call.

        Rounds in which the model took another way than mostly (control flow that depends on chance) are left out.
        """
        usual = collections.Counter(labels for labels, _ in self._rounds).most_common(1)[0][0]
        fastest = np.min([pieces for labels, pieces in self._rounds if labels == usual], axis=0)
        spent: dict[Label, float] = dict.fromkeys(usual, 0.0)
        for label, piece in zip(usual, fastest, strict=True):
            spent[label] += float(piece)
        calls: dict[str, list[float]] = {}
        for label, amount in spent.items():
            if label is not None:
                calls.setdefault(label[0], []).append(amount)
        return Profile(float(fastest.sum()), calls)


def _pieces(start: Any, events: Sequence[tuple[str | None, Any]], end: Any) -> tuple[tuple[Label, ...], list[float]]:
    """Return whose each piece between two stamps is, and the milliseconds it took."""
    labels: list[Label] = [None]
    inside: list[Label] = [None]
    seen: collections.Counter[str] = collections.Counter()
    for path, _ in events:
        if path is None:
            inside.pop()
        else:
            inside.append((path, seen[path]))
            seen[path] += 1
        labels.append(inside[-1])
    stamps = [start, *(stamp for _, stamp in events), end]
    return tuple(labels), [_milliseconds(before, after) for before, after in itertools.pairwise(stamps)]


def _milliseconds(before: Any, after: Any) -> float:
    elapsed: float = before.elapsed_time(after) if isinstance(before, torch.cuda.Event) else 1e3 * (after - before)
    return elapsed


def _cuda_stamp() -> torch.cuda.Event:
    """Mark the place in the stream: waiting for the device at every layer would slow the model down."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
