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
from lowrank_nn.graph.lockstep import Pair, run_in_lockstep
from lowrank_nn.layers import CompressedLayer, LowRankLayer, layer_output_shape
from lowrank_nn.layers._quantized import QuantLayer
from lowrank_nn.planning.calibration import model_inputs, several_batches
from lowrank_nn.planning.regression import RIDGES, MomentSums, choose_ridge

MAX_FEATURES = 5000
LEAST_SCALE = 1e-2

Refittable = LowRankLayer | QuantLayer | nn.Conv2d | nn.Linear


def reconstruct(
    dense: nn.Module,
    small: nn.Module,
    batches: Iterable[Any],
    paths: Iterable[str],
    *,
    links: Mapping[str, Link],
    curvature: Mapping[str, Tensor | None] | None = None,
    outputs: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, str]:
    r"""Refit compressed layers one after the other, so that each repairs what is lost ahead of it.

    With u the input patches that a layer gets in the compressed network, and t what the original layer returns in the
    original network for the same image and position, the weight W* that is best for these data is

    .. math:: W^* = W + (D - W C)(C + \epsilon)^{-1}, \quad C = \operatorname{Cov}(u), \; D = \operatorname{Cov}(t, u)

    The layer takes it; the factors of a low-rank layer are fitted to it, from those it has, and a quantized weight is
    rounded to it, under the metric of C and of the network's curvature H in the layer's output. The least squares are
    damped towards the trained weight W (of a layer that lost channels: what is left of it), as much as is best for the
    fourth of the images held out for that. So a layer whose inputs were removed makes up for them by those it still
    has. The refit is kept only if it lowers the error :math:`E (t - \hat W u)^T H (t - \hat W u)`. Then the bias, or
    else the running mean of the normalisation behind the layer, is set so that the mean output is that of the original;
    where there is neither, the moments are taken about zero. The target of a layer whose branch ends in an addition
    also has what the other side of the addition has lost by then, so that the sum is repaired.

    Memory: that of :func:`lowrank_nn.graph.lockstep.run_in_lockstep`, the activations of all batches at one layer in
    both networks; and 16 p (p + o) bytes for the moments of a layer of p inputs per patch and o outputs (per group).
    Cut ``batches`` short where that is too much.

    Args:
        dense: The original network; not changed.
        small: A copy of it in which the layers at ``paths`` are low-rank or quantized, or lost channels; these, and
            running means behind them, are changed in place. After an error or an interrupt it is as far as it got.
        batches: What ``dense`` is called with, batch by batch; see
            :func:`lowrank_nn.planning.calibration.model_inputs`. A single tensor or dict is one batch.
        paths: Dotted paths of these layers.
        links: What :func:`lowrank_nn.graph.find_links` returned for ``dense``.
        curvature: H by path, (groups, o, o); the identity where it is None or missing.
        outputs: By path, the numbers of the original layer's output channels that are left; all where it is missing.
        seed: Seed of everything random.
        progress: Whether to show a progress bar (never when the output is not a terminal).

    Returns:
        By path, why a layer was left as it was, or corrected in part.

    Raises:
        CalibrationError: There are no batches, or a forward failed.
    """
    inputs = [model_inputs(dense, batch) for batch in several_batches(batches)]
    if not inputs:
        raise CalibrationError("reconstruction: there are no batches. Pass an iterable with at least one.")
    paths = list(paths)
    wanted = {path: link for path, link in links.items() if path in paths}
    task = _Task(dense, small, wanted, curvature or {}, outputs or {}, seed)
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
            shared=list(_refitted_buffers(small, task.links)),
            seed=seed,
        )
    unseen = {path: "not refitted: no batch reaches it" for path in task.links if path not in task.visited}
    several = {path: "not refitted: not called exactly once in a forward" for path in paths if path not in links}
    return task.notes | unseen | several


