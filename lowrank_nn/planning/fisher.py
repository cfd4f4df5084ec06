"""The diagonal Fisher information of a model's weights: what second-order pruning scores with."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.errors import CalibrationError, OptionError
from lowrank_nn.graph.fold import DENSE
from lowrank_nn.graph.preserve import untouched
from lowrank_nn.layers import PrunedConv2d, PrunedLayer

BatchLoss = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch)``: calls the model on the batch and returns a scalar."""


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    loss: BatchLoss,
    *,
    paths: Iterable[str] | None = None,
    max_batches: int | None = None,
    per_sample: bool = True,
) -> dict[str, Tensor]:
    r"""Return F = mean over samples of (d loss / d weight)^2 for the weight of each layer.

    With the negative log-likelihood for a loss this is the empirical Fisher information, which stands for the diagonal
    of the loss's second derivative near a minimum. The square is taken per sample, so every batch is cut along its
    first dim, and the model runs forward and backward once for each sample: the cost is that of so many training
    steps at batch size 1. With ``per_sample=False`` it runs once per batch, and F is the mean over batches of the
    squared gradient of the batch's loss: where the loss is a mean over B samples whose gradients are independent with
    mean zero, this estimates F / B, with far more noise for the same number of samples.

    The model runs in evaluation mode (dropout off, fixed batch statistics). Its modes, gradients, ``requires_grad``
    flags and buffers and the global random state are afterwards as they were, also after an error.

    Args:
        model: The network.
        batches: What ``loss`` takes, such as ``(images, labels)``: tensors, or tuples, lists and mappings of them; in
            each batch all tensors with dims have the same first one.
        loss: ``loss(model, batch)``, a scalar; called with batches of one sample unless ``per_sample`` is off.
        paths: Layers wanted; by default every convolution, linear layer and masked layer, also inside low-rank layers.
        max_batches: Stop after this many batches.
        per_sample: Whether squares are taken for each sample.

    Returns:
        By path, a tensor of the layer's dense weight's shape, float32 at least. Layers that the loss does not depend
        on are left out. Masked entries of a pruned layer are zero.

    Raises:
        OptionError: A path leads to no layer of these kinds, or ``max_batches`` is below 1.
        CalibrationError: No batch came, a batch cannot be cut into samples, or a loss is not a finite scalar that
            depends on the weights.

    References:
        LeCun et al. 1990, "Optimal Brain Damage"; Theis et al. 2018, "Faster gaze prediction with dense networks and
        Fisher pruning", for the empirical Fisher information in its place.
    """
    if max_batches is not None and max_batches < 1:
        raise OptionError(f"diagonal_fisher: max_batches must be at least 1, got {max_batches}.")
    layers = _layers(model, paths)
    weights = {path: _parameter(layer) for path, layer in layers.items()}
    sums: dict[str, Tensor] = {}
    count = 0
    with untouched(model), torch.enable_grad():
        model.eval().requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in itertools.islice(batches, max_batches):
            for sample in _samples(batch) if per_sample else (batch,):
                _add_squares(sums, weights, _checked(loss(model, sample)))
                count += 1
    if not count:
        raise CalibrationError(
            "diagonal_fisher: batches gave nothing. Pass at least one batch; an iterator is used up."
        )
    return {path: _dense(layers[path], sums[path] / count) for path in layers if path in sums}


def _layers(model: nn.Module, paths: Iterable[str] | None) -> dict[str, nn.Module]:
    known = {path: layer for path, layer in model.named_modules(remove_duplicate=False) if _is_weighted(layer)}
    if paths is None:
        return {path: layer for path, layer in model.named_modules() if path in known}
    wanted = list(paths)
    unknown = [path for path in wanted if path not in known]
    if unknown:
        raise OptionError(
            f"diagonal_fisher: no convolution, linear or masked layer with a weight of its own at "
            f"{', '.join(map(repr, unknown))}; there are: {', '.join(map(repr, known)) or 'none'}."
        )
    return {path: known[path] for path in wanted}


def _is_weighted(layer: nn.Module) -> bool:
    return isinstance(layer, PrunedLayer) or (isinstance(layer, DENSE) and "weight" in layer._parameters)


def _parameter(layer: nn.Module) -> nn.Parameter:
    return layer.get_parameter("kernel" if isinstance(layer, PrunedLayer) else "weight")


def _dense(layer: nn.Module, values: Tensor) -> Tensor:
    """Return values of the stored kernel in the dense weight's shape."""
    return layer.embed(values) if isinstance(layer, PrunedConv2d) else values


def _checked(loss: Tensor) -> Tensor:
    if loss.numel() != 1 or not bool(torch.isfinite(loss)):
        shown = f"shape {tuple(loss.shape)}" if loss.numel() != 1 else f"{loss.item()}"
        raise CalibrationError(f"diagonal_fisher: loss must return one finite number, got {shown}.")
    if not loss.requires_grad:
        raise CalibrationError(
            "diagonal_fisher: the loss does not depend on the weights asked for. Look for detach() or no_grad() in it."
        )
    return loss.reshape(())


def _add_squares(sums: dict[str, Tensor], weights: dict[str, nn.Parameter], loss: Tensor) -> None:
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    for path, gradient in zip(weights, gradients, strict=True):
        if gradient is None:
            continue
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if path in sums:
            sums[path].addcmul_(wide, wide)
        else:
            sums[path] = wide.square()


def _samples(batch: Any) -> Iterator[Any]:
    """Yield the samples of a batch, each as a batch of one."""
    sizes = {tensor.shape[0] for tensor in _tensors(batch) if tensor.dim()}
    if len(sizes) > 1:
        raise CalibrationError(
            f"diagonal_fisher: the tensors of a batch have first dims of {sorted(sizes)}, so it cannot be cut into "
            "samples. Pass batches whose tensors all start with the batch dim, or per_sample=False."
        )
    if not sizes:
        yield batch
    for size in sizes:
        for index in range(size):
            yield _cut(batch, index)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (tuple, list)):
        for item in batch:
            yield from _tensors(item)
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from _tensors(item)


def _cut(batch: Any, index: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[index : index + 1] if batch.dim() else batch
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_cut(item, index) for item in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_cut(item, index) for item in batch)
    if isinstance(batch, Mapping):
        return _cut_mapping(batch, index)
    return batch


def _cut_mapping(batch: Mapping[Any, Any], index: int) -> Any:
    # A copy, because classes of mappings (defaultdict, a tokenizer's output) differ in how they are built.
    cut: Any = copy.copy(batch)
    for key, value in batch.items():
        cut[key] = _cut(value, index)
    return cut
