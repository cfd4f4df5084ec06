"""Importance of units from the second moments of what reads them: LASSO, ThiNet and OBS as criteria of pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.decompose import Metric
from lowrank_nn.errors import CalibrationError
from lowrank_nn.graph import find_links
from lowrank_nn.graph.groups import ChannelGroup, Member
from lowrank_nn.planning.calibration import model_inputs, several_batches
from lowrank_nn.planning.metrics import collect_metrics
from lowrank_nn.planning.selection import Reader, greedy_scores, lasso_scores, obs_scores
from lowrank_nn.planning.unit_signals import Score, readers

MOMENT_CRITERIA: dict[str, Callable[[Sequence[Reader]], Tensor]] = {
    "lasso": lasso_scores,
    "thinet": greedy_scores,
    "obs": obs_scores,
}


def from_moments(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: str,
    calibration: Iterable[Any] | None,
    *,
    corrected: bool,
    seed: int,
    progress: bool,
) -> Score:
    """Collect the metrics of all readers, and return what scores a group by them.

    A group of which some reader is neither an ``nn.Conv2d`` nor an ``nn.Linear`` that is called gets no scores.

    Args:
        model: The model; left as it was.
        groups: Groups of this model.
        criterion: A key of ``MOMENT_CRITERIA``.
        calibration: Batches of inputs.
        corrected: Whether a bias, or the norm behind a reader, will make up for the change of its mean output.
        seed: Seed of the positions and probes.
        progress: Whether to show a progress bar.

    Raises:
        CalibrationError: There are no batches, or they are not usable.
    """
    if calibration is None:
        raise CalibrationError(
            f"criterion={criterion!r} looks at what layers are called with, and there are no calibration batches. Pass "
            "compress_model(..., calibration=batches)."
        )
    batches = several_batches(calibration)
    paths = dict.fromkeys(path for group in groups for path, _, _ in readers_of(model, group))
    metrics = collect_metrics(model, batches, paths, seed=seed, progress=progress)
    makes_up = _making_up(model, batches, paths) if corrected else set()

    def score(group: ChannelGroup) -> Tensor | None:
        found = [
            _reader(layer, member, metrics[path] if path in makes_up else metrics[path].with_mean())
            for path, layer, member in readers_of(model, group)
            if path in metrics
        ]
        # A reader that was not looked at, such as a transposed convolution, may need what the others do not.
        every = sum(member.role == "in" for member in group.members)
        return MOMENT_CRITERIA[criterion](found).cpu() if found and len(found) == every else None

    return score


def readers_of(model: nn.Module, group: ChannelGroup) -> Iterator[tuple[str, nn.Conv2d | nn.Linear, Member]]:
    """Yield the layers that multiply the units of a group with columns of their weight: path, layer and member."""
    for path, layer, member in readers(model, group):
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and member.dim == 1:
            yield path, layer, member


def _making_up(model: nn.Module, batches: Iterable[Any], paths: Iterable[str]) -> set[str]:
    """Return the layers that have a bias, or a norm by running statistics behind them."""
    links = find_links(model, model_inputs(model, next(iter(batches))))
    normed = {path for path, link in links.items() if link.norm is not None}
    return normed | {path for path in paths if model.get_submodule(path).bias is not None}


def _reader(layer: nn.Conv2d | nn.Linear, member: Member, metric: Metric) -> Reader:
    return Reader.of(layer.weight, metric, torch.tensor(member.positions, device=metric.mean.device))
