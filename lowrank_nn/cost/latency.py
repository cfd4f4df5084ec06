"""Measured time of two models side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lowrank_nn.accelerator import used_accelerator


class Timing(NamedTuple):
    """Times of two callables run in turn.

    Attributes:
        first: Median milliseconds of the first.
        second: Median milliseconds of the second.
        ratio: Median over rounds of first / second.
    """

    first: float
    second: float
    ratio: float


def compare_speed(first: Callable[[], Any], second: Callable[[], Any], *, rounds: int = 15, warmup: int = 3) -> Timing:
    """Time two callables in the same process, in turn, the order swapped every round.

    A ratio of times taken one after the other depends on what else the machine was doing; taken in turn, both
    sides see the same machine.

    Args:
        first: The reference.
        second: What is compared with it.
        rounds: Number of rounds; each runs both once.
        warmup: Rounds that are run and not counted.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(-warmup, rounds):
        sides = ((0, first), (1, second)) if index % 2 else ((1, second), (0, first))
        for side, call in sides:
            elapsed = _milliseconds(call)
            if index >= 0:
                times[side].append(elapsed)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    return Timing(statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios))


def _milliseconds(call: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return 1e3 * (time.perf_counter() - start)


def _wait() -> None:
    if used_accelerator() is not None:
        torch.accelerator.synchronize()
