"""Distillation on logits: the student learns the teacher's softened answers beside the labels."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_nn.errors import OptionError

Reduction = Literal["mean", "sum", "none"]


def logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    ignore_index: int = -100,
    class_dim: int = 1,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Loss of a student that learns from a teacher's logits and, if given, from targets.

    .. math::
        L = \alpha T^2 \, \mathrm{KL}\big(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T)\big)
            + (1 - \alpha) \, \mathrm{CE}(z_s, y)

    averaged over the positions that are kept. The factor :math:`T^2` keeps the gradient's size independent of the
    temperature. No gradient reaches the teacher. Logits of any floating dtype; the loss is computed and returned
    in float32 at least.

    Args:
        student_logits: Logits :math:`z_s` of shape ``(N, C)``, ``(N, C, d1, ...)`` or, unbatched, ``(C,)``.
        teacher_logits: Logits :math:`z_t`, of the same shape.
        targets: Class indices (integers, the logits' shape without the class dimension) or class probabilities
            (floats, the logits' shape). None: the distillation term alone, with weight 1 whatever ``alpha`` is.
        temperature: :math:`T > 0`.
        alpha: Weight of the distillation term, in [0, 1].
        ignore_index: Positions with this class index are left out of both terms.
        class_dim: Dimension of the classes; -1 for ``(N, length, C)``. One-dimensional logits have only one.
        reduction: "mean" over the positions kept (0 where none is), "sum" over them, or "none": a loss per
            position, of the logits' shape without the class dimension, 0 where ignored.

    Returns:
        The loss: a scalar, or with ``reduction="none"`` a tensor.

    Raises:
        OptionError: An option out of range, or tensors whose kinds or shapes do not fit together.
        IndexError: A class index that the logits do not have (raised by torch; on CUDA a device assertion).

    References:
        Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (2015).
    """
    _check_options(temperature, alpha, reduction)
    _check_logits(student_logits, teacher_logits)
    student, teacher = _classes_second(student_logits, class_dim), _classes_second(teacher_logits, class_dim)
    if student.shape[1] == 1:  # of which the softmax is 1 whatever the logit: no loss, and no gradient
        raise OptionError(
            f"distill_loss: there is one class in dimension {class_dim} of logits of shape "
            f"{tuple(student_logits.shape)}, and nothing to choose from. For outputs that are no classes "
            "take a loss of your own (FineTune(loss=...))."
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)

    loss = temperature**2 * _kl_divergence(student / temperature, teacher / temperature)
    keep = torch.ones_like(loss, dtype=torch.bool)
    if targets is not None:
        labels = _labels(targets, student_logits.shape, class_dim, dtype)
        if not labels.is_floating_point():
            keep = labels != ignore_index
        task = F.cross_entropy(student, labels, reduction="none", ignore_index=ignore_index)
        loss = alpha * loss + (1 - alpha) * task

    loss = torch.where(keep, loss, 0.0)
    if reduction == "none":
        return loss if student_logits.ndim > 1 else loss.squeeze(0)
    return loss.sum() / keep.sum().clamp(min=1) if reduction == "mean" else loss.sum()


def _kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) per position, in nats; classes are dimension 1."""
    student_log, teacher_log = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    terms = teacher_log.exp() * (teacher_log - student_log)
    return torch.where(teacher_log == -math.inf, 0.0, terms).sum(dim=1)  # p log p is 0 where p is, in a masked class


def _classes_second(logits: Tensor, class_dim: int) -> Tensor:
    """Move the classes to dimension 1; unbatched ``(C,)`` becomes ``(1, C)``."""
    return logits.unsqueeze(0) if logits.ndim == 1 else logits.movedim(_checked_dim(logits, class_dim), 1)


def _checked_dim(logits: Tensor, class_dim: int) -> int:
    if not -logits.ndim <= class_dim < logits.ndim:
        raise OptionError(
            f"distill_loss: class_dim must be a dimension of the logits, of shape {tuple(logits.shape)}, "
            f"got {class_dim}."
        )
    return class_dim % logits.ndim


def _labels(targets: Tensor, shape: torch.Size, class_dim: int, dtype: torch.dtype) -> Tensor:
    """Return the targets as ``F.cross_entropy`` wants them for logits of ``shape`` after ``_classes_second``."""
    probabilities = targets.is_floating_point()
    dim = 0 if len(shape) == 1 else class_dim % len(shape)
    expected = tuple(shape) if probabilities else (*shape[:dim], *shape[dim + 1 :])
    if tuple(targets.shape) != expected:
        kind = "class probabilities (floats)" if probabilities else "class indices (integers)"
        raise OptionError(
            f"distill_loss: targets that are {kind} must have shape {expected} for logits of shape {tuple(shape)} with "
            f"classes in dimension {dim}, got {tuple(targets.shape)}. Reshape the targets or pass class_dim."
        )
    if probabilities:
        return _classes_second(targets, class_dim).to(dtype)
    return targets.reshape(expected or (1,)).to(torch.int64)


def _check_options(temperature: float, alpha: float, reduction: str) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise OptionError(
            f"distill_loss: temperature must be finite and above 0, got {temperature}. Usual are 1 to 20."
        )
    if not 0 <= alpha <= 1:
        raise OptionError(f"distill_loss: alpha must be from 0 (targets alone) to 1 (teacher alone), got {alpha}.")
    if reduction not in get_args(Reduction):
        raise OptionError(f"distill_loss: reduction must be one of {get_args(Reduction)}, got {reduction!r}.")


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(logits, Tensor):
            raise OptionError(
                f"distill_loss: {name} must be a tensor, got {type(logits).__name__}. "
                "Pass the logits out of the model's output."
            )
        if not logits.is_floating_point():
            raise OptionError(f"distill_loss: {name} must be floating-point, got {logits.dtype}.")
    if student.shape != teacher.shape or student.ndim == 0:
        raise OptionError(
            f"distill_loss: student and teacher logits must have the same shape, of one dimension or more; got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}. "
            "Both models must have the same classes and see the same batch."
        )
