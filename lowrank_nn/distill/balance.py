"""How guidance on features joins the task's loss: its weight and its schedule."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.distill.recording import Recorder
from lowrank_nn.errors import OptionError

Weight: TypeAlias = float | Literal["balanced"]

BALANCE_FLOOR = 0.01
"""Share of the teacher's energy below which balanced guidance fades: features within 10 % of the teacher's in norm.
Without a floor, a student that agrees with its teacher would have its rounding noise amplified to the task's size."""


class FeatureLoss(nn.Module, abc.ABC):
    r"""Base class of losses on recorded features: ``total = task + lambda * guidance``.

    With ``weight="balanced"``, :math:`\lambda = t / \max(g, 0.01\, e)` with the present values of the task loss
    :math:`t`, the guidance :math:`g` and the energy :math:`e`, the guidance of a student whose features are all zero
    (:math:`\frac{1}{2N} \|r\|^2`; for attention 1/2 per map). So :math:`\lambda g = t` until the features are
    close, and less from there: never above the task loss (up to rounding). :math:`\lambda` is a constant for the
    gradient, and 0 where the task loss is not above 0, or where the quotient is not finite.

    Args:
        weight: :math:`\lambda`, not below 0, or "balanced".
        guidance_first: Share of the training, from 0 to 1, that runs on the guidance alone, before task and guidance
            are trained jointly. The training loop says where it is with :meth:`set_progress`.

    Raises:
        OptionError: An option out of range.
    """

    def __init__(self, *, weight: Weight, guidance_first: float) -> None:
        super().__init__()
        if not (weight == "balanced" or (isinstance(weight, (int, float)) and 0 <= weight < float("inf"))):
            raise OptionError(
                f'{type(self).__name__}: weight must be "balanced" or a finite number not below 0, got {weight!r}.'
            )
        if not 0 <= guidance_first <= 1:
            raise OptionError(
                f"{type(self).__name__}: guidance_first must be a share of the training, from 0 to 1, got "
                f"{guidance_first!r}. For epochs pass epochs_of_guidance / epochs."
            )
        self.weight: Weight = weight
        self.guidance_first = guidance_first
        self.progress = 0.0

    @abc.abstractmethod
    def measure(self) -> tuple[Tensor, Tensor]:
        """Return guidance and energy (both scalars) of the features recorded, and forget these.

        Raises:
            TrainingError: Teacher and student have not both run since the last call, or the taps were removed.
            OptionError: Features whose shapes do not fit together.
        """

    @abc.abstractmethod
    def recorders(self) -> Iterator[Recorder]:
        """Yield the recorders that are in place."""

    @abc.abstractmethod
    def remove(self) -> None:
        """Take all hooks off both models. The regressors stay."""

    def forward(self) -> Tensor:
        """Return the guidance, a scalar without its weight; call it once per forward of teacher and student.

        Raises:
            TrainingError: Teacher and student have not both run since the last call, or the taps were removed.
            OptionError: Features whose shapes do not fit together.
        """
        return self.measure()[0]

    def total(self, task_loss: Tensor) -> Tensor:
        """Return ``task_loss + lambda * guidance``; in the guidance-first phase ``0 * task_loss + lambda * guidance``.

        The task's term is multiplied by 0 there, not left out, so that every parameter has a gradient
        (DistributedDataParallel needs it).

        Args:
            task_loss: The task's loss, a scalar, such as :func:`lowrank_nn.distill.distill_loss` of the logits.

        Raises:
            OptionError: ``task_loss`` is no scalar, or features whose shapes do not fit together.
            TrainingError: Teacher and student have not both run since the last call, or the taps were removed.
        """
        if task_loss.ndim != 0:
            raise OptionError(
                f"{type(self).__name__}: task_loss must be a scalar, got shape {tuple(task_loss.shape)}. "
                "Reduce it first."
            )
        guidance, energy = (value.to(task_loss.device) for value in self.measure())
        weighted = self._weight_now(task_loss.detach(), guidance.detach(), energy) * guidance
        return (0.0 if self.progress < self.guidance_first else 1.0) * task_loss + weighted

    def set_progress(self, share: float) -> None:
        """Say how much of the training is done; call it before every step (or epoch).

        Args:
            share: From 0 (start) to 1 (end).

        Raises:
            OptionError: ``share`` is out of range.
        """
        if not 0 <= share <= 1:
            raise OptionError(
                f"{type(self).__name__}: progress must be from 0 to 1, got {share!r}. Pass steps_done / steps."
            )
        self.progress = share

    def clear(self) -> None:
        """Forget the features recorded so far."""
        for recorder in self.recorders():
            recorder.take()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside the ``with`` block: for evaluating the models while they are tapped."""
        recorders = [(recorder, recorder.active) for recorder in self.recorders()]
        for recorder, _ in recorders:
            recorder.active = False
        try:
            yield
        finally:
            for recorder, active in recorders:
                recorder.active = active

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _weight_now(self, task: Tensor, guidance: Tensor, energy: Tensor) -> Tensor | float:
        """Return lambda by the rule of the class docstring."""
        if self.weight != "balanced":
            return float(self.weight)
        balanced = task.clamp(min=0) / torch.maximum(guidance, BALANCE_FLOOR * energy)
        return torch.where(torch.isfinite(balanced), balanced, 0.0)
