"""Proof that channels were removed and nothing else: a model without them against one in which they are zero."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.errors import LowRankError, PlanError
from lowrank_nn.graph.free_norms import follow_inputs
from lowrank_nn.graph.inputs import call_model, doubled, map_tensors, tensors
from lowrank_nn.graph.preserve import evaluating, seed_all, untouched
from lowrank_nn.graph.proof_modes import NoDropout, NormaliseKept, StandardiseKept
from lowrank_nn.graph.surgery import Cuts, Removal, cut_tensor, cuts_of, masked_units, named_tensors, remove_units

TOLERANCE = 1e-4  # relative to the largest entry of the same tensor
_ROUNDING = 1e4  # units of rounding, relative to the largest entry of all gradients or buffers


@dataclasses.dataclass(frozen=True)
class Proof:
    """Which removals leave the rest of the model as it is.

    Attributes:
        proven: The removals that were proven, all at once.
        refused: By name of the group, why a removal was not.
        untested: What could not be tested of the proven ones, in words; empty where everything was.
    """

    proven: tuple[Removal, ...]
    refused: dict[str, str]
    untested: str = ""


def prove(
    model: nn.Module,
    removals: Sequence[Removal],
    example_inputs: Any,
    *,
    together: Sequence[Collection[str]] = (),
    seed: int = 0,
) -> Proof:
    """Find out which removals change nothing but that the channels are gone.

    Twice the model runs on the same inputs: once without the doomed units, once with all their slices zero in every
    member of their groups; layer norms, and weights that are standardised, take mean and variance of the other channels
    in both. In eval mode the outputs must agree; in train mode, with dropout off and a batch twice as large where the
    model allows that, also the gradients of all that is kept and the statistics of the norms. Both runs are in float64,
    where the model runs in it: rounding is no excuse then.

    All removals are tried at once first. Where they do not agree they are halved, so that a few bad ones among many
    cost few runs; first in eval mode alone, which costs a fraction of the rest and finds nearly all bad ones.

    Args:
        model: Not changed; worked on is a copy.
        removals: At most one for each group, all for the model as it is.
        example_inputs: What the model is called with.
        together: Names of groups that are tried together first: the model may do without both, but not without one.
        seed: Seed of what the model draws.

    Raises:
        PlanError: The model fails on the inputs, or returns no finite numbers, so that there is nothing to compare.
    """
    trial = _Trial(model, example_inputs, seed)
    refused: dict[str, str] = {}
    left = _bundles(removals, together)
    for runs in (trial.runs[:1], trial.runs):
        left = _halved(trial, left, runs, refused)
    order = {id(removal): index for index, removal in enumerate(removals)}
    proven = sorted((removal for bundle in left for removal in bundle), key=lambda removal: order[id(removal)])
    return Proof(tuple(proven), refused, trial.untested)


_Bundle = tuple[Removal, ...]
"""Removals that are tried together."""


def _bundles(removals: Sequence[Removal], together: Sequence[Collection[str]]) -> list[_Bundle]:
    bundles = [tuple(removal for removal in removals if removal.group.name in names) for names in together]
    bundled = {removal.group.name for bundle in bundles for removal in bundle}
    return [*filter(None, bundles), *((removal,) for removal in removals if removal.group.name not in bundled)]


def _halved(trial: _Trial, bundles: list[_Bundle], runs: Sequence[_Mode], refused: dict[str, str]) -> list[_Bundle]:
    """Return the bundles that agree, all at once, and note why others do not."""
    proven: list[_Bundle] = []
    queue = [bundles] if bundles else []
    while queue:
        batch = queue.pop()
        problem = trial.difference([removal for bundle in [*proven, *batch] for removal in bundle], runs)
        if not problem:
            proven += batch
        elif len(batch) > 1:
            middle = len(batch) // 2
            queue += [batch[middle:], batch[:middle]]
        elif len(batch[0]) > 1:
            queue.append([(removal,) for removal in batch[0]])
        else:
            refused[batch[0][0].group.name] = problem
    return proven


@dataclasses.dataclass(frozen=True)
class _Run:
    """What one forward gave, and in train mode one backward."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


_Mode = tuple[str, Callable[[Cuts], _Run]]
"""A way to run the model: in words, and what does it and leaves out what a smaller model does not have."""


