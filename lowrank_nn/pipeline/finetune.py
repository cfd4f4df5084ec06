"""The step that trains: distillation from the given model, unless told otherwise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lowrank_nn.distill import Guidance, distill_loss
from lowrank_nn.errors import OptionError
from lowrank_nn.graph import call_model, release_fast_path
from lowrank_nn.layers import QuantConv2d, QuantLinear
from lowrank_nn.pipeline import distributed
from lowrank_nn.pipeline.batches import logits_of, split_batch
from lowrank_nn.pipeline.state import BatchLoss, Decision, State, Step
from lowrank_nn.pipeline.training import Trainer

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeSchedule = Callable[[Optimizer, int], LRScheduler]
MakeGuidance = Callable[[nn.Module, nn.Module], Guidance]


class FineTune(Step):
    """Train the compressed model on the outputs of the model that was given.

    The default loss is Hinton's, alpha T^2 KL(teacher || student) + (1 - alpha) CE(student, targets), without the
    second term where batches carry no targets. A batch is ``(inputs, targets)``, a dict with ``labels`` or
    ``targets``, or inputs alone; the model is called with the inputs as with ``example_inputs``.

    Masked weights stay zero. Quantized layers train through the rounding (straight-through) and are integers again
    afterwards. Started by ``torchrun``, every process trains on its share of the batches under
    ``DistributedDataParallel``; put the model on the process's device before compressing it.

    Args:
        loader: Batches, gone through once per epoch: a ``DataLoader``, a list, anything with a length.
        epochs: Number of epochs.
        optimizer: Function of the parameters that makes the optimizer; left out, AdamW with ``lr``.
        schedule: Function of optimizer and number of steps that makes the learning rate schedule, stepped after every
            batch; left out, 5 % linear warm-up and then half a cosine to zero.
        lr: Learning rate of the default optimizer. A large one first destroys a good start.
        loss: ``loss(model, batch)``, a scalar, in place of distillation.
        temperature: Temperature T of the default loss.
        alpha: Share of the distillation term in the default loss, from 0 to 1.
        guidance: Dotted paths of layers whose features follow the teacher's, with balanced weight; or a function of
            teacher and student that makes a :class:`lowrank_nn.distill.Guidance`. Added to the loss.
        evaluate: ``evaluate(model)``, a number that is better when larger; called after every epoch in eval mode.
        restore_best: Whether to end with the state of the best evaluation instead of the last.
        checkpoint: File to write after every epoch, and to go on from if it is there.

    Raises:
        OptionError: An argument out of range, or ``restore_best`` without ``evaluate``.

    References:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
    """

    def __init__(
        self,
        loader: Any,
        epochs: int,
        *,
        optimizer: MakeOptimizer | None = None,
        schedule: MakeSchedule | None = None,
        lr: float = 3e-4,
        loss: BatchLoss | None = None,
        temperature: float = 4.0,
        alpha: float = 0.9,
        guidance: Sequence[str] | MakeGuidance | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        restore_best: bool = False,
        checkpoint: str | Path | None = None,
    ) -> None:
        if epochs < 1:
            raise OptionError(f"FineTune: epochs must be at least 1, got {epochs!r}.")
        if not (math.isfinite(lr) and lr > 0):
            raise OptionError(f"FineTune: lr must be a positive number, got {lr!r}.")
        if restore_best and evaluate is None:
            raise OptionError("FineTune: restore_best needs evaluate=..., a function of the model.")
        if not hasattr(loader, "__len__") or not hasattr(loader, "__iter__"):
            raise OptionError(
                f"FineTune: loader must have a length and be iterable once per epoch, got {type(loader).__name__}. "
                "Wrap a generator in a list or a DataLoader."
            )
        self.loader, self.epochs, self.lr, self.loss = loader, epochs, lr, loss
        self.optimizer = optimizer or self._adamw
        self.schedule = schedule or warm_cosine
        self.temperature, self.alpha, self.guidance = temperature, alpha, guidance
        self.evaluate, self.restore_best = evaluate, restore_best
        self.checkpoint = None if checkpoint is None else Path(checkpoint)

    def __repr__(self) -> str:
        return f"FineTune(epochs={self.epochs}, loss={'distillation' if self.loss is None else self.loss!r})"

    def decide(self, state: State) -> list[Decision]:
        """Training changes no structure: no decisions."""
        return []

    def execute(self, state: State, decisions: list[Decision]) -> None:
        """Train the model of ``state`` in place.

        Raises:
            TrainingError: The loss is not finite, nothing is trainable, or the checkpoint belongs to another model.
        """
        if state.dry:
            return
        student = state.model
        quantized = [m for m in student.modules() if isinstance(m, (QuantConv2d, QuantLinear)) and m.frozen]
        modes = {module: module.training for module in student.modules()}
        for layer in quantized:
            layer.unfreeze()
        device = next((p.device for p in student.parameters()), torch.device("cpu"))
        with distributed.process_group(device):
            self._train(state, student, device)
        for layer in quantized:
            layer.freeze()
        for module, mode in modes.items():
            module.training = mode
        release_fast_path(student)

    def _train(self, state: State, student: nn.Module, device: torch.device) -> None:
        teacher = copy.deepcopy(state.dense).eval().requires_grad_(False)
        guidance = self._make_guidance(teacher, student)
        unused = any(not site.calls for site in state.sites())
        wrapped = distributed.wrap(student.train(), device, partly_used=unused)
        loss = self._loss(teacher, guidance)
        try:
            Trainer(self, student, wrapped, guidance, device, state.seed, state.progress).run(loss)
        finally:
            if guidance is not None:
                guidance.remove()

    def _make_guidance(self, teacher: nn.Module, student: nn.Module) -> Guidance | None:
        if self.guidance is None:
            return None
        if callable(self.guidance):
            return self.guidance(teacher, student)
        return Guidance(teacher, student, self.guidance, weight="balanced")

    def _loss(self, teacher: nn.Module, guidance: Guidance | None) -> BatchLoss:
        """Return the loss of one batch: the task's, and the guidance on top."""

        def loss(model: nn.Module, batch: Any) -> Tensor:
            inputs, targets = split_batch(batch)
            expected = None
            if self.loss is None or guidance is not None:
                with torch.no_grad():
                    expected = call_model(teacher, inputs)
            if self.loss is not None:
                task = self.loss(model, batch)
            else:
                task = distill_loss(
                    logits_of(call_model(model, inputs)),
                    logits_of(expected),
                    targets,
                    temperature=self.temperature,
                    alpha=self.alpha,
                )
            return task if guidance is None else guidance.total(task)

        return loss

    def _adamw(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=1e-4)


def warm_cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Return 5 % linear warm-up, then half a cosine down to zero, over ``steps`` steps."""
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return LambdaLR(optimizer, factor)
