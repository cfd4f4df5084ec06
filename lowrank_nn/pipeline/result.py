"""What compress_model() returns."""

from __future__ import annotations

import dataclasses

from torch import nn

from lowrank_nn.report import Report


@dataclasses.dataclass(frozen=True)
class Probe:
    """A size that was tried under ``Budget(accuracy_drop=...)``.

    Attributes:
        share: Share of the dense model that was asked for.
        metric: What ``evaluate`` said of the compressed model.
        drop: By how much that is less than what it said of the dense model.
        report: What became of each layer.
    """

    share: float
    metric: float
    drop: float
    report: Report = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """A compressed model and the account of it.

    Attributes:
        model: The compressed model: an ordinary module with the same forward, in the mode of the given one.
        report: What became of each layer, computed from ``model``.
        plan: What was planned, as :func:`plan` returns it.
        probes: Sizes that were tried, in order, where the budget is a drop of accuracy.
    """

    model: nn.Module
    report: Report
    plan: Report
    probes: tuple[Probe, ...] = ()

    def __repr__(self) -> str:
        rates = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in self.report.compression_rate.items())
        return f"Result({type(self.model).__name__}, smaller by: {rates})"
