"""Distances between a student's and a teacher's features, as pure functions of the two tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_nn.errors import OptionError


def guidance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Half the squared distance of two feature tensors, averaged over the batch.

    :math:`\frac{1}{2N} \sum_{n=1}^{N} \|u_n - r_n\|^2`, where the norm runs over all of a sample's elements: it is
    *not* divided by their number. No gradient reaches the teacher.

    Args:
        student: Features :math:`u` of shape ``(N, ...)``.
        teacher: Features :math:`r`, of the same shape.

    Returns:
        A scalar, in float32 at least.

    Raises:
        OptionError: The shapes differ.
    """
    if student.shape != teacher.shape or student.ndim == 0:
        raise OptionError(
            f"guidance: the student's and the teacher's features must have the same shape, got "
            f'{tuple(student.shape)} and {tuple(teacher.shape)}. Use kind="hint" where only the widths differ, '
            'kind="attention" where the sizes of the maps do, and give both models the same batch.'
        )
    difference = _widened(student) - _widened(teacher.detach())
    return difference.square().sum() / (2 * max(1, len(student)))


def attention_loss(student: Tensor, teacher: Tensor, *, channel_dim: int | None = None) -> Tensor:
    r"""Half the squared distance of two normalised attention maps, averaged over the batch.

    The map of a sample is :math:`q = \sum_c a_c^2`, the sum of squares over the channels at every position. Where the
    sizes differ, the larger map is averaged down to the smaller (adaptive pooling). The loss is
    :math:`\frac{1}{2N} \sum_n \| q^s_n / \|q^s_n\| - q^t_n / \|q^t_n\| \|^2`, between 0 and 1, so the widths need not
    agree. No gradient reaches the teacher. (The paper writes the distance without the square, which has no
    derivative where student and teacher agree, and a compressed copy starts near there.)

    Args:
        student: Features of shape ``(N, C, d1, ...)``, or ``(N, length, C)``.
        teacher: Features with as many dimensions and the same ``N``.
        channel_dim: Dimension of the channels. None: 1 for four dimensions or more, the last for three.

    Returns:
        A scalar, in float32 at least.

    Raises:
        OptionError: Features with no positions, or batches or dimensions that differ.

    References:
        Zagoruyko and Komodakis, "Paying more attention to attention" (2017).
    """
    if student.ndim != teacher.ndim or student.ndim < 3 or len(student) != len(teacher):
        raise OptionError(
            "attention: the student's and the teacher's features must have the same batch size and the same number of "
            f"dimensions, three or more, got shapes {tuple(student.shape)} and {tuple(teacher.shape)}. Tap layers "
            "whose outputs are maps, and give both models the same batch."
        )
    maps = [_energy_map(features, channel_dim) for features in (student, teacher.detach())]
    size = [min(pair) for pair in zip(maps[0].shape[1:], maps[1].shape[1:], strict=True)]
    student_map, teacher_map = (F.normalize(_pooled(q, size).flatten(1), dim=1) for q in maps)
    return (student_map - teacher_map).square().sum() / (2 * max(1, len(student)))


def resolve_channel_dim(features: Tensor, channel_dim: int | None) -> int:
    """Return the dimension of the channels: 1 for maps of four dimensions or more, else the last, unless given.

    Raises:
        OptionError: ``channel_dim`` is the batch dimension or none of the features' dimensions.
    """
    if channel_dim is None:
        return 1 if features.ndim >= 4 else features.ndim - 1
    if not -features.ndim < channel_dim < features.ndim or channel_dim == 0:
        raise OptionError(
            f"channel_dim must be a dimension after the batch's, of features of shape {tuple(features.shape)}, "
            f"got {channel_dim}."
        )
    return channel_dim % features.ndim


def _energy_map(features: Tensor, channel_dim: int | None) -> Tensor:
    """Return the sum of squares over the channels, of shape ``(N, d1, ...)``."""
    return _widened(features).square().sum(dim=resolve_channel_dim(features, channel_dim))


def _pooled(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Average maps of shape ``(N, d1, ...)`` down to ``size``, for one to three dimensions."""
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    pools: dict[int, Callable[..., Tensor]] = {
        1: F.adaptive_avg_pool1d,
        2: F.adaptive_avg_pool2d,
        3: F.adaptive_avg_pool3d,
    }
    if len(size) not in pools:
        raise OptionError(
            f"attention: maps with {len(size)} dimensions of positions must have equal sizes, "
            f"got {tuple(maps.shape[1:])} where {tuple(size)} was expected."
        )
    return pools[len(size)](maps.unsqueeze(1), size).squeeze(1)


def _widened(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))
