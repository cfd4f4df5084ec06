"""The runs that a removal is proven by: a copy of the model in eval and in train mode, in float64 where it can be."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.errors import PlanError
from lowrank_nn.graph.free_norms import follow_inputs
from lowrank_nn.graph.inputs import call_model, doubled, map_tensors, tensors
from lowrank_nn.graph.preserve import evaluating, seed_all, untouched
from lowrank_nn.graph.proof_comparison import BUFFERS, GRADIENTS, OUTPUTS
from lowrank_nn.graph.proof_modes import NoDropout

Take = Callable[[str, str, Tensor], None]
"""Called with the kind, the name and the value of every tensor that a run gives, as soon as it is there."""

Run = tuple[str, Callable[[Take], None]]
"""A way to run a model: in words, and what does it."""


class Trial:
    """A copy of the model, and the ways to run it.

    Attributes:
        model: The copy, to try removals on.
        runs: Each with its name, in words; one in eval mode, and one in train mode where the model can be trained on
            its inputs.
        untested: What cannot be tested, in words; empty where everything can.

    Raises:
        PlanError: The model fails on the inputs, or returns no finite numbers.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, seed: int) -> None:
        self._seed = seed
        self.model, self._inputs, seen = _widest(model, example_inputs, seed)
        self.runs: list[Run] = [("in eval mode", self._evaluate)]
        self.untested = ""

        def take(kind: str, name: str, tensor: Tensor) -> None:
            if kind == OUTPUTS:
                seen.append(tensor)

        for inputs in (doubled(self._inputs), self._inputs):
            train = functools.partial(self._train, inputs)
            try:
                train(take)
            except Exception as error:
                self.untested = f"in train mode the model fails on the example inputs ({short(error)})"
            else:
                self.runs.append(("in train mode", train))
                self.untested = ""
                break
        if not any(torch.isfinite(output).any() for output in seen):
            raise PlanError(
                f"{type(model).__name__}: the forward returns no finite numbers on example_inputs, so nothing can be "
                "proven of smaller models. Pass inputs with a batch of at least one, on which it gives numbers: "
                "tensors, in containers or objects."
            )

    def _evaluate(self, take: Take) -> None:
        with evaluating(self.model):
            _prepare(self._seed)
            follow_inputs(self.model)
            _hand_out(take, OUTPUTS, enumerate(tensors(call_model(self.model, self._inputs))))

    def _train(self, inputs: Any, take: Take) -> None:
        with untouched(self.model), torch.enable_grad(), NoDropout():
            torch.backends.mha.set_fastpath_enabled(False)
            _prepare(self._seed)
            follow_inputs(self.model)
            self.model.train()
            for module in self.model.modules():
                if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
                    module.dropout = 0.0  # drawn inside one function
            for parameter in self.model.parameters():
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
            outputs = list(tensors(call_model(self.model, inputs)))
            _backward(self.model, outputs, take)
            _hand_out(take, OUTPUTS, enumerate(outputs))
            _hand_out(take, BUFFERS, self.model.named_buffers())


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
                outputs = [output.clone() for output in tensors(call_model(candidate, inputs))]
        except Exception as error:
            failure = error
        else:
            return candidate, inputs, outputs
    raise PlanError(f"{type(model).__name__}: the forward fails on example_inputs: {short(failure)}.") from failure


def _prepare(seed: int) -> None:
    """Within a block that restores them: seed the random numbers, and keep what the forward warns of to itself."""
    seed_all(seed)
    warnings.simplefilter("ignore")  # the user sees the warnings of his own calls, not those of ours


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _hand_out(take: Take, kind: str, named: Iterable[tuple[Any, Tensor]]) -> None:
    for name, tensor in named:
        take(kind, str(name), tensor.detach().clone())


def _backward(model: nn.Module, outputs: Sequence[Tensor], take: Take) -> None:
    """Hand out the gradients of a fixed random projection of all outputs, each as soon as it is there.

    All of them would take as much memory as the model.
    """
    reached = [output for output in outputs if output.requires_grad]
    if not reached:
        return
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(output.shape, generator=generator, dtype=torch.float64, device="cpu") for output in reached]
    losses = [(output * w.to(output)).sum().abs() for output, w in zip(reached, weights, strict=True)]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def pass_on(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            take(GRADIENTS, name, gradient.to_dense())  # embeddings may have sparse ones

    with contextlib.ExitStack() as hooks:
        for name, parameter in trained.items():
            hook = functools.partial(pass_on, name)
            hooks.callback(parameter.register_post_accumulate_grad_hook(hook).remove)  # type: ignore[no-untyped-call]
        torch.autograd.backward(losses, inputs=list(trained.values()))


def short(error: Exception | None) -> str:
    """Return an error in at most about 160 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 160 else text[:157] + '...'}"
