"""Refitting the layers of a compressed network in the order of execution, each on what those before it return."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from tqdm.auto import tqdm

from lowrank_nn.decompose import Metric
from lowrank_nn.errors import CalibrationError, LowRankError
from lowrank_nn.graph import Link
from lowrank_nn.graph.lockstep import Pair, Stop, run_in_lockstep
from lowrank_nn.layers import LowRankLayer, layer_output_shape
from lowrank_nn.planning.calibration import model_inputs
from lowrank_nn.planning.regression import RIDGES, MomentSums, choose_ridge

MAX_FEATURES = 5000
LEAST_SCALE = 1e-2


def reconstruct(
    dense: nn.Module,
    small: nn.Module,
    batches: Iterable[Any],
    paths: Iterable[str],
    *,
    links: Mapping[str, Link],
    curvature: Mapping[str, Tensor | None] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, str]:
    r"""Refit low-rank layers one after the other, so that each repairs what is lost ahead of it.

    With u the input patches that a layer gets in the compressed network, and t what the original layer returns in the
    original network for the same image and position, the layer's factors are fitted anew, from those it has, to the
    weight W* that is best for these data:

    .. math:: W^* = W + (D - W C)(C + \epsilon)^{-1}, \quad C = \operatorname{Cov}(u), \; D = \operatorname{Cov}(t, u)

    under the metric of C and of the network's curvature H in the layer's output. The least squares are damped towards
    the trained weight W, as much as is best for the fourth of the images held out for that. The refit is kept only if
    it lowers the error :math:`E (t - \hat W u)^T H (t - \hat W u)`. Then the bias, or else the running mean of the
    normalisation behind the layer, is set so that the mean output is that of the original; where there is neither,
    the moments are taken about zero. The target of a layer whose branch ends in an addition also has what the other
    side of the addition has lost by then, so that the sum is repaired.

    Memory: that of :func:`lowrank_nn.graph.lockstep.run_in_lockstep`, the activations of all batches at one layer in
    both networks; and 16 p (p + o) bytes for the moments of a layer of p inputs per patch and o outputs (per group).
    Cut ``batches`` short where that is too much.

    Args:
        dense: The original network; not changed.
        small: A copy of it in which the layers at ``paths`` are low-rank; these, and running means behind them, are
            changed in place. After an error or an interrupt it is as far as it got.
        batches: What ``dense`` is called with, batch by batch; see
            :func:`lowrank_nn.planning.calibration.model_inputs`. A single tensor or dict is one batch.
        paths: Dotted paths of the low-rank layers.
        links: What :func:`lowrank_nn.graph.find_links` returned for ``dense``.
        curvature: H by path, (groups, o, o); the identity where it is None or missing.
        seed: Seed of everything random.
        progress: Whether to show a progress bar (never when the output is not a terminal).

    Returns:
        By path, why a layer was left as it was, or corrected in part.

    Raises:
        CalibrationError: There are no batches, or a forward failed.
    """
    if isinstance(batches, (Tensor, Mapping)):
        batches = [batches]
    inputs = [model_inputs(dense, batch) for batch in batches]
    if not inputs:
        raise CalibrationError("reconstruction: there are no batches. Pass an iterable with at least one.")
    paths = list(paths)
    task = _Task(dense, small, {path: link for path, link in links.items() if path in paths}, curvature or {}, seed)
    with tqdm(total=len(task.links), desc="reconstruction", disable=None if progress else True, leave=False) as bar:

        def visit(path: str, pairs: list[Pair]) -> None:
            task.visit(path, pairs)
            bar.update()

        run_in_lockstep(
            dense,
            small,
            inputs,
            list(task.links),
            visit,
            shortcuts={path: link.shortcut for path, link in task.links.items() if link.shortcut is not None},
            shared=[small.get_buffer(f"{link.norm}.running_mean") for link in task.links.values() if link.norm],
            seed=seed,
        )
    unseen = {path: "as fitted at first: no batch reaches it" for path in task.links if path not in task.visited}
    several = {path: "as fitted at first: not called exactly once in a forward" for path in paths if path not in links}
    return task.notes | unseen | several


class _Task:
    """Refits one layer after the other.

    Attributes:
        links: By path, in the order of the calls, what stands behind the layers to refit.
        notes: Why layers were left as they were.
        visited: Layers that have been looked at.
    """

    def __init__(
        self,
        dense: nn.Module,
        small: nn.Module,
        links: dict[str, Link],
        curvature: Mapping[str, Tensor | None],
        seed: int,
    ) -> None:
        self.links = links
        self.notes: dict[str, str] = {}
        self.visited: set[str] = set()
        self._dense, self._small, self._curvature, self._seed = dense, small, curvature, seed

    def visit(self, path: str, pairs: list[Pair]) -> None:
        """Refit the layer at ``path`` to where the runs of both networks stand."""
        self.visited.add(path)
        layer, new = self._dense.get_submodule(path), self._small.get_submodule(path)
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        assert isinstance(new, LowRankLayer)
        features = layer.weight[0].numel()
        sums = MomentSums(layer, self._seed, products=features <= MAX_FEATURES)
        for x, target in _examples(layer, pairs, self._scale(path)):
            sums.add(x, target)
        if not sums.images:
            self.notes[path] = "as fitted at first: no batch reaches it in both networks"
        elif not sums.are_finite():
            self.notes[path] = "as fitted at first: NaN or infinite values reach it"
        else:
            try:
                self._treat(path, layer, new, sums)
            except LowRankError as error:
                raise error.at(path) from error
            if features > MAX_FEATURES:
                self.notes[path] = f"only its mean output corrected: {features} inputs are too many for a covariance"

    def _treat(self, path: str, layer: nn.Conv2d | nn.Linear, new: LowRankLayer, sums: MomentSums) -> None:
        """Refit the factors and set the mean output right."""
        norm = self.links[path].norm
        if sums.products:
            _refit(layer, new, sums, self._curvature.get(path), about_zero=norm is None and new.bias is None)
        mean, target_mean = sums.means()
        surplus = (new.dense_weight().double().reshape(*target_mean.shape, -1) @ mean[:, :, None])[..., 0] - target_mean
        bias = new.bias
        excess = surplus.flatten() if bias is None else surplus.flatten() + bias
        if norm is not None:
            original = self._dense.get_buffer(f"{norm}.running_mean")
            self._small.get_buffer(f"{norm}.running_mean").copy_(original + excess)
        elif bias is not None:
            bias.sub_(excess)

    def _scale(self, path: str) -> Tensor | None:
        """Return the factor of each channel between the layer's output and the addition behind it."""
        norm = self.links[path].norm
        if norm is None:
            return None
        module = self._dense.get_submodule(norm)
        assert isinstance(module, _NormBase)
        assert module.running_var is not None
        scale = (module.running_var + module.eps).rsqrt()
        return scale * module.weight if module.affine else scale