class _Trial:
    """A copy of the model on which removals are tried and undone."""

    def __init__(self, model: nn.Module, example_inputs: Any, seed: int) -> None:
        self._seed = seed
        self._model, self._inputs, seen = _widest(model, example_inputs, seed)
        self.runs: list[_Mode] = [("in eval mode", self._evaluate)]
        self.untested = ""
        for inputs in (doubled(self._inputs), self._inputs):
            try:
                seen += self._train(inputs, {}).outputs
            except Exception as error:
                self.untested = f"in train mode the model fails on the example inputs ({_short(error)})"
            else:
                self.runs.append(("in train mode", functools.partial(self._train, inputs)))
                self.untested = ""
                break
        if not any(torch.isfinite(output).any() for output in seen):
            raise PlanError(
                f"{type(model).__name__}: the forward returns no finite numbers on example_inputs, so nothing can be "
                "proven of smaller models. Pass inputs with a batch of at least one, on which it gives numbers: "
                "tensors, in containers or objects, but not in a generator."
            )

    def difference(self, removals: Sequence[Removal], runs: Sequence[_Mode]) -> str:
        """Return how the model without some units differs from the one where they are zero; empty if it does not."""
        try:
            cuts = cuts_of(removals, named_tensors(self._model))
            undo = remove_units(self._model, removals)
        except LowRankError as error:
            return str(error)
        # The smaller model first: where it fails, nothing else has to run.
        got: list[_Run] = []
        try:
            for _, run in runs:
                got.append(run({}))
        except Exception as error:
            mode = runs[len(got)][0]
            return f"without these channels the forward fails {mode}: {_short(error)}"
        finally:
            undo()
        model = self._model
        with masked_units(model, removals), NormaliseKept(model, cuts), StandardiseKept(model, cuts):
            expected = [run(cuts) for _, run in runs]
        for (mode, _), before, after in zip(runs, expected, got, strict=True):
            problem = _difference(before, after)
            if problem:
                return f"{problem} {mode} differ from those with the same channels held at zero"
        return ""

    def _evaluate(self, _: Cuts) -> _Run:
        with evaluating(self._model):
            _prepare(self._seed)
            follow_inputs(self._model)
            return _Run(_copies(call_model(self._model, self._inputs)), {}, {})

    def _train(self, inputs: Any, cuts: Cuts) -> _Run:
        with untouched(self._model), torch.enable_grad(), NoDropout():
            torch.backends.mha.set_fastpath_enabled(False)
            _prepare(self._seed)
            follow_inputs(self._model)
            self._model.train()
            for module in self._model.modules():
                if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
                    module.dropout = 0.0  # drawn inside one function
            for parameter in self._model.parameters():
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
            outputs = list(tensors(call_model(self._model, inputs)))
            gradients = _gradients(self._model, outputs, cuts)
            buffers = {n: cut_tensor(b, cuts.get(n, {})).clone() for n, b in self._model.named_buffers()}
            return _Run(_copies(outputs), gradients, buffers)


def _widest(model: nn.Module, example_inputs: Any, seed: int) -> tuple[nn.Module, Any, list[Tensor]]:
    """Return a copy of the model, its inputs and its outputs, in float64 if it runs in that."""
    failure: Exception | None = None
    for wide in (True, False):
        candidate, inputs = copy.deepcopy(model), example_inputs
        try:
            if wide:  # not every device has it
                candidate, inputs = candidate.double(), map_tensors(_double, inputs)
            with evaluating(candidate):
                _prepare(seed)
                outputs = _copies(call_model(candidate, inputs))
        except Exception as error:
            failure = error
        else:
            return candidate, inputs, outputs
    raise PlanError(f"{type(model).__name__}: the forward fails on example_inputs: {_short(failure)}.") from failure


def _prepare(seed: int) -> None:
    """Within a block that restores them: seed the random numbers, and keep what the forward warns of to itself."""
    seed_all(seed)
    warnings.simplefilter("ignore")  # the user sees the warnings of his own calls, not those of ours


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _gradients(model: nn.Module, outputs: Sequence[Tensor], cuts: Cuts) -> dict[str, Tensor]:
    """Return the gradients of a fixed random projection of all outputs, without what is cut.

    Each is cut as soon as it is there: those of all parameters, whole, would take as much memory as the model.
    """
    reached = [output for output in outputs if output.requires_grad]
    if not reached:
        return {}
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(output.shape, generator=generator, dtype=torch.float64, device="cpu") for output in reached]
    losses = [(output * w.to(output)).sum().abs() for output, w in zip(reached, weights, strict=True)]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: dict[str, Tensor] = {}

    def take(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            found[name] = cut_tensor(gradient.to_dense(), cuts.get(name, {}))  # embeddings may have sparse ones

    with contextlib.ExitStack() as hooks:
        for name, parameter in trained.items():
            hook = functools.partial(take, name)
            hooks.callback(parameter.register_post_accumulate_grad_hook(hook).remove)  # type: ignore[no-untyped-call]
        torch.autograd.backward(losses, inputs=list(trained.values()))
    return found


def _difference(expected: _Run, got: _Run) -> str:
    """Return what differs between two runs, in words: the first kind of several."""
    if not _agree(dict(enumerate(expected.outputs)), dict(enumerate(got.outputs))):
        return "the outputs"
    if not _agree(expected.gradients, got.gradients):
        return "the gradients"
    return "" if _agree(expected.buffers, got.buffers) else "the buffers"


def _agree(expected: Mapping[Any, Tensor], got: Mapping[Any, Tensor]) -> bool:
    """Whether tensors of the same names are the same up to rounding."""
    if expected.keys() != got.keys():
        return False
    largest = max((_size(tensor) for tensor in expected.values()), default=0.0)
    return all(_close(tensor, got[name], largest) for name, tensor in expected.items())


def _close(expected: Tensor, got: Tensor, largest: float) -> bool:
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(expected, got)
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(got)):
        return False
    allowed = TOLERANCE * _size(expected) + _ROUNDING * torch.finfo(expected.dtype).eps * largest
    return _size(torch.where(finite, got - expected, 0)) <= allowed


def _size(tensor: Tensor) -> float:
    """Return the largest finite absolute value; 0 for integers and for no values."""
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    return float(torch.where(torch.isfinite(tensor), tensor, 0).abs().max())


def _copies(value: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors(value)]


def _short(error: Exception | None) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 160 else text[:157] + '...'}"
