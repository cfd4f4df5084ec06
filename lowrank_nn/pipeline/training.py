"""The training loop: epochs, checkpoints, evaluation, the best state."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from lowrank_nn.distill import Guidance
from lowrank_nn.errors import TrainingError
from lowrank_nn.pipeline import distributed
from lowrank_nn.pipeline.batches import to_device
from lowrank_nn.pipeline.checkpoint import Checkpoint
from lowrank_nn.pipeline.state import BatchLoss

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


class Trainer:
    """One training run.

    Args:
        settings: The step's options.
        student: The model that is trained.
        wrapped: The same model as it is called: itself, or under DDP.
        guidance: Feature taps that may have parameters to train too, or None.
        device: Where the model is.
        seed: Every epoch draws its random numbers from ``seed + epoch``, so that a resumed run repeats them.
        progress: Whether to show a progress bar.
    """

    def __init__(
        self,
        settings: Settings,
        student: nn.Module,
        wrapped: nn.Module,
        guidance: Guidance | None,
        device: torch.device,
        seed: int,
        progress: bool,
    ) -> None:
        self.settings, self.student, self.wrapped, self.guidance = settings, student, wrapped, guidance
        self.device, self.seed = device, seed
        extra = [] if guidance is None else list(guidance.parameters())
        trainable = [p for p in [*student.parameters(), *extra] if p.requires_grad]
        self.steps = distributed.steps_per_epoch(settings.loader)
        if not trainable:
            raise TrainingError("FineTune: no parameter of the model has requires_grad set, so nothing can be trained.")
        if self.steps < 1:
            raise TrainingError("FineTune: the loader has no batches (or fewer than there are processes).")
        self.optimizer = settings.optimizer(trainable)
        self.schedule = settings.schedule(self.optimizer, self.steps * settings.epochs)
        self.hidden = True if not progress or distributed.rank() else None
        self.epoch = 0
        self.best: tuple[float, dict[str, Any]] | None = None

    def run(self, loss: BatchLoss) -> None:
        """Train to the last epoch, from the checkpoint's if there is one.

        Raises:
            TrainingError: The loss is not finite, or the checkpoint belongs to another model.
        """
        self._resume()
        while self.epoch < self.settings.epochs:
            mean = self._train_epoch(loss)
            self.epoch += 1
            distributed.synchronise_buffers(self.student)
            score = self._evaluate()
            logger.info("epoch %d of %d: mean loss %.4g, evaluation %s", self.epoch, self.settings.epochs, mean, score)
            self._write_checkpoint()
        if self.settings.restore_best and self.best is not None:
            self.student.load_state_dict(self.best[1])

    def _train_epoch(self, loss: BatchLoss) -> float:
        settings = self.settings
        _seed_all(self.seed + 1 + self.epoch + 1000 * distributed.rank())
        self.wrapped.train()
        total = 0.0
        title = f"FineTune {self.epoch + 1}/{settings.epochs}"
        batches = distributed.share_of_batches(settings.loader, self.epoch)
        with tqdm(batches, desc=title, total=self.steps, disable=self.hidden, leave=False) as bar:
            for step, batch in enumerate(bar):
                value = self._step(loss, to_device(batch, self.device), step)
                total += value
                bar.set_postfix(loss=f"{value:.3g}", refresh=False)
        return distributed.mean_over_processes(total / self.steps, self.device)

    def _step(self, loss: BatchLoss, batch: Any, step: int) -> float:
        if self.guidance is not None:
            done = self.epoch * self.steps + step
            self.guidance.set_progress(min(1.0, done / (self.steps * self.settings.epochs)))
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.zero_grad(set_to_none=True)
        value = loss(self.wrapped, batch)
        number = float(value.detach())
        if not math.isfinite(number):
            raise TrainingError(
                f"FineTune: the loss is {number} at step {step + 1} of epoch {self.epoch + 1}, learning rate "
                f"{rate:.3g}. Lower the learning rate, or look for NaN in the batch."
            )
        value.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()
        return number

    def _evaluate(self) -> float | None:
        if self.settings.evaluate is None:
            return None
        self.student.eval()
        with torch.no_grad():
            score = float(self.settings.evaluate(self.student))
        if self.settings.restore_best and (self.best is None or score > self.best[0]):
            self.best = (score, copy.deepcopy(self.student.state_dict()))
        return score

    def _write_checkpoint(self) -> None:
        if self.settings.checkpoint is None or distributed.rank():
            return
        extra = {} if self.guidance is None else self.guidance.state_dict()
        model, optimizer, schedule = self.student.state_dict(), self.optimizer.state_dict(), self.schedule.state_dict()
        Checkpoint(self.epoch, model, extra, optimizer, schedule, self.best).save(self.settings.checkpoint)

    def _resume(self) -> None:
        path = self.settings.checkpoint
        if path is None or not path.exists():
            return
        found = Checkpoint.load(path, set(self.student.state_dict()))
        self.student.load_state_dict(found.model)
        if self.guidance is not None:
            self.guidance.load_state_dict(found.extra)
        self.optimizer.load_state_dict(found.optimizer)
        self.schedule.load_state_dict(found.schedule)
        self.epoch, self.best = found.epoch, found.best
        logger.info("resumed from %s after %d epochs", path, self.epoch)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - loaders of users draw from it
    torch.manual_seed(seed)
