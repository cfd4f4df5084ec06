"""Training that can be taken up where it was interrupted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from lowrank_nn.errors import TrainingError


@dataclasses.dataclass
class Checkpoint:
    """All that a training run is, between two epochs.

    Attributes:
        epoch: Number of epochs done.
        model: State dict of the model.
        extra: State dict of what is trained beside it (regressors of feature taps).
        optimizer: State dict of the optimizer.
        schedule: State dict of the learning rate schedule.
        best: Best evaluation so far and the model's state dict then; None if nothing is evaluated.
    """

    epoch: int
    model: dict[str, Any]
    extra: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    best: tuple[float, dict[str, Any]] | None

    def save(self, path: Path) -> None:
        """Write to ``path``; a file that is there already is replaced in one stroke."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        torch.save({field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, model_keys: set[str]) -> Checkpoint:
        """Read a checkpoint of a model with the state dict keys ``model_keys``.

        Raises:
            TrainingError: The file is no checkpoint, or one of another model.
        """
        try:
            checkpoint = cls(**torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise TrainingError(
                f"FineTune: {path} is no readable checkpoint ({error}). Delete it to start anew."
            ) from error
        different = sorted(model_keys ^ set(checkpoint.model))
        if different:
            raise TrainingError(
                f"FineTune: the checkpoint {path} belongs to another model or recipe; different entries: "
                f"{', '.join(different[:5])}{' ...' if len(different) > 5 else ''}. Delete it or name another file."
            )
        return checkpoint