def _examples(layer: nn.Conv2d | nn.Linear, pairs: list[Pair], scale: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what the layer is called with and what it is to return, from batches that reach it in both networks."""
    for first, second in pairs:
        if first is None or second is None:
            continue
        x, y = second.input, first.output
        if x is None or not isinstance(y, Tensor) or x.is_nested or y.is_nested or not x.is_floating_point():
            continue
        if x.numel() > 0 and layer_output_shape(layer, x.shape) == tuple(y.shape):
            yield x, y + _lost(layer, first, second, scale)


def _lost(layer: nn.Conv2d | nn.Linear, first: Stop, second: Stop, scale: Tensor | None) -> Tensor | float:
    """Return what the other side of the addition behind the layer lacks, in units of the layer's output."""
    before, now = first.shortcut, second.shortcut
    if before is None or now is None or not before.shape == now.shape == first.output.shape:
        return 0.0
    lost = before.to(torch.promote_types(before.dtype, torch.float32)) - now
    if scale is None:
        return lost
    inverse = torch.where(scale.abs() < LEAST_SCALE, 0, 1 / scale)
    return lost * (inverse[:, None, None] if isinstance(layer, nn.Conv2d) else inverse)


def _refit(
    layer: nn.Conv2d | nn.Linear,
    new: LowRankLayer,
    sums: MomentSums,
    curvature: Tensor | None,
    *,
    about_zero: bool,
) -> None:
    """Refit the factors to the best weight for the data; leave them as they are where that is no gain."""
    moments = sums.moments().raw() if about_zero else sums.moments()
    weight = layer.weight.detach().double().reshape(moments.cross.shape)
    ridge = choose_ridge(sums, weight, curvature, about_zero=about_zero)
    best = weight if ridge is None else weight + moments.improvement(weight, ridge)
    metric = Metric(moments.damped(ridge or RIDGES[0]), torch.zeros_like(moments.mean), curvature)

    def gain() -> float:
        return moments.gain(weight, new.dense_weight().double().reshape(weight.shape) - weight, curvature)

    kept, before = [parameter.clone() for parameter in new.parameters()], gain()
    new.refit_(best.reshape(layer.weight.shape).to(layer.weight.dtype), metric)
    if not gain() > before:
        for parameter, values in zip(new.parameters(), kept, strict=True):
            parameter.copy_(values)
