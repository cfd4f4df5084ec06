"""What a step learns from calibration data, and how it carries its decisions out with it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.decompose import Metric
from lowrank_nn.errors import CalibrationError, PlanError
from lowrank_nn.graph.links import Link, find_links
from lowrank_nn.graph.surgery import named_tensors
from lowrank_nn.pipeline.apply import refusal
from lowrank_nn.pipeline.reconstruct import reconstruct
from lowrank_nn.pipeline.state import Decision, State, build
from lowrank_nn.planning import BatchLoss, collect_metrics, diagonal_fisher


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What calibration data say about the layers of a model.

    Attributes:
        metrics: By path; layers that the data never reach are not among them.
        links: By path, the norm behind a layer and the residual sum that it closes.
    """

    metrics: dict[str, Metric]
    links: dict[str, Link]

    def metric(self, path: str) -> Metric | None:
        """Return the metric that a layer is fitted under: without a mean where the norm behind it makes up for that."""
        metric = self.metrics.get(path)
        if metric is None or self.norm(path) is None:
            return metric
        return metric.without_mean()

    def norm(self, path: str) -> str | None:
        """Return the path of the norm right behind a layer, if there is one."""
        link = self.links.get(path)
        return None if link is None else link.norm


def uses_data(step: str, state: State, data_aware: bool | None, *, by_default: bool) -> bool:
    """Whether the calibration data have a say.

    Args:
        step: Name of the step, for the message.
        state: The state of the recipe.
        data_aware: What the user asks for; None for the default.
        by_default: Whether they have one unless told otherwise, where there are any.

    Raises:
        CalibrationError: They must, and there are none.
    """
    if data_aware and state.calibration is None:
        raise CalibrationError(
            f"{step}: data_aware needs calibration batches. Pass compress_model(..., calibration=batches)."
        )
    return by_default and state.calibration is not None if data_aware is None else data_aware


def gather_once(state: State, *, curvature: bool) -> Evidence:
    """Return what the data say about the given model, or what is left of it; computed once for all dry runs."""
    model, recording = state.base
    key = _key(model, curvature)
    if key not in state.cache:
        layers = [site for site in recording.sites if site.inside is None and not refusal(site)]
        paths = [site.path for site in layers if isinstance(site.layer, (nn.Conv2d, nn.Linear))]
        state.cache[key] = _gather(state, model, paths, curvature=curvature)
    found: Evidence = state.cache[key]
    return found


def _key(model: nn.Module, curvature: bool) -> Any:
    return (Evidence, curvature, model)


def _gather(state: State, model: nn.Module, paths: Sequence[str], *, curvature: bool) -> Evidence:
    """Run ``model`` over the calibration data and return what the fits of its layers at ``paths`` need."""
    assert state.calibration is not None
    metrics = collect_metrics(
        model, state.calibration, paths, curvature=curvature, seed=state.seed, progress=state.progress
    )
    return Evidence(metrics, find_links(model, state.example_inputs))


def carry_out(
    step: str,
    state: State,
    decisions: Sequence[Decision],
    *,
    curvature: bool,
    data: Mapping[str, dict[str, Any]] | None = None,
    sequential: bool,
) -> None:
    """Replace layers as decided, each fitted to what the data show, and correct what that does to mean outputs.

    Args:
        step: Name of the step, for progress bars and remarks.
        state: The model on its way; changed.
        decisions: What becomes of each layer.
        curvature: Whether errors count by what they do to the network's output, or to the layer's own.
        data: By path, what else the layers are built with that was measured.
        sequential: Whether to fit all layers once more, in the order of execution, to what the compressed layers
            before them make of the data; factors of a low-rank layer are not.
    """
    replaced = [decision for decision in decisions if decision.layer_class is not None]
    paths = [decision.path for decision in replaced]
    changed = changed_since_given(state)
    before = copy.deepcopy(state.model) if changed else state.dense
    evidence = None if changed else state.cache.get(_key(state.dense, curvature))
    if evidence is None or not evidence.metrics.keys() >= set(paths):  # layers compressed before are not gathered
        evidence = _gather(state, state.model, paths, curvature=curvature)
    for decision in state.watch(replaced, f"{step}: fits"):
        metric = evidence.metric(decision.path)
        layer = state.model.get_submodule(decision.path)
        measured = (data or {}).get(decision.path, {})
        fitted = {} if metric is None else {"metric": metric}
        state.replace(decision.path, build(decision, layer, measured | fitted))
    for path in paths:
        _correct_mean(state.model, before, path, evidence)
    if sequential:
        factors = {site.path for site in state.sites() if site.inside is not None}
        notes = _reconstruct(state, before, [path for path in paths if path not in factors], evidence)
        for path, note in notes.items():
            state.remark(path, f"{step}: {note}")


def _reconstruct(state: State, before: nn.Module, paths: Sequence[str], evidence: Evidence) -> dict[str, str]:
    assert state.calibration is not None
    curvature = {path: metric.curvature for path, metric in evidence.metrics.items()}
    return reconstruct(
        before,
        state.model,
        state.calibration,
        paths,
        links=evidence.links,
        curvature=curvature,
        seed=state.seed,
        progress=state.progress,
    )


@torch.no_grad()
def _correct_mean(model: nn.Module, before: nn.Module, path: str, evidence: Evidence) -> None:
    """Shift the norm behind a layer by the change of the layer's mean output."""
    norm = evidence.norm(path)
    if norm is None or path not in evidence.metrics:
        return
    new, old = (net.get_submodule(path).weight for net in (model, before))
    assert isinstance(new, Tensor)
    assert isinstance(old, Tensor)
    running_mean = model.get_buffer(f"{norm}.running_mean")
    running_mean += evidence.metrics[path].mean_output(new - old).to(running_mean)


def measured_fisher(
    step: str, state: State, decisions: Sequence[Decision], batches: Iterable[Any], loss: BatchLoss
) -> dict[str, dict[str, Any]]:
    """Return by path the diagonal Fisher information of each layer, as the option ``fisher`` that it is built with.

    Args:
        step: Name of the step, for the message.
        state: The model on its way.
        decisions: Those that replace a layer.
        batches: Batches for ``loss``.
        loss: ``loss(model, batch)``, a scalar.

    Raises:
        PlanError: The loss does not depend on some of the layers.
        CalibrationError: There are no batches, or the loss is not finite.
    """
    paths = [decision.path for decision in decisions]
    fisher = diagonal_fisher(state.model, batches, loss, paths=paths)
    missing = sorted(set(paths) - set(fisher))
    if missing:
        raise PlanError(f"{step}: the loss does not depend on {', '.join(missing)}; leave them out (but_not=...).")
    return {path: {"fisher": fisher[path]} for path in paths}


def changed_since_given(state: State) -> bool:
    """Whether an earlier step changed a value that the model computes with."""
    given, now = named_tensors(state.dense), named_tensors(state.model)  # a state dict may hold anything
    return given.keys() != now.keys() or not all(torch.equal(given[name], now[name]) for name in given)
