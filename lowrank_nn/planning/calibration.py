"""Running a model on calibration data, and watching the calls of its layers."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_nn.errors import CalibrationError, LowRankError, PlanError
from lowrank_nn.graph.inputs import run_batch, tensors
from lowrank_nn.graph.sites import describe_paths


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """A batch of which all is known to be what the model is called with.

    Attributes:
        inputs: For :func:`lowrank_nn.graph.call_model`.
    """

    inputs: Any


def model_inputs(model: nn.Module, batch: Any) -> Any:
    """Return what ``model`` is called with out of a calibration batch, labels left out.

    It is meant for :func:`lowrank_nn.graph.call_model`.

    A tensor, or anything else that is not a tuple or list, is taken whole; a mapping holds keyword arguments, or is the
    argument of a model that takes no such keywords. Of a tuple or list the leading items are taken, as many as the
    model's forward has required arguments, at least one: ``(images, labels)`` gives the images to a model of one
    argument. Its first item may also be such a mapping, or, where the model has several arguments, the tuple or list of
    them: ``((left, right), labels)``.

    Args:
        model: The model.
        batch: One batch, such as a ``DataLoader`` yields, or :class:`ModelInputs`.
    """
    if isinstance(batch, ModelInputs):
        return batch.inputs
    if isinstance(batch, Mapping):
        return batch if _takes_keywords(model, batch) else (batch,)
    if not isinstance(batch, (tuple, list)) or not batch:
        return batch
    needed, first = _required_arguments(model), batch[0]
    if isinstance(first, Mapping) and _takes_keywords(model, first):
        return first
    if needed > 1 and isinstance(first, (tuple, list)):
        return tuple(first)
    return tuple(batch[: max(needed, 1)])


def layers_at(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Return the layers at dotted paths, each path once; "" is the model itself.

    Raises:
        PlanError: There is no layer at a path.
    """
    layers = {}
    for path in paths:
        try:
            layers[path] = model.get_submodule(path)
        except AttributeError:
            leaves = (name for name, module in model.named_modules() if not module._modules)
            raise PlanError(f"calibration: no layer at {path!r}. {describe_paths(leaves)}") from None
    return layers


def watch(
    layer: nn.Module,
    path: str,
    *,
    before: Callable[[Tensor], None] | None = None,
    after: Callable[[Tensor, Any], None] | None = None,
) -> None:
    """Have every call of ``layer`` watched until :func:`lowrank_nn.graph.preserve.evaluating` restores its attributes.

    The forward is wrapped on the instance: hooks would change the way that torch's own modules run.

    Args:
        layer: The layer.
        path: Where it stands; errors of the callbacks are located there.
        before: Called with the first tensor among the arguments, ahead of the layer's own forward.
        after: Called with that tensor and with what the layer returned.
    """
    forward = layer.forward

    def locate(callback: Callable[..., None], *values: Any) -> None:
        try:
            callback(*values)
        except LowRankError as error:
            raise error.at(path) from error

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        x = next(tensors((args, kwargs)), None)
        if before is not None and x is not None:
            locate(before, x)
        output = forward(*args, **kwargs)
        if after is not None and x is not None:
            locate(after, x, output)
        return output

    vars(layer)["forward"] = watched


def several_batches(batches: Iterable[Any]) -> Iterable[Any]:
    """Return what to go through batch by batch: a single tensor or mapping is one batch."""
    return [batches] if isinstance(batches, (Tensor, Mapping)) else batches


def run_batches(model: nn.Module, batches: Iterable[Any], *, max_batches: int | None, progress: bool) -> Iterator[Any]:
    """Call ``model`` on calibration data batch by batch, and yield what it was called with.

    That is meant for :func:`lowrank_nn.graph.call_model`.

    Args:
        model: The model.
        batches: See :func:`model_inputs`. A single tensor or dict is one batch.
        max_batches: Batches to take; None for all.
        progress: Whether to show a progress bar (never when the output is not a terminal).

    Raises:
        CalibrationError: There are no batches, there is nothing in them, or the forward failed on one.
    """
    shown = tqdm(several_batches(batches), desc="calibration", disable=None if progress else True, leave=False)
    count, empty = 0, True
    for count, batch in enumerate(itertools.islice(shown, max_batches), 1):
        inputs = model_inputs(model, batch)
        run_batch(model, inputs, count)
        empty = empty and {tensor.numel() for tensor in tensors(inputs)} == {0}
        yield inputs
    if count == 0:
        raise CalibrationError("calibration: there are no batches. Pass an iterable with at least one.")
    if empty:
        raise CalibrationError(f"calibration: nothing is in the tensors of {count} batches. Pass inputs.")


def _required_arguments(model: nn.Module) -> int:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    arguments = inspect.signature(model.forward).parameters.values()
    return sum(a.kind in positional and a.default is inspect.Parameter.empty for a in arguments)


def _takes_keywords(model: nn.Module, keywords: Mapping[Any, Any]) -> bool:
    """Whether a mapping can be the keyword arguments of a call of ``model``."""
    try:
        inspect.signature(model.forward).bind(**keywords)
    except TypeError:
        return False
    return True
