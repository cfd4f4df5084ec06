"""The training loop: epochs, checkpoints, evaluation, the best state."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import math
import numbers
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from lowrank_nn.distill import FeatureLoss
from lowrank_nn.errors import TrainingError
from lowrank_nn.pipeline import distributed
from lowrank_nn.pipeline.batches import loader_generators, to_device
from lowrank_nn.pipeline.checkpoint import Checkpoint, fingerprint
from lowrank_nn.pipeline.state import State
from lowrank_nn.planning import BatchLoss

logger = logging.getLogger(__name__)


class Settings(Protocol):
    """What the loop reads of a ``FineTune`` step."""

    loader: Any
    epochs: int
    optimizer: Callable[..., Optimizer]
    schedule: Callable[[Optimizer, int], LRScheduler]
    evaluate: Callable[[nn.Module], float] | None
    restore_best: bool
    checkpoint: Path | None
    temperature: float
    alpha: float


class Trainer:
    """One training run.

    Every epoch seeds all random numbers anew, from the state's seed and its own number, so that a run that is resumed
    repeats them.

    Args:
        settings: The step's options.
        state: Holds the model to train, in place, in the mode it is to be trained in.
        guidance: Feature taps that may have parameters to train too, or None.
        device: Where the model is.

    Raises:
        TrainingError: There is nothing to train, or nothing to train on, or the optimizer or the schedule needs more
            than a call of ``step()`` after every batch.
    """

    def __init__(self, settings: Settings, state: State, guidance: FeatureLoss | None, device: torch.device) -> None:
        self.settings, self.state, self.guidance, self.device = settings, state, guidance, device
        self.student = state.model
        self.steps = distributed.steps_per_epoch(settings.loader)
        distributed.require_equal(self.steps, device, "the number of batches")
        trainable = [p for p in self.student.parameters() if p.requires_grad]
        if not trainable:
            raise TrainingError(
                "FineTune: no parameter of the model has requires_grad set, so nothing can be trained. Set it on the "
                "layers to train before compressing."
            )
        if self.steps < 1:
            raise TrainingError("FineTune: the loader has no batches, or fewer than there are processes.")
        self.wrapped = distributed.wrap(self.student)
        extra = [] if guidance is None else list(guidance.parameters())
        distributed.broadcast(extra)
        self.optimizer = settings.optimizer([*trainable, *extra])
        _check_steps("optimizer", self.optimizer)
        self.setup = repr(self.optimizer)  # ahead of the schedule, which may depend on the number of epochs
        self.schedule = settings.schedule(self.optimizer, self.steps * settings.epochs)
        _check_steps("schedule", self.schedule)
        self.setup += f" under {type(self.schedule).__name__}"
        self.setup += f", temperature {settings.temperature}, alpha {settings.alpha}"
        self.generators = loader_generators(settings.loader)
        self.origin = "" if settings.checkpoint is None else fingerprint(state.dense)
        self.epoch = 0
        self.best: tuple[float, dict[str, Any]] | None = None
        # Trainable parameters that no loss has had a gradient for; None ahead of the first step.
        self.unreached: set[str] | None = None

    def run(self, loss: BatchLoss) -> None:
        """Train to the last epoch, from the checkpoint's if there is one.

        The random generators of the loader are put back afterwards, so that the next run sees the same order.

        Raises:
            TrainingError: The loss is not finite, or the checkpoint belongs to another model.
        """
        states = [generator.get_state() for generator in self.generators]
        try:
            self._resume()
            if self.settings.restore_best and self.best is None:
                self._evaluate()
            while self.epoch < self.settings.epochs:
                mean = self._train_epoch(loss)
                self.epoch += 1
                distributed.synchronise_buffers(self.student)
                score = self._evaluate()
                logger.info(
                    "epoch %d of %d: mean loss %.4g, evaluation %s", self.epoch, self.settings.epochs, mean, score
                )
                self._write_checkpoint()
            if self.settings.restore_best and self.best is not None:
                self.student.load_state_dict(self.best[1])
        finally:
            self._set_generators(states)

    def _train_epoch(self, loss: BatchLoss) -> float:
        total, done = 0.0, 0
        title = f"FineTune {self.epoch + 1}/{self.settings.epochs}"
        hidden = True if not self.state.progress or distributed.rank() else None
        batches = distributed.share_of_batches(self.settings.loader, self.epoch, self.state.seed + 1 + self.epoch)
        with tqdm(batches, desc=title, total=self.steps, disable=hidden, leave=False) as bar:
            for batch in bar:
                value = self._step(loss, to_device(batch, self.device), done)
                total, done = total + value, done + 1
                bar.set_postfix(loss=f"{value:.3g}", refresh=False)
        if not done:
            raise TrainingError(
                f"FineTune: the loader gave no batches in epoch {self.epoch + 1}. It must start anew whenever it is "
                "iterated; wrap a generator in a list or a DataLoader."
            )
        return distributed.mean_over_processes(total / done, self.device)

    def _step(self, loss: BatchLoss, batch: Any, step: int) -> float:
        if self.guidance is not None:
            done = self.epoch * self.steps + step
            self.guidance.set_progress(min(1.0, done / (self.steps * self.settings.epochs)))
        self.optimizer.zero_grad(set_to_none=True)
        value = loss(self.wrapped, batch)
        number = self._checked(value, step)
        value.backward()  # type: ignore[no-untyped-call]
        if self.guidance is not None:
            distributed.average_gradients(self.guidance.parameters())
        if self.unreached != set():
            without = {name for name, p in self.student.named_parameters() if p.requires_grad and p.grad is None}
            self.unreached = without if self.unreached is None else self.unreached & without
        self.optimizer.step()
        self.schedule.step()
        return number

    def _checked(self, value: Any, step: int) -> float:
        """Return the loss as a number; all processes refuse it if one of them must."""
        if not isinstance(value, Tensor) or value.dim() > 0 or not value.requires_grad:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            if isinstance(value, Tensor) and not value.requires_grad:
                got = "one without gradient"
            raise TrainingError(f"FineTune: loss must be a scalar tensor that depends on the model, got {got}.")
        number = float(value.detach())
        failed = distributed.mean_over_processes(0.0 if math.isfinite(number) else 1.0, self.device) > 0
        if failed:
            rates = ", ".join(f"{rate:.3g}" for rate in dict.fromkeys(self.schedule.get_last_lr()))
            where = number if distributed.world_size() == 1 else f"not finite in some process ({number} in this one)"
            raise TrainingError(
                f"FineTune: the loss is {where} at step {step + 1} of epoch {self.epoch + 1}, learning rate {rates}. "
                "Lower the learning rate, or look for NaN in the batch."
            )
        return number

    def _evaluate(self) -> float | None:
        if self.settings.evaluate is None:
            return None
        quiet = contextlib.nullcontext() if self.guidance is None else self.guidance.paused()
        with modes_kept(self.student), quiet, torch.no_grad():
            value = self.settings.evaluate(self.student.eval())
        score = distributed.mean_over_processes(as_metric(value), self.device)
        if math.isnan(score):
            raise TrainingError(f"FineTune: evaluate must return a number, got {value!r} after {self.epoch} epochs.")
        if self.settings.restore_best and (self.best is None or score > self.best[0]):
            self.best = (score, copy.deepcopy(self.student.state_dict()))
        return score

    def _write_checkpoint(self) -> None:
        path = self.settings.checkpoint
        if path is None:
            return
        if distributed.rank() == 0:
            Checkpoint(
                origin=self.origin,
                epoch=self.epoch,
                steps=self.steps,
                setup=self.setup,
                model=self.student.state_dict(),
                extra={} if self.guidance is None else self.guidance.state_dict(),
                optimizer=self.optimizer.state_dict(),
                schedule=self.schedule.state_dict(),
                generators=[generator.get_state() for generator in self.generators],
                best=self.best,
            ).save(path)
        distributed.wait_for_all()  # so that whoever goes on, or starts anew, finds the file

    def _resume(self) -> None:
        path = self.settings.checkpoint
        if path is None:
            return
        if path.exists():
            found = Checkpoint.load(path)
            found.check(path, self.origin, self.student, self.settings.epochs, self.steps, self.setup)
            self.student.load_state_dict(found.model)
            if self.guidance is not None:
                self.guidance.load_state_dict(found.extra)
            self.optimizer.load_state_dict(found.optimizer)
            self.schedule.load_state_dict(found.schedule)
            self._set_generators(found.generators)
            self.epoch, self.best = found.epoch, found.best
            logger.info("resumed from %s after %d epochs", path, self.epoch)
        distributed.require_equal(self.epoch, self.device, f"the epochs done by the checkpoint {path}")

    def _set_generators(self, states: list[Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=False):
            generator.set_state(state)


def _check_steps(name: str, made: Any) -> None:
    """Refuse what the loop cannot step: after every batch, and without a closure or a metric.

    Raises:
        TrainingError: It has no ``step()``, or one that needs an argument.
    """
    step = getattr(made, "step", None)
    parameters = inspect.signature(step).parameters.values() if callable(step) else ()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not callable(step) or any(p.default is p.empty for p in named):
        raise TrainingError(
            f"FineTune: {name} must make something with a step() that is called after every batch and needs no "
            f"argument, got {type(made).__name__}. LBFGS and ReduceLROnPlateau need a loop of your own."
        )


def as_metric(value: Any) -> float:
    """Return what a user's ``evaluate`` gave; NaN where that is not one number."""
    known = isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.numel() == 1)
    return float(value) if known else math.nan


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the train / eval flag of every module on exit, however the block ends."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