def _refitted_buffers(small: nn.Module, links: Mapping[str, Link]) -> Iterator[Tensor]:
    """Yield the buffers that refits change: running means behind layers, integers of quantized layers."""
    for path, link in links.items():
        yield from small.get_submodule(path).buffers()
        if link.norm:
            yield small.get_buffer(f"{link.norm}.running_mean")


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
        outputs: Mapping[str, Tensor],
        seed: int,
    ) -> None:
        self.links = links
        self.notes: dict[str, str] = {}
        self.visited: set[str] = set()
        self._dense, self._small, self._seed = dense, small, seed
        self._curvature, self._outputs = curvature, outputs

    def visit(self, path: str, pairs: list[Pair]) -> None:
        """Refit the layer at ``path`` to where the runs of both networks stand."""
        self.visited.add(path)
        new = self._small.get_submodule(path)
        assert isinstance(new, Refittable)
        layer = _trained(self._dense.get_submodule(path), new)
        features = layer.weight[0].numel()
        sums = MomentSums(layer, self._seed, products=features <= MAX_FEATURES)
        for x, target in _examples(layer, pairs, self._outputs.get(path), self._scale(path)):
            sums.add(x, target)
        if not sums.images:
            self.notes[path] = "not refitted: no batch reaches it in both networks"
        elif not sums.are_finite():
            self.notes[path] = "not refitted: NaN or infinite values reach it"
        else:
            try:
                self._treat(path, layer, new, sums)
            except LowRankError as error:
                raise error.at(path) from error
            if features > MAX_FEATURES:
                self.notes[path] = f"only its mean output corrected: {features} inputs are too many for a covariance"

    def _treat(self, path: str, layer: nn.Conv2d | nn.Linear, new: Refittable, sums: MomentSums) -> None:
        """Refit the weight and set the mean output right."""
        norm = self.links[path].norm
        if sums.products:
            _refit(layer, new, sums, self._curvature.get(path), about_zero=norm is None and new.bias is None)
        mean, target_mean = sums.means()
        surplus = (new.weight.double().reshape(*target_mean.shape, -1) @ mean[:, :, None])[..., 0] - target_mean
        bias = new.bias
        excess = surplus.flatten() if bias is None else surplus.flatten() + bias
        if norm is not None:
            original = _channels(self._dense.get_buffer(f"{norm}.running_mean"), self._outputs.get(path), 0)
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
        return _channels(scale * module.weight if module.affine else scale, self._outputs.get(path), 0)


def _trained(layer: nn.Module, new: Refittable) -> nn.Conv2d | nn.Linear:
    """Return a plain layer of the shape of ``new`` with the weight that it is to stay near."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    source = layer if weight.shape == new.weight.shape else new
    plain = source.to_dense_layer() if isinstance(source, CompressedLayer) else source
    assert isinstance(plain, (nn.Conv2d, nn.Linear))
    return plain


def _channels(values: Tensor, chosen: Tensor | None, dim: int) -> Tensor:
    """Return the chosen entries along ``dim``; all of them if None."""
    return values if chosen is None else values.index_select(dim, chosen.to(values.device))


def _examples(
    layer: nn.Conv2d | nn.Linear, pairs: list[Pair], outputs: Tensor | None, scale: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what the layer is called with and what it is to return, from batches that reach it in both networks."""
    dim = -3 if isinstance(layer, nn.Conv2d) else -1
    for first, second in pairs:
        if first is None or second is None:
            continue
        x, y = second.input, first.output
        if x is None or not isinstance(y, Tensor) or x.is_nested or y.is_nested or not x.is_floating_point():
            continue
        y = _channels(y, outputs, dim)
        if x.numel() > 0 and layer_output_shape(layer, x.shape) == tuple(y.shape):
            before = None if first.shortcut is None else _channels(first.shortcut, outputs, dim)
            yield x, y + _lost(layer, y, before, second.shortcut, scale)


def _lost(
    layer: nn.Conv2d | nn.Linear, output: Tensor, before: Tensor | None, now: Tensor | None, scale: Tensor | None
) -> Tensor | float:
    """Return what the other side of the addition behind the layer lacks, in units of the layer's output."""
    if before is None or now is None or not before.shape == now.shape == output.shape:
        return 0.0
    lost = before.to(torch.promote_types(before.dtype, torch.float32)) - now
    if scale is None:
        return lost
    inverse = torch.where(scale.abs() < LEAST_SCALE, 0, 1 / scale)
    return lost * (inverse[:, None, None] if isinstance(layer, nn.Conv2d) else inverse)


def _refit(
    layer: nn.Conv2d | nn.Linear,
    new: Refittable,
    sums: MomentSums,
    curvature: Tensor | None,
    *,
    about_zero: bool,
) -> None:
    """Set the weight to what is best for the data; leave it as it is where that is no gain."""
    moments = sums.moments().raw() if about_zero else sums.moments()
    weight = layer.weight.detach().double().clone().reshape(moments.cross.shape)  # the layer may be ``new`` itself
    ridge = choose_ridge(sums, weight, curvature, about_zero=about_zero)
    left = moments.left_by(weight)
    best = weight if ridge is None else weight + left.least_squares(ridge)
    metric = Metric(moments.damped(ridge or RIDGES[0]), torch.zeros_like(moments.mean), curvature)

    def gain() -> float:
        return left.gain(new.weight.double().reshape(weight.shape) - weight, curvature)

    rounded = best.reshape(new.weight.shape).to(new.weight.dtype)
    if not rounded.isfinite().all():  # of inputs that have all but vanished
        return
    tensors = [*new.parameters(), *new.buffers()]
    kept, before = [tensor.clone() for tensor in tensors], gain()
    if isinstance(new, LowRankLayer):
        new.refit_(rounded, metric)
    elif isinstance(new, QuantLayer):
        new.approximate_(rounded, metric)
    else:
        new.weight.copy_(rounded)
    if not gain() > before:
        for tensor, values in zip(tensors, kept, strict=True):
            tensor.copy_(values)
