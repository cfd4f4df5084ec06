"""Training that can be taken up where it was interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.errors import TrainingError


@dataclasses.dataclass
class Checkpoint:
    """All that a training run is, between two epochs.

    Attributes:
        origin: :func:`fingerprint` of the model that was given.
        epoch: Number of epochs done.
        steps: Number of steps per epoch.
        setup: Optimizer and schedule as they were made, temperature and alpha.
        model: State dict of the model.
        extra: State dict of what is trained beside it (regressors of feature taps).
        optimizer: State dict of the optimizer.
        schedule: State dict of the learning rate schedule.
        generators: States of the random generators that belong to the loader.
        best: Best evaluation so far and the model's state dict then; None if nothing is evaluated.
    """

    origin: str
    epoch: int
    steps: int
    setup: str
    model: dict[str, Any]
    extra: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    generators: list[Tensor]
    best: tuple[float, dict[str, Any]] | None

    def save(self, path: Path) -> None:
        """Write to ``path``; a file that is there already is replaced in one stroke."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        torch.save({field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint; nothing is unpickled but tensors and plain values.

        Raises:
            TrainingError: The file is no checkpoint.
        """
        try:
            return cls(**torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise TrainingError(
                f"FineTune: {path} is no readable checkpoint ({error}). Delete it to start anew."
            ) from error

    def check(self, path: Path, origin: str, model: nn.Module, epochs: int, steps: int, setup: str) -> None:
        """Refuse to go on with another run than the one that wrote this.

        Args:
            path: Where this was read from.
            origin: Fingerprint of the model that was given this time.
            model: The model to be trained.
            epochs: Number of epochs of the step.
            steps: Number of steps per epoch.
            setup: Optimizer and schedule as they were made this time, temperature and alpha.

        Raises:
            TrainingError: The model given, the compressed model, the optimizer, its settings, the kind of schedule,
                temperature, alpha or the length of the training is another one.
        """
        have = {key: tuple(value.shape) for key, value in self.model.items() if isinstance(value, Tensor)}
        want = {key: tuple(value.shape) for key, value in model.state_dict().items() if isinstance(value, Tensor)}
        different = sorted(key for key in have.keys() | want.keys() if have.get(key) != want.get(key))
        problem = ""
        if different:
            shown = ", ".join(different[:5]) + (" ..." if len(different) > 5 else "")
            problem = f"belongs to another model or recipe; different entries: {shown}"
        elif self.origin != origin:
            problem = "was made from a given model with other weights"
        elif self.steps != steps:
            problem = f"was made with {self.steps} steps per epoch, and now there are {steps}"
        elif self.setup != setup:
            problem = "was made with another optimizer, settings of it, kind of schedule, temperature or alpha"
        elif self.epoch > epochs:
            problem = f"has {self.epoch} epochs done, more than epochs={epochs}"
        if problem:
            raise TrainingError(f"FineTune: the checkpoint {path} {problem}. Delete it or name another file.")


def fingerprint(model: nn.Module) -> str:
    """Return a hash of all parameters and buffers: names, shapes, dtypes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
