"""Latency budgets on ResNet-18, one image of 224 x 224: estimated and measured times, and what MACs would have chosen.

python benchmarks/latency.py --threads 1

The weights are random, the spectra of every kernel's channels decay as i^-1/2, as those of trained networks do. For
each budget: the share of the dense time that is asked, estimated before the choice was timed as a whole, measured then,
and measured at the end, after the estimates were corrected. Beside it the error of the choice (the sum over layers of
-log(1 - e), e the relative squared change of the weight: what both budgets make small), and the error of the budget of
MACs that is measured to take as long, interpolated between budgets. Times are of whole forwards, in turn with the dense
network. Prints two Markdown tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from models import ResNet18
from torch import Tensor, nn

import lowrank_nn as lnn
from lowrank_nn.graph import record
from lowrank_nn.pipeline.dryrun import DryRun, dry_run
from lowrank_nn.pipeline.latency import dry_run_in_time
from lowrank_nn.pipeline.state import State
from lowrank_nn.planning import Clock, present_layers

BUDGETS = (0.8, 0.6, 0.5, 0.4, 0.35)
MACS = (0.85, 0.7, 0.55, 0.45, 0.35, 0.28, 0.22, 0.17, 0.13)
FORMATS = ("TuckerConv2d", "SVDConv2d", "SpatialSVDConv2d", "SVDLinear")


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Give the channels of every kernel a spectrum that decays as i^-1/2, and torch's variance for ReLU networks."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            for mode in (0, 1):
                layer.weight.copy_(decaying(layer.weight, mode))
            layer.weight.mul_(math.sqrt(2 / layer.weight[0].numel()) / layer.weight.std())


def decaying(kernel: Tensor, mode: int) -> Tensor:
    """Return the kernel with one mode turned at random and scaled by i^-1/2."""
    size = kernel.shape[mode]
    basis, _ = torch.linalg.qr(torch.randn(size, size))
    scales = torch.arange(1, size + 1) ** -0.5
    return torch.tensordot(basis * scales, kernel, dims=([1], [mode])).movedim(0, mode)


def error_of(planned: DryRun) -> float:
    """Return the sum over layers of -log of the share of energy kept."""
    return sum(-math.log(1 - error**2) for error in planned.errors().values())


def measured(clock: Clock, planned: DryRun) -> float:
    """Return the time of what was planned over that of the dense model: the median of three measurements."""
    return statistics.median(clock.measure(present_layers(planned.state.recording())) for _ in range(3))


def latency_rows(start: State, steps: Sequence[lnn.Step], clock: Clock) -> list[tuple[float, ...]]:
    """Return (asked, estimated first, measured then, measured in the end, error) for every budget."""
    rows = []
    for share in BUDGETS:
        state = dataclasses.replace(start, budget=lnn.Budget(latency=share), clock=clock)
        first = dry_run(state, steps)
        estimate = first.state.latency() / clock.dense
        then = measured(clock, first)
        last = dry_run_in_time(state, steps)
        rows.append((share, estimate, then, measured(clock, last), error_of(last)))
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = ResNet18().eval()
    draw_weights(model)
    inputs = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    steps = [lnn.LowRank(formats=[getattr(lnn, name) for name in arguments.formats], but_not="conv1")]
    recording = record(model, inputs)
    clock = Clock(model, recording, inputs)
    start = State(model, model, recording, inputs, progress=False)
    rows = latency_rows(start, steps, clock)
    curve: list[tuple[float, ...]] = []
    start = dataclasses.replace(start, cache={})  # candidates of any rank, not of whole vectors
    for share in MACS:
        planned = dry_run(dataclasses.replace(start, budget=lnn.Budget(macs=share)), steps)
        curve.append((share, measured(clock, planned), error_of(planned)))
    print_tables(rows, curve, clock)


def print_tables(rows: list[tuple[float, ...]], curve: list[tuple[float, ...]], clock: Clock) -> None:
    """Print both as Markdown."""
    print(f"dense {clock.dense:.1f} ms; the formula's median error over all timed calls {clock.median_error:.1%}\n")
    print("| asked | estimated | measured | at the end | error | MACs budget at that time | less |\n|" + " ---: |" * 7)
    shares, times, errors = (np.array(column) for column in zip(*sorted(curve, key=lambda row: row[1]), strict=True))
    for asked, estimate, then, last, error in rows:
        other = math.exp(float(np.interp(last, times, np.log(errors))))
        cells = [f"{asked:.2f}", *(f"{value:.3f}" for value in (estimate, then, last, error, other))]
        print("| " + " | ".join([*cells, f"{1 - error / other:.0%}"]) + " |")
    print("\n| MACs asked | measured time | error |\n|" + " ---: |" * 3)
    for share, time, error in zip(shares, times, errors, strict=True):
        print(f"| {share:.2f} | {time:.3f} | {error:.3f} |")


if __name__ == "__main__":
    main()
